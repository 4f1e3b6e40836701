"""Hugging Face folders (config.json, safetensors, tokenizer) of the Qwen3 and Llama families."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxslm.config import ModelConfig, RopeScaling, validate
from jaxslm.convert.tensors import Names, assemble
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params

_LAYER = "model.layers.{i}."
NAMES = Names(
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    final_norm="model.norm.weight",
    attention_norm=_LAYER + "input_layernorm.weight",
    mlp_norm=_LAYER + "post_attention_layernorm.weight",
    q=_LAYER + "self_attn.q_proj.weight",
    k=_LAYER + "self_attn.k_proj.weight",
    v=_LAYER + "self_attn.v_proj.weight",
    o=_LAYER + "self_attn.o_proj.weight",
    q_norm=_LAYER + "self_attn.q_norm.weight",
    k_norm=_LAYER + "self_attn.k_norm.weight",
    gate=_LAYER + "mlp.gate_proj.weight",
    up=_LAYER + "mlp.up_proj.weight",
    down=_LAYER + "mlp.down_proj.weight",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_DTYPES = ("F32", "F16", "BF16")
_UNSUPPORTED = ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config")


def read_config(folder: Path) -> ModelConfig:
    """Returns the shape of a folder's model; raises InputError on another family or an unsupported option."""
    from huggingface_hub.errors import StrictDataclassError

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it says at import that there is no torch
    from transformers import AutoConfig

    file = folder / "config.json"
    try:
        model_type = json.loads(file.read_bytes()).get("model_type")
    except OSError:
        raise InputError(f"{folder}: no config.json") from None
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: broken JSON ({error})") from None
    if model_type not in ("llama", "qwen3"):
        raise InputError(f"{file}: model_type {model_type!r} is not supported (llama and qwen3 are)")
    try:
        foreign = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, TypeError, KeyError, StrictDataclassError) as error:
        raise InputError(f"{file}: {' '.join(str(error).split())}") from error
    for option in _UNSUPPORTED:
        if getattr(foreign, option, None):
            raise InputError(f"{file}: {option} is not supported")
    if foreign.hidden_act != "silu":
        raise InputError(f"{file}: hidden_act {foreign.hidden_act!r} is not supported (silu is)")
    N, K = foreign.num_attention_heads, foreign.num_key_value_heads
    if not N or not K or N % K:
        raise InputError(f"{file}: num_attention_heads {N} is not a multiple of num_key_value_heads {K}")
    theta, scaling = _read_rope(foreign.rope_parameters, file)
    settings = {
        "family": model_type,
        "vocab_size": foreign.vocab_size,
        "width": foreign.hidden_size,
        "num_layers": foreign.num_hidden_layers,
        "num_kv_heads": K,
        "queries_per_kv": N // K,
        "head_dim": getattr(foreign, "head_dim", None) or foreign.hidden_size // N,
        "mlp_width": foreign.intermediate_size,
        "max_positions": foreign.max_position_embeddings,
        "tie_embeddings": foreign.tie_word_embeddings,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": foreign.rms_norm_eps,
    }
    return validate(ModelConfig, settings, str(file))


def _read_rope(rope: dict[str, Any], file: Path) -> tuple[float, RopeScaling | None]:
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{file}: partial_rotary_factor is not supported")
    if kind == "default":
        return float(rope["rope_theta"]), None
    if kind != "llama3":
        raise InputError(f"{file}: rope type {kind!r} is not supported (default and llama3 are)")
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )
    return float(rope["rope_theta"]), scaling


def read_params(folder: Path, config: ModelConfig) -> Params:
    """Returns the parameters of a folder's safetensors, single or sharded; 16-bit floats other than bfloat16 widen.

    Raises:
        InputError: no safetensors, a damaged one, or tensors that do not fit the config (see `assemble`).
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: no .safetensors file")
    places: dict[str, Any] = {}
    dtypes = set()
    for file in files:
        try:
            opened = safe_open(file, framework="flax")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: damaged ({error})") from None
        for name in opened.keys():  # noqa: SIM118 - not a dict
            if name in places:
                raise InputError(f"{folder}: tensor {name} stands in two files")
            places[name] = opened
            dtype = opened.get_slice(name).get_dtype()
            if dtype not in _DTYPES:
                raise InputError(
                    f"{file}: tensor {name} has type {dtype}, which is not supported ({', '.join(_DTYPES)} are)"
                )
            dtypes.add(dtype)
    _check_index(folder, places)
    kept = jnp.bfloat16 if dtypes == {"BF16"} else jnp.float32
    return assemble(config, NAMES, places, lambda name: np.asarray(places[name].get_tensor(name)), kept, str(folder))


def _check_index(folder: Path, places: dict[str, Any]) -> None:
    """A shard that never arrived is named by the index, not found out by chance."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        weight_map = dict(json.loads(index.read_bytes())["weight_map"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{index}: broken ({type(error).__name__}: {error})") from None
    for name, file in weight_map.items():
        if name not in places:
            raise InputError(f"{folder}: tensor {name} is missing ({file} should hold it)")


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Returns the tokenizer's files by name; raises InputError if there is no tokenizer.json of text."""
    files = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
    if "tokenizer.json" not in files:
        raise InputError(f"{folder}: no tokenizer.json")
    try:
        files["tokenizer.json"].decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{folder}/tokenizer.json: invalid UTF-8 at byte {error.start}") from None
    return files
