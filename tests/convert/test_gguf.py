"""GGUF files: the same logits as the Hugging Face folder of the same weights; damage is one line, whatever it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from jaxslm.config import ModelConfig
from jaxslm.convert import convert
from jaxslm.convert.gguf import NAMES
from jaxslm.convert.tensors import is_matrix
from jaxslm.errors import InputError
from jaxslm.model.layers import rope_frequencies
from jaxslm.score.scorer import load
from tests.tiny import (
    NOT_MARKED_SPECIAL,
    SPECIALS,
    TINY_CONFIGS,
    tiny_config,
    tiny_params,
    tiny_tokenizer_json,
    write_hf_folder,
)

ROWS = [[5, 17, 9], [3, 4], list(range(40, 70))]
Edit = Callable[[dict[str, Any]], Any]


def interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rotated pairs side by side, as llama.cpp's converter writes Q and K of Llama models."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    tensors = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tiny_params(config))[0]:
        path = tuple(key.key for key in keys)
        array = np.asarray(leaf)
        array = np.ascontiguousarray(array.T if is_matrix(path) else array)
        if config.family == "llama" and path[-1] in ("q", "k"):
            array = interleaved(array, config.head_dim)
        tensors[NAMES.of(path)] = array
    if config.rope_scaling:
        plain, scaled = (rope_frequencies(config.head_dim, config.rope_theta, s) for s in (None, config.rope_scaling))
        tensors["rope_freqs.weight"] = np.asarray(plain / scaled, np.float32)
    return tensors


def gguf_settings(config: ModelConfig) -> dict[str, Any]:
    K = config.kv_heads_by_layer[0]
    return {
        "context_length": config.max_positions,
        "embedding_length": config.width,
        "block_count": config.num_layers,
        "feed_forward_length": config.mlp_width_by_layer[0],
        "attention.head_count": K * config.queries_per_kv,
        "attention.head_count_kv": K,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
    }


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tree = json.loads(tiny_tokenizer_json())
    vocab = tree["model"]["vocab"] | {token["content"]: token["id"] for token in tree["added_tokens"]}
    tokens = sorted(vocab, key=lambda token: int(vocab[token]))
    kinds = dict.fromkeys(SPECIALS, gguf.TokenType.CONTROL) | dict.fromkeys(
        NOT_MARKED_SPECIAL, gguf.TokenType.USER_DEFINED
    )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tree["model"]["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(vocab["<|endoftext|>"])


def write_gguf(
    file: Path,
    config: ModelConfig,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    architecture: str | None = None,
    edit_settings: Edit | None = None,
    edit_tensors: Edit | None = None,
    tokenizer: bool = True,
) -> Path:
    """Writes a GGUF file of `tiny_params(config)`; norms stay in float32, as everywhere."""
    architecture = architecture or config.family
    writer = gguf.GGUFWriter(file, architecture)
    settings, tensors = gguf_settings(config), gguf_tensors(config)
    for edit, tree in ((edit_settings, settings), (edit_tensors, tensors)):
        if edit:
            edit(tree)
    for name, value in settings.items():
        add: dict[type, Callable[..., None]] = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](f"{architecture}.{name}", value)
    if tokenizer:
        add_tokenizer(writer)
    for name, array in tensors.items():
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def assert_refused(file: Path, message: str) -> None:
    """Converting fails with one matching line and leaves nothing beside the file."""
    before = sorted(file.parent.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        convert(str(file), file.parent / "ckpt")
    assert "\n" not in str(caught.value)
    assert sorted(file.parent.iterdir()) == before


CONFIGS = {name: TINY_CONFIGS[name] for name in ("qwen3", "llama", "qwen3-untied-wide-heads", "llama-3-rope-scaling")}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_the_hugging_face_folder(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    convert(str(write_hf_folder(tmp_path / "hf", config)), tmp_path / "from-hf", template="yes-no")
    manifest = convert(str(write_gguf(tmp_path / "m.gguf", config)), tmp_path / "from-gguf", template="yes-no")
    assert manifest.ranker.model == config
    assert manifest.source == "m.gguf (GGUF, dequantised from F32)"
    first, second = load(tmp_path / "from-hf"), load(tmp_path / "from-gguf")
    assert first.label_token_ids == second.label_token_ids
    np.testing.assert_array_equal(first.label_logits(ROWS), second.label_logits(ROWS))
    text = "Is the job (12) open?\nYes, <|im_end|> it's a Python developer's job. <think>"
    assert first.prompt.encode("python", [text]) == second.prompt.encode("python", [text])


@pytest.mark.parametrize(("kind", "error"), [("F16", 1e-3), ("Q8_0", 2e-2)])
def test_quantised_types(tmp_path: Path, kind: str, error: float) -> None:
    config = tiny_config("llama", mlp_width=64)
    file = write_gguf(tmp_path / "m.gguf", config, gguf.GGMLQuantizationType[kind])
    manifest = convert(str(file), tmp_path / "ckpt")
    assert manifest.source == f"m.gguf (GGUF, dequantised from {kind}, F32)"
    found, expected = load(tmp_path / "ckpt").params, tiny_params(config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=error * np.abs(b).max()), found, expected)
    assert np.abs(found["embedding"] - expected["embedding"]).max() > 0


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "good.gguf", tiny_config(num_layers=1))


@pytest.mark.parametrize("part", [0, 3, 8, 20, 24, 40, 100, 0.02, 0.05, 0.1, 0.15, 0.2, 0.4, 0.7, 0.99, -1])
def test_truncation(tmp_path: Path, good: Path, part: float) -> None:
    """In the header, the metadata, the tokenizer, the tensor table and the tensors."""
    whole = good.read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[: int(part * len(whole)) if isinstance(part, float) else part])
    assert_refused(file, r"cut.gguf: damaged or truncated GGUF")


@pytest.mark.slow
def test_flipped_bytes_never_end_in_another_exception(tmp_path: Path, good: Path) -> None:
    """Lengths, types, names and counts in the header; weights may change without a trace, as GGUF has no checksum."""
    whole = good.read_bytes()
    generator = np.random.default_rng(0)
    refused = []
    for number in range(60):
        broken = bytearray(whole)
        end = 64 if number < 20 else 1200 if number < 40 else len(whole)
        broken[generator.integers(0, end)] ^= int(generator.integers(1, 256))
        (tmp_path / "m.gguf").write_bytes(broken)
        try:
            convert(str(tmp_path / "m.gguf"), tmp_path / "ckpt")
        except InputError as error:
            refused.append(str(error))
        shutil.rmtree(tmp_path / "ckpt", ignore_errors=True)
    assert len(refused) > 20
    assert not any("\n" in message for message in refused)


def remove(name: str) -> Edit:
    return lambda tree: tree.pop(name)


def put(name: str, value: Any) -> Edit:
    return lambda tree: tree.update({name: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("block_count"), "metadata qwen3.block_count is missing"),
        (remove("attention.head_count_kv"), "metadata qwen3.attention.head_count_kv is missing"),
        (put("attention.head_count_kv", [2, 1]), "must be a multiple of key/value heads"),
        (put("attention.head_count_kv", 3), "query heads 4 must be a multiple of key/value heads 3"),
        (put("attention.head_count_kv", 0), "query heads 4 must be a multiple of key/value heads 0"),
        (put("rope.scaling.type", "yarn"), "rope scaling type 'yarn' is not supported"),
        (put("block_count", 3), "tensor blk.2.[a-z_.]+ is missing"),
        (put("block_count", 0), "num_layers: Input should be greater than 0"),
        (put("embedding_length", "wide"), "metadata qwen3.embedding_length must be of type int, is 'wide'"),
        (put("attention.layer_norm_rms_epsilon", float("nan")), "norm_eps: "),
        (put("feed_forward_length", 40), r"tensor blk.0.ffn_[a-z]+.weight has shape"),
    ],
)
def test_wrong_metadata(tmp_path: Path, edit: Edit, message: str) -> None:
    assert_refused(write_gguf(tmp_path / "m.gguf", tiny_config(), edit_settings=edit), message)


def with_nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.ffn_up.weight"][2, 3] = np.nan


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("token_embd.weight"), "tensor token_embd.weight is missing"),
        (remove("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight is missing"),
        (put("blk.0.attn_q.bias", np.ones(32, np.float32)), "tensor blk.0.attn_q.bias is unexpected"),
        (put("blk.0.attn_k.weight", np.ones((8, 32), np.float32)), r"attn_k.weight has shape \(8, 32\), .* \(16, 32\)"),
        (
            put("blk.0.attn_k.weight", np.ones((12, 32), np.float32)),
            r"attn_k.weight has shape \(12, 32\), .* \(16, 32\)",
        ),
        (
            put("rope_freqs.weight", np.linspace(1, 3, 4, dtype=np.float32)),
            "fits none of Llama 3's published RoPE scalings",
        ),
        (put("rope_freqs.weight", np.ones(3, np.float32)), "fits none of Llama 3's published RoPE scalings"),
        (with_nan, "tensor blk.0.ffn_up.weight holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_wrong_tensors_are_named(tmp_path: Path, family: str, edit: Edit, message: str) -> None:
    assert_refused(write_gguf(tmp_path / "m.gguf", tiny_config(family), edit_tensors=edit), message)


def test_other_files(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "gemma.gguf", tiny_config(), architecture="gemma")
    assert_refused(file, r"architecture 'gemma' is not supported .llama and qwen3 are.")
    assert_refused(
        write_gguf(tmp_path / "mute.gguf", tiny_config(), tokenizer=False), "metadata tokenizer.ggml.model is missing"
    )
    assert_refused(tmp_path / "absent.gguf", "No such file")
    (tmp_path / "folder.gguf").mkdir()
    assert_refused(tmp_path / "folder.gguf", "folder.gguf: ")
    (tmp_path / "text.gguf").write_text("not a model " * 100)
    assert_refused(tmp_path / "text.gguf", "damaged or truncated GGUF")
