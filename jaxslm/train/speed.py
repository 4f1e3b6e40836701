"""How fast a run is: tokens and FLOPs of its batches against what this machine's matrix units reach."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from jaxslm.config import ModelConfig
from jaxslm.model.cost import attention_flops_per_pair, last_layer_savings, linear_flops_per_token
from jaxslm.model.depth import last_layers

BACKWARD = 2
"""A backward pass costs twice a forward pass; recomputation and optimiser are not counted as useful."""


class Work(NamedTuple):
    """What a batch asks for.

    Attributes:
        tokens: real ones. places: those and padding. flops: of forward and backward, padding counts as nothing.
    """

    tokens: int
    places: int
    flops: int


def total(works: Iterable[Work]) -> Work:
    """Returns the sum of at least one."""
    return Work(*map(sum, zip(*works, strict=True)))


def ranker_work(config: ModelConfig, batch: Mapping[str, np.ndarray], train_layers: int | None = None) -> Work:
    """Returns the work of a ranker batch.

    Args:
        train_layers: the last layers that train, all if None; a backward pass goes no deeper.
    """
    tokens, pairs, read = _counts(batch)
    savings = last_layer_savings(config, tokens, read)
    trained = _forward(last_layers(config, train_layers), tokens, pairs) - savings
    flops = _forward(config, tokens, pairs) - savings + BACKWARD * trained
    return Work(tokens, batch["tokens"].size, flops)


def pair_work(config: ModelConfig, batch: Mapping[str, np.ndarray], train_layers: int | None = None) -> Work:
    """Returns the work of a batch of pairs, as `ranker_work`."""
    tokens, pairs, _ = _counts(batch)
    trained = _forward(last_layers(config, train_layers), tokens, pairs)
    return Work(tokens, batch["tokens"].size, _forward(config, tokens, pairs) + BACKWARD * trained)


def _counts(batch: Mapping[str, np.ndarray]) -> tuple[int, int, int]:
    """Returns real tokens, attended (query, key) pairs and items of a packed batch."""
    M = batch["tokens"].shape[-1]
    prefix_R = np.asarray(np.sum(batch["prefix"] < M, axis=-1, dtype=np.int64))
    item_RJ = np.asarray(np.sum(batch["items"] < M, axis=-1, dtype=np.int64))
    item_pairs = int(np.sum(item_RJ * prefix_R[..., None] + item_RJ * (item_RJ + 1) // 2))
    pairs = int(np.sum(prefix_R * (prefix_R + 1) // 2)) + item_pairs
    return int(prefix_R.sum() + item_RJ.sum()), pairs, int(np.count_nonzero(item_RJ))


def _forward(config: ModelConfig, tokens: int, pairs: int) -> int:
    return linear_flops_per_token(config) * tokens + attention_flops_per_pair(config) * pairs
