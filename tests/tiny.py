"""Tiny models, tokenizers, checkpoints and Hugging Face folders, made in code in well under a second each."""

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxslm.checkpoint import save_checkpoint
from jaxslm.config import ModelConfig, PromptConfig, RankerConfig, RopeScaling
from jaxslm.convert.export import hf_config, hf_tensors, write_hf_model
from jaxslm.model.decoder import Decoder, Params, abstract_params
from jaxslm.model.layout import Rows
from jaxslm.prompt import Prompt

if TYPE_CHECKING:
    from jaxslm.score.scorer import Ranker

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Control tokens. Like Qwen3's tokenizer, `<think>` and `</think>` are added tokens that are not marked special."""
NOT_MARKED_SPECIAL = ("<think>", "</think>")

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen (and, but for the digits, Llama 3) splits text before BPE: punctuation takes the newlines after it along."""

_WORDS = (" yes", " no", " the", " job", " python", " developer", " engineer", " é", "yes", "no", "the")
_MERGED = (*_WORDS, "\n\n", ".\n", ":\n", "?\n", "!\n", ").", "...", "  ", " (", "12")


@cache
def tiny_tokenizer_json() -> str:
    """Returns a `tokenizer.json`: byte-level BPE with Qwen's splitting, its control tokens and single-token labels."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)}
    to_symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: list[tuple[str, str]] = []
    for word in _MERGED:
        symbols = "".join(piece for piece, _ in to_symbols.pre_tokenize_str(word))
        merged = symbols[0]
        for symbol in symbols[1:]:
            if merged + symbol not in vocab:
                vocab[merged + symbol] = len(vocab)
                merges.append((merged, symbol))
            merged += symbol
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"), to_symbols]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in NOT_MARKED_SPECIAL])
    return str(tokenizer.to_str())


VOCAB_SIZE = 384
"""Rows of the tiny models' embedding tables: a little more than the tiny tokenizer's ids, as in real models."""


def tiny_config(family: str = "qwen3", **changes: Any) -> ModelConfig:
    """Returns a model of two layers, width 32, 2 KV heads of 2 query heads each, head width 8, MLP width 48."""
    settings: dict[str, Any] = {
        "family": family,
        "vocab_size": VOCAB_SIZE,
        "width": 32,
        "num_layers": 2,
        "num_kv_heads": 2,
        "queries_per_kv": 2,
        "head_dim": 8,
        "mlp_width": 48,
        "max_positions": 4096,
        "tie_embeddings": True,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5 if family == "llama" else 1e-6,
    }
    return ModelConfig(**(settings | changes))


LLAMA3_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)

TINY_CONFIGS = {
    "qwen3": tiny_config(),
    "qwen3-one-kv-head": tiny_config(num_kv_heads=1, queries_per_kv=4),
    "qwen3-untied-wide-heads": tiny_config(tie_embeddings=False, head_dim=16, rope_theta=1e6),
    "llama": tiny_config("llama"),
    "llama-multi-head": tiny_config("llama", num_kv_heads=4, queries_per_kv=1, tie_embeddings=False),
    "llama-three-queries-per-kv": tiny_config("llama", width=48, num_kv_heads=2, queries_per_kv=3),
    "llama-3-rope-scaling": tiny_config(
        "llama", head_dim=16, rope_theta=5e5, rope_scaling=LLAMA3_SCALING, max_positions=16384
    ),
    # Only pruning makes these: no foreign format states widths by layer.
    "qwen3-non-uniform": tiny_config(num_layers=3, num_kv_heads=(2, 1, 2), mlp_width=(48, 16, 40)),
}
"""Every shape that the decoder knows, by name."""


def tiny_params(config: ModelConfig, seed: int = 0) -> Params:
    """Returns float32 parameters drawn by numpy, the same on every machine and release; norms are not all ones.

    Matrices have a spread of 0.7 / sqrt(inputs), so that a tiny model's logits differ between tokens.
    """
    generator = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = generator.standard_normal(leaf.shape, np.float32)
        name = path[-1].key
        if name == "scale":
            return jax.numpy.asarray(1 + 0.1 * noise)
        inputs = leaf.shape[1] if name in ("embedding", "head") else leaf.shape[0]
        return jax.numpy.asarray(noise * np.float32(0.7 / np.sqrt(inputs)))

    params: Params = jax.tree_util.tree_map_with_path(draw, abstract_params(config))
    return params


def every_state(decoder: Decoder, params: Params, tokens_BT: Array) -> Array:
    """Returns the final states of rows without padding [B, T, D], in one program."""
    layout = Rows(jnp.ones(tokens_BT.shape, bool), last_only=False)
    return jax.jit(lambda params, tokens: decoder.apply({"params": params}, tokens, layout))(params, tokens_BT)


def tiny_ranker_config(model: ModelConfig | None = None, **prompt: Any) -> RankerConfig:
    """Returns the configuration of a ranker with the tiny tokenizer; `prompt` are fields of PromptConfig."""
    settings = PromptConfig(**({"template": "qwen3-reranker"} | prompt))
    labels = Prompt(tiny_tokenizer_json(), settings).label_token_ids
    return RankerConfig(model=model or tiny_config(), prompt=settings, label_token_ids=labels)


def tiny_checkpoint(path: Path, model: ModelConfig | None = None, *, seed: int = 0, **prompt: Any) -> Path:
    """Writes a checkpoint of a random tiny model to `path`, which must not exist; returns `path`."""
    config = tiny_ranker_config(model, **prompt)
    files = {"tokenizer.json": tiny_tokenizer_json().encode()}
    save_checkpoint(path, config, tiny_params(config.model, seed), files, source="random")
    return path


def tiny_ranker(path: Path, model: ModelConfig | None = None, *, seed: int = 0, **prompt: Any) -> "Ranker":
    """Writes a tiny checkpoint to `path`, which must not exist, and loads it."""
    from jaxslm.score.scorer import load

    return load(tiny_checkpoint(path, model, seed=seed, **prompt))


def write_hf_folder(
    folder: Path, config: ModelConfig, tensors: dict[str, np.ndarray] | None = None, *, seed: int = 0, shards: int = 1
) -> Path:
    """Writes a Hugging Face folder with the tiny tokenizer, by default of `tiny_params(config, seed)`; returns it."""
    folder.mkdir(parents=True)
    tensors = hf_tensors(tiny_params(config, seed)) if tensors is None else tensors
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    if shards == 1:
        write_hf_model(folder, hf_config(config), tensors)
        return folder
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    names = sorted(tensors)
    places = {name: f"model-{1 + number % shards:05}-of-{shards:05}.safetensors" for number, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
