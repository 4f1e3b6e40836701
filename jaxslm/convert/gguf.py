"""GGUF files of the llama and qwen3 architectures, dequantised to float32 by the `gguf` package."""

from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from jaxslm.config import ModelConfig, RopeScaling, validate
from jaxslm.convert.gguf_tokenizer import build_tokenizer_files
from jaxslm.convert.tensors import Names, assemble
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from jaxslm.model.layers import rope_frequencies

Number = TypeVar("Number", int, float)

_LAYER = "blk.{i}."
NAMES = Names(
    embedding="token_embd.weight",
    head="output.weight",
    final_norm="output_norm.weight",
    attention_norm=_LAYER + "attn_norm.weight",
    mlp_norm=_LAYER + "ffn_norm.weight",
    q=_LAYER + "attn_q.weight",
    k=_LAYER + "attn_k.weight",
    v=_LAYER + "attn_v.weight",
    o=_LAYER + "attn_output.weight",
    q_norm=_LAYER + "attn_q_norm.weight",
    k_norm=_LAYER + "attn_k_norm.weight",
    gate=_LAYER + "ffn_gate.weight",
    up=_LAYER + "ffn_up.weight",
    down=_LAYER + "ffn_down.weight",
)
_ROPE_FACTORS = "rope_freqs.weight"
# llama.cpp stores Llama 3's RoPE scaling only as its effect; these are the published settings it is matched against.
_LLAMA3_SCALINGS = tuple(
    RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    for factor in (8.0, 32.0)
)


class GGUF:
    """An opened GGUF file; raises InputError if it is truncated, damaged or of another architecture."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            self._reader = GGUFReader(path)
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from None
        except (ValueError, IndexError, KeyError) as error:
            raise InputError(f"{path}: damaged or truncated GGUF ({str(error).splitlines()[0]})") from None
        self.family = self._field("general.architecture")
        if self.family not in ("llama", "qwen3"):
            raise InputError(f"{path}: architecture {self.family!r} is not supported (llama and qwen3 are)")

    @property
    def quantisation(self) -> str:
        """The types of the tensors, commonest first, e.g. "Q4_1, F32, Q8_0"."""
        kinds = [tensor.tensor_type.name for tensor in self._tensors.values()]
        return ", ".join(sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind)))

    def read_config(self) -> ModelConfig:
        """Returns the shape that the metadata states; raises InputError where it is incomplete or impossible."""
        N, K = self._setting("attention.head_count"), self._setting("attention.head_count_kv")
        if not isinstance(N, int) or not isinstance(K, int) or K < 1 or N < 1 or N % K:
            raise InputError(
                f"{self.path}: query heads {N} must be a multiple of key/value heads {K}, equal in all layers"
            )
        width = self._number("embedding_length", int)
        head_dim = self._number("attention.key_length", int, width // N)
        theta = self._number("rope.freq_base", float, 10000.0)
        kind = self._setting("rope.scaling.type", "none")
        if kind != "none":
            raise InputError(f"{self.path}: rope scaling type {kind!r} is not supported")
        embedding = self._tensors.get(NAMES.embedding)
        if embedding is None or len(embedding.shape) != 2:
            raise InputError(f"{self.path}: tensor {NAMES.embedding} is missing or no matrix")
        settings = {
            "family": self.family,
            "vocab_size": int(embedding.shape[1]),
            "width": width,
            "num_layers": self._number("block_count", int),
            "num_kv_heads": K,
            "queries_per_kv": N // K,
            "head_dim": head_dim,
            "mlp_width": self._number("feed_forward_length", int),
            "max_positions": self._number("context_length", int),
            "tie_embeddings": NAMES.head not in self._tensors,
            "rope_theta": theta,
            # Stored in 32 bits; the shortest decimal that rounds to it is what the author wrote.
            "norm_eps": float(str(np.float32(self._number("attention.layer_norm_rms_epsilon", float)))),
        }
        config = validate(ModelConfig, settings, str(self.path))
        return config.model_copy(update={"rope_scaling": self._rope_scaling(config.head_dim, config.rope_theta)})

    def read_params(self, config: ModelConfig) -> Params:
        """Returns the dequantised parameters in float32; raises InputError as `assemble`."""
        names = self._tensors.keys() - {_ROPE_FACTORS}
        return assemble(config, NAMES, names, lambda name: self._read(name, config), jnp.float32, str(self.path))

    def read_tokenizer_files(self) -> dict[str, bytes]:
        """Returns the tokenizer that the metadata describes, as files of a Hugging Face folder."""
        try:
            return build_tokenizer_files(self._field)
        except InputError as error:
            raise InputError(f"{self.path}: {str(error).removeprefix(f'{self.path}: ')}") from None

    def _read(self, name: str, config: ModelConfig) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            array = np.asarray(dequantize(tensor.data, tensor.tensor_type))
        except NotImplementedError:
            raise InputError(
                f"{self.path}: tensor {name} has type {tensor.tensor_type.name}, which is not supported"
            ) from None
        # llama.cpp interleaves the rotated pairs of each head in Q and K of llama models; we and Hugging Face halve.
        rotated = name.endswith(("attn_q.weight", "attn_k.weight"))
        if self.family == "llama" and rotated and array.ndim == 2 and array.shape[0] % config.head_dim == 0:
            array = array.reshape(-1, config.head_dim // 2, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        return array

    def _rope_scaling(self, head_dim: int, theta: float) -> RopeScaling | None:
        if _ROPE_FACTORS not in self._tensors:
            return None
        factors = np.asarray(self._tensors[_ROPE_FACTORS].data, np.float32)
        plain = np.asarray(rope_frequencies(head_dim, theta, None))
        for scaling in _LLAMA3_SCALINGS:
            expected = plain / np.asarray(rope_frequencies(head_dim, theta, scaling))
            if factors.shape == expected.shape and np.allclose(expected, factors, rtol=1e-3):
                return scaling
        raise InputError(f"{self.path}: tensor {_ROPE_FACTORS} fits none of Llama 3's published RoPE scalings")

    def _field(self, name: str, default: Any = None) -> Any:
        field = self._reader.get_field(name)
        if field is None and default is None:
            raise InputError(f"{self.path}: metadata {name} is missing")
        return default if field is None else field.contents()

    def _setting(self, name: str, default: Any = None) -> Any:
        return self._field(f"{self.family}.{name}", default)

    def _number(self, name: str, kind: type[Number], default: Any = None) -> Number:
        value = self._setting(name, default)
        if not isinstance(value, kind):
            raise InputError(
                f"{self.path}: metadata {self.family}.{name} must be of type {kind.__name__}, is {value!r}"
            )
        return value
