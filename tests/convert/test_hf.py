"""Hugging Face folders: weights arrive as they are, and every broken folder gets one line that names what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file as save_flax_file
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxslm.checkpoint import load_checkpoint
from jaxslm.config import RopeScaling
from jaxslm.convert import convert
from jaxslm.convert.export import hf_config, hf_tensors
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from tests.tiny import TINY_CONFIGS, tiny_config, tiny_params, write_hf_folder

Q = "model.layers.1.self_attn.q_proj.weight"


def assert_equal(found: Params, expected: Params) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_refused(folder: Path, message: str) -> None:
    """Converting fails with one matching line and leaves nothing beside the folder."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        convert(str(folder), folder.parent / "ckpt")
    assert "\n" not in str(caught.value)
    assert sorted(folder.parent.iterdir()) == before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hf_folder(tmp_path / "source", tiny_config())


def edit_config(folder: Path, **changes: Any) -> None:
    tree = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["qwen3-one-kv-head", "qwen3-untied-wide-heads", "llama-3-rope-scaling"])
@pytest.mark.parametrize("shards", [1, 3])
def test_weights_and_config_arrive(tmp_path: Path, name: str, shards: int) -> None:
    config = TINY_CONFIGS[name]
    folder = write_hf_folder(tmp_path / "source", config, shards=shards)
    manifest = convert(str(folder), tmp_path / "ckpt")
    checkpoint = load_checkpoint(tmp_path / "ckpt")
    assert manifest == checkpoint.manifest
    assert manifest.ranker.model == config
    assert manifest.ranker.prompt.template == ("qwen3-reranker" if config.family == "qwen3" else "yes-no")
    assert manifest.params_dtype == "float32"
    assert_equal(checkpoint.params, tiny_params(config))
    assert checkpoint.tokenizer_files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "source"]


def test_config_as_older_releases_wrote_it(folder: Path) -> None:
    """RoPE at the top level, and no head_dim in Llama: the width over the heads."""
    config = tiny_config("llama", rope_theta=5e4)
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    tree = hf_config(config) | {"rope_theta": 5e4, "rope_scaling": scaling}
    tree = {key: value for key, value in tree.items() if key not in ("rope_parameters", "head_dim")}
    (folder / "config.json").write_text(json.dumps(tree))
    save_file(hf_tensors(tiny_params(config)), folder / "model.safetensors")
    model = convert(str(folder), folder.parent / "ckpt").ranker.model
    assert (model.rope_theta, model.head_dim) == (5e4, 8)
    assert model.rope_scaling == RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=1024
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bfloat16_is_kept_and_float16_widened(folder: Path, dtype: str) -> None:
    tensors = {name: jnp.asarray(array, dtype) for name, array in hf_tensors(tiny_params(tiny_config())).items()}
    save_flax_file(tensors, folder / "model.safetensors")
    manifest = convert(str(folder), folder.parent / "ckpt")
    assert manifest.params_dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    found = load_checkpoint(folder.parent / "ckpt").params
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(manifest.params_dtype), tiny_params(tiny_config()))
    assert_equal(found, expected)


def test_an_equal_tied_head_is_dropped(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    convert(str(folder), folder.parent / "ckpt")
    assert_equal(load_checkpoint(folder.parent / "ckpt").params, tiny_params(tiny_config()))


def test_a_differing_tied_head_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert_refused(folder, "tensor lm_head.weight differs from model.embed_tokens.weight, but the config ties them")


def with_value(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[Q][3, 4] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(Q), f"tensor {Q} is missing"),
        (lambda t: t.pop("model.embed_tokens.weight"), "tensor model.embed_tokens.weight is missing"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[Q]}),
            "tensor model.layers.2.mlp.up_proj.weight is unex",
        ),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[Q][0]}), "q_proj.bias is unexpected"),
        (lambda t: t.update({Q: t[Q][:-1]}), rf"tensor {Q} has shape \(31, 32\), the config asks for \(32, 32\)"),
        (lambda t: t.update({Q: t[Q].reshape(-1)}), rf"tensor {Q} has shape \(1024,\), the config asks for \(32, 32\)"),
        (with_value(np.nan), f"tensor {Q} holds NaN or infinity"),
        (with_value(-np.inf), f"tensor {Q} holds NaN or infinity"),
        (lambda t: t.update({Q: t[Q].astype(np.int32)}), f"tensor {Q} has type I32, which is not supported"),
    ],
    ids=["missing", "no embedding", "one layer more", "bias", "shape", "rank", "NaN", "infinity", "integers"],
)
def test_wrong_tensors_are_named(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any], message: str) -> None:
    edit_tensors(folder, edit)
    assert_refused(folder, message)


def test_a_head_where_the_config_has_one_but_no_file_does(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "source", tiny_config(tie_embeddings=False))
    edit_tensors(folder, lambda t: t.pop("lm_head.weight"))
    assert_refused(folder, "tensor lm_head.weight is missing")


@pytest.mark.parametrize("part", [0, 4, 8, 9, 200, 0.3, 0.9, -1])
def test_truncated_safetensors(folder: Path, part: float) -> None:
    """Before, in and after the header."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole)) if isinstance(part, float) else part])
    assert_refused(folder, "model.safetensors: damaged")


def test_missing_and_truncated_shards(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "source", tiny_config(), shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert_refused(folder, "model-00002-of-00003.safetensors: damaged")
    shard.unlink()
    assert_refused(folder, r"tensor [\w.]+ is missing \(model-00002-of-00003.safetensors should hold it\)")
    shard.write_bytes(whole)
    shutil.copy(shard, folder / "copy.safetensors")
    assert_refused(folder, "stands in two files")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\xff"])
def test_a_broken_index(tmp_path: Path, content: str) -> None:
    folder = write_hf_folder(tmp_path / "source", tiny_config(), shards=2)
    (folder / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    assert_refused(folder, "model.safetensors.index.json: broken|tensor a is missing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported .llama and qwen3 are."),
        ({"model_type": ...}, "model_type None is not supported"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "config.json: .*num_key_value_heads 0"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope type 'yarn' is not supported",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope|factor"),
        ({"head_dim": 7}, "config.json: .*head_dim"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"head_dim": "many"}, "config.json: .*head_dim"),
        ({"vocab_size": -1}, "config.json: vocab_size: Input should be greater than 0"),
        ({"hidden_size": None}, "config.json: .*hidden_size"),
        ({"num_hidden_layers": 1}, "tensor model.layers.1.[a-z_.]+ is unexpected"),
        (
            {"vocab_size": 300},
            r"tensor model.embed_tokens.weight has shape \(384, 32\), the config asks for \(300, 32\)",
        ),
    ],
    ids=str,
)
def test_configs_that_are_not_computed(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    assert_refused(folder, message)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model_type": ["llama"]}', "\xff"])
def test_a_broken_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    assert_refused(folder, "config.json: ")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\xff", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content, encoding="latin-1")
    assert_refused(folder, "tokenizer")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert_refused(folder, f"source: no {name.replace('model', '')}")


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "source", tiny_config(vocab_size=300))
    assert_refused(folder, "the tokenizer has [0-9]+ ids, the model 300 rows")


def test_an_existing_output_is_kept(folder: Path) -> None:
    out = folder.parent / "ckpt"
    out.mkdir()
    (out / "mine").write_text("old")
    with pytest.raises(InputError, match="ckpt exists"):
        convert(str(folder), out)
    assert [file.name for file in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("source", ["nowhere", "", "a/b/c", "/nowhere/at/all", "two words/x"])
def test_no_such_source(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such folder, and not a hub id|no config.json"):
        convert(source, tmp_path / "ckpt")
    assert list(tmp_path.iterdir()) == []


def test_prompt_settings(folder: Path) -> None:
    manifest = convert(str(folder), folder.parent / "ckpt", template="yes-no", instruction="Find it", max_tokens=99)
    prompt = manifest.ranker.prompt
    assert (prompt.template, prompt.instruction, prompt.max_tokens) == ("yes-no", "Find it", 99)
    with pytest.raises(InputError, match="prompt: max_tokens"):
        convert(str(folder), folder.parent / "other", max_tokens=3)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_tokenizers_that_are_not_byte_level_are_refused(folder: Path, scheme: Any) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab(with_added_tokens=False) | {"▁": 370, "▁a": 371, "▁b": 372}
    tokenizer.model = models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b")], unk_token="x")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match="SentencePiece kind do; it must be byte-level BPE"):
        convert(str(folder), folder.parent / "ckpt", labels=("a", "b"))
    assert not (folder.parent / "ckpt").exists()


def test_rows_are_no_longer_than_the_model_was_trained_for(folder: Path) -> None:
    edit_config(folder, max_position_embeddings=256)
    assert convert(str(folder), folder.parent / "by-default").ranker.prompt.max_tokens == 256
    with pytest.raises(InputError, match=r"max_tokens 257: the model was trained for rows of at most 256 tokens"):
        convert(str(folder), folder.parent / "ckpt", max_tokens=257)
    assert not (folder.parent / "ckpt").exists()
