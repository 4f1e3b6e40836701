"""The shapes at which the attention of packed scoring is tested, measured and tuned."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.prefix_item_attention import KeySpans, mosaic_gpu, prefix_item_attention, reference
from pallas_kernels.specs import Spec

TILES: tuple[Mapping[str, int], ...] = (
    {},
    {"keys": 64, "stages": 4},
    {"keys": 64, "stages": 2, "weights_in_registers": 1},
    {"keys": 64, "stages": 4, "weights_in_registers": 1},
    {"keys": 128, "stages": 2, "weights_in_registers": 1},
)
"""First the default, which depends on the shape."""

LAST_LAYER_TILES: tuple[Mapping[str, int], ...] = (
    {},
    *({"keys": keys, "queries": q, "weights_in_registers": 1} for keys in (64, 128) for q in (8, 16, 32, 64)),
)

Request = tuple[int, Sequence[int]]
"""Tokens of the prefix, tokens of each item."""


def packed_spans(requests: Sequence[Request], padding: int = 0, *, last_only: bool = False) -> KeySpans:
    """Returns the spans of requests that lie end to end, each prefix in front of its items.

    Args:
        padding: tokens behind the last request; each sees itself.
        last_only: queries are the last tokens of the items alone; that of an empty item sees nothing.
    """
    spans, token = [], 0
    for prefix, items in requests:
        first, token = token, token + prefix
        if not last_only:
            spans += [(first, first, first, first + i + 1) for i in range(prefix)]
        for length in items:
            places = [length - 1] if last_only else range(length)
            begin = (first, first + prefix) if length else (0, 0)
            spans += [(*begin, token, token + i + 1) for i in places]
            token += length
    if not last_only:
        spans += [(token + i, token + i, token + i, token + i + 1) for i in range(padding)]
    return KeySpans(*np.array(spans, np.int32).T)


def _spec(
    name: str, heads: tuple[int, int, int], requests: Sequence[Request], padding: int = 0, *, last_only: bool = False
) -> Spec:
    """The attention of requests end to end, and `padding` tokens behind them, at heads (N, K, H)."""
    N, K, H = heads
    spans = packed_spans(requests, padding, last_only=last_only)
    M, Q = sum(prefix + sum(items) for prefix, items in requests) + padding, len(spans.item_end)
    longest = max(prefix for prefix, _ in requests), max(max(items) for _, items in requests)
    shape = {"Q": Q, "M": M, "N": N, "K": K, "H": H, "P": longest[0], "T": longest[1]}

    def make(seed: int) -> tuple[np.ndarray, ...]:
        # The length of the pool is prime, so that no two heads or tokens are equal.
        pool = np.random.default_rng(seed).standard_normal(999_983, np.float32).astype(jnp.bfloat16)
        pool = np.where(pool == 0, pool.dtype.type(1), pool)
        sizes = np.cumsum([Q * N * H, M * K * H, M * K * H])
        q, k, v = np.split(np.resize(pool, sizes[-1]), sizes[:-1])
        return q.reshape(Q, N, H), k.reshape(M, K, H), v.reshape(M, K, H), *map(np.asarray, spans)

    def run(
        q: jax.Array, k: jax.Array, v: jax.Array, *spans: jax.Array, implementation: str | None = None
    ) -> jax.Array:
        return prefix_item_attention(q, k, v, KeySpans(*spans), longest=longest, implementation=implementation)

    def run_tiles(q: jax.Array, k: jax.Array, v: jax.Array, *spans: jax.Array, tiles: Mapping[str, int]) -> jax.Array:
        return mosaic_gpu.attention(q, k, v, KeySpans(*spans), tiles=mosaic_gpu.tiles_for(tiles, shape))

    return Spec(
        op="prefix_item_attention",
        name=name,
        shape=shape,
        make=make,
        run=run,
        exact=reference.exact,
        flops=4 * N * H * int(np.sum(spans.prefix_end - spans.prefix_start + spans.item_end - spans.item_start)),
        bytes=2 * H * (2 * Q * N + 2 * M * K) + 16 * Q,
        tiles=LAST_LAYER_TILES if last_only else TILES,
        run_tiles=run_tiles,
        padding=0 if last_only else padding,
    )


_QWEN3_600M = 16, 8, 128
_SMOLLM2_135M = 9, 3, 64

# As many requests of a workload as one forward pass holds: 50 items each, 10 of `text_300`; padded to whole blocks.
SPECS = (
    _spec("full_text, qwen3-0.6b", _QWEN3_600M, [(64, [901] * 50)], 6),
    _spec("summary, qwen3-0.6b", _QWEN3_600M, [(50, [150] * 50)] * 2, 4),
    _spec("text_300, qwen3-0.6b", _QWEN3_600M, [(120, [180] * 10)] * 8),
    _spec("latent_8, qwen3-0.6b", _QWEN3_600M, [(60, [9] * 50)] * 16, 32),
    _spec("latent_1, qwen3-0.6b", _QWEN3_600M, [(60, [2] * 50)] * 32),
    _spec("latent_8, one request, qwen3-0.6b", _QWEN3_600M, [(60, [9] * 50)], 2),
    _spec("latent_8, last layer, qwen3-0.6b", _QWEN3_600M, [(60, [9] * 50)] * 16, 32, last_only=True),
    _spec("summary, last layer, qwen3-0.6b", _QWEN3_600M, [(50, [150] * 50)] * 2, 4, last_only=True),
    _spec("summary, smollm2-135m", _SMOLLM2_135M, [(50, [150] * 50)] * 2, 4),
    _spec("latent_8, smollm2-135m", _SMOLLM2_135M, [(60, [9] * 50)] * 16, 32),
    _spec("latent_1, smollm2-135m", _SMOLLM2_135M, [(60, [2] * 50)] * 32),
    _spec("latent_8, last layer, smollm2-135m", _SMOLLM2_135M, [(60, [9] * 50)] * 16, 32, last_only=True),
    # Long prefixes: a row serves lengths from a quarter to four times its own.
    _spec("short items behind 512 tokens, qwen3-0.6b", _QWEN3_600M, [(512, [9] * 50)] * 8, 496),
    _spec("long items behind 512 tokens, qwen3-0.6b", _QWEN3_600M, [(512, [128] * 28)] * 2),
    _spec("short items behind 512 tokens, smollm2-135m", _SMOLLM2_135M, [(512, [9] * 50)] * 8, 496),
    _spec("long items behind 512 tokens, smollm2-135m", _SMOLLM2_135M, [(512, [128] * 28)] * 2),
)

SMALL = (
    _spec("one token", (1, 1, 64), [(0, [1])]),
    _spec("one item, whole tiles and a ring that turns", (1, 1, 64), [(3, [460])]),
    _spec("short items, requests that begin in the midst of a block", (2, 1, 64), [(7, [3, 5, 2]), (70, [9] * 4)], 8),
    _spec("a prefix longer than a tile, two KV heads of 128", (2, 2, 128), [(150, [9, 1, 17])]),
    _spec("three heads a block, no prefix", (3, 1, 64), [(0, [4, 0, 13]), (0, [2])]),
    _spec("largest ratio of heads", (8, 1, 64), [(5, [2, 6])], 1),
    _spec(
        "answer tokens alone, some items empty",
        (2, 1, 64),
        [(9, [30, 0, 1]), (0, [60] * 3), (4, [0, 2])],
        last_only=True,
    ),
)
