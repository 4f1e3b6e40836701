"""How fast a run is: tokens and FLOPs of its batches against what this machine's matrix units reach."""

import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxslm.config import ModelConfig
from jaxslm.model.cost import attention_flops_per_pair, last_layer_savings, linear_flops_per_token

BACKWARD = 2
"""A backward pass costs twice a forward pass; recomputation and optimiser are not counted as useful."""


def ranker_work(config: ModelConfig, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Returns (real tokens, FLOPs of forward and backward) of a ranker batch; padding counts as nothing."""
    M = batch["tokens"].shape[-1]
    prefix_R = np.asarray(np.sum(batch["prefix"] < M, axis=-1, dtype=np.int64))
    item_RJ = np.asarray(np.sum(batch["items"] < M, axis=-1, dtype=np.int64))
    tokens = int(prefix_R.sum() + item_RJ.sum())
    item_pairs = int(np.sum(item_RJ * prefix_R[..., None] + item_RJ * (item_RJ + 1) // 2))
    pairs = int(np.sum(prefix_R * (prefix_R + 1) // 2)) + item_pairs
    read = int(np.count_nonzero(item_RJ))
    forward = linear_flops_per_token(config) * tokens + attention_flops_per_pair(config) * pairs
    return tokens, (1 + BACKWARD) * (forward - last_layer_savings(config, tokens, read))


def pair_work(config: ModelConfig, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Returns (real tokens, FLOPs of forward and backward) of a batch of pairs."""
    lengths = np.concatenate([np.sum(batch[name], axis=-1, dtype=np.int64) for name in ("query_valid", "item_valid")])
    tokens, pairs = int(lengths.sum()), int(np.sum(lengths * (lengths + 1) // 2))
    forward = linear_flops_per_token(config) * tokens + attention_flops_per_pair(config) * pairs
    return tokens, (1 + BACKWARD) * forward


def compressor_work(ranker: ModelConfig, encoder: ModelConfig, batch: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Returns (real tokens, FLOPs) of a compressor's batch; a text that vectors are compared with is read forward."""
    if "mixed_tokens" not in batch:
        return ranker_work(ranker, batch)
    mixed = {name: batch[f"mixed_{name}"] for name in ("tokens", "prefix", "items")}
    tokens, flops = ranker_work(ranker, mixed)
    if "tokens" in batch:
        read, forward_and_backward = ranker_work(ranker, batch)
        tokens, flops = tokens + read, flops + forward_and_backward // (1 + BACKWARD)
    if "item_valid" in batch:
        lengths = np.sum(batch["item_valid"], axis=-1, dtype=np.int64)
        encoded, pairs = int(lengths.sum()), int(np.sum(lengths * (lengths + 1) // 2))
        forward = linear_flops_per_token(encoder) * encoded + attention_flops_per_pair(encoder) * pairs
        tokens, flops = tokens + encoded, flops + (1 if "warm_up" in batch else 1 + BACKWARD) * forward
    return tokens, flops


def matmul_ceiling(dtype: jnp.dtype) -> float:
    """Returns the FLOP/s of the best of five large square matrix products on one device."""
    size = 1536 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
