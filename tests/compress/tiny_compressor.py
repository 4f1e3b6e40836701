"""Tiny checkpoints with a random compressor, made in code."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxslm.checkpoint import save_checkpoint
from jaxslm.compress.projector import init_projector
from jaxslm.config import CompressorConfig, ModelConfig
from jaxslm.model.decoder import Params
from tests.tiny import tiny_config, tiny_params, tiny_ranker_config, tiny_tokenizer_json

ENCODER = tiny_config("llama", num_layers=1)
RANKER = tiny_config("llama")


def compressor_config(ranker: ModelConfig = RANKER, **changes: Any) -> CompressorConfig:
    """Returns a compressor of one layer for a ranker, k of 1, 2 and 4, items of up to 40 tokens."""
    settings: dict[str, Any] = {
        "encoder": ENCODER,
        "width": ranker.width,
        "ks": (1, 2, 4),
        "pooling": "mean",
        "max_item_tokens": 40,
        "answer_tokens": 1,
        "tokenizer_sha256": hashlib.sha256(tiny_tokenizer_json().encode()).hexdigest(),
    }
    return CompressorConfig(**(settings | changes))


def compressor_params(config: CompressorConfig, seed: int = 0) -> dict[str, Params]:
    """Returns random parameters of a compressor."""
    pooled = np.random.default_rng(seed).standard_normal((16, config.encoder.width)).astype(np.float32)
    return {"encoder": tiny_params(config.encoder, seed), "projector": init_projector(config, pooled, 0.1, seed)}


def compressor_checkpoint(path: Path, ranker: ModelConfig = RANKER, *, seed: int = 0, **changes: Any) -> Path:
    """Writes a random ranker with a random compressor to `path`, which must not exist; returns `path`."""
    compressor = compressor_config(ranker, **changes)
    config = tiny_ranker_config(ranker, template="yes-no")
    save_checkpoint(
        path,
        config,
        tiny_params(ranker, seed + 1),
        {"tokenizer.json": tiny_tokenizer_json().encode()},
        source="random",
        extra={"compressor": compressor_params(compressor, seed)},
        compressor=compressor,
    )
    return path
