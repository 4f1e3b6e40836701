"""Which keys a block of queries visits: tiles of two intervals of the flat axis, each key at most once."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.prefix_item_attention.reference import KeySpans

ALIGNMENT = 8
"""Tiles begin at multiples of this: wgmma reads shared memory in units of 8 rows, and copies must match them."""


def plan(spans: KeySpans, queries: int, keys: int) -> Int[Array, "blocks 6"]:
    """Returns the fields of each block's `Schedule`, for blocks of `queries` queries and tiles of `keys` keys."""
    prefix_start, prefix_end, item_start, item_end = (column.reshape(-1, queries) for column in spans)
    has_prefix, has_item = prefix_end > prefix_start, item_end > item_start
    far = jnp.iinfo(jnp.int32).max
    first_prefix = jnp.min(jnp.where(has_prefix, prefix_start, far), axis=1)
    last_prefix = jnp.max(jnp.where(has_prefix, prefix_end, 0), axis=1)
    first_item = jnp.min(jnp.where(has_item, item_start, far), axis=1)
    last_item = jnp.max(jnp.where(has_item, item_end, 0), axis=1)
    # The prefix of a request that begins within the block lies between items, and is visited with them.
    last_item = jnp.where(last_prefix > first_item, jnp.maximum(last_item, last_prefix), last_item)
    last_prefix = jnp.minimum(last_prefix, first_item)
    begin = first_item // ALIGNMENT * ALIGNMENT
    seen_by_all = jnp.max(item_start, axis=1), jnp.min(jnp.where(has_item, item_end, 0), axis=1)
    before_whole = -((begin - seen_by_all[0]) // keys)
    whole = jnp.maximum((seen_by_all[1] - begin) // keys - before_whole, 0)
    before_whole = jnp.where(whole > 0, before_whole, 0)
    return jnp.stack([first_prefix, last_prefix, first_item, last_item, before_whole, whole], axis=1)


@dataclass(frozen=True)
class Schedule:
    """The tiles of one block in the order of their visit. All fields but `keys` are int32 scalars, maybe traced.

    First come the whole tiles, which every query sees in full, so that they need no mask: the middle of a long item.
    Then the tiles of the prefix interval, then those left of the item interval: its ends, and items side by side.

    Attributes:
        keys: keys of a tile.
        prefix_start, prefix_end, item_start, item_end: the intervals; empty where the end is not after the start.
        before_whole: tiles of the item interval in front of the whole ones. whole: how many of these.
    """

    keys: int
    prefix_start: Array
    prefix_end: Array
    item_start: Array
    item_end: Array
    before_whole: Array
    whole: Array

    def _count(self, start: Array, end: Array) -> Array:
        return jnp.where(end > start, lax.div(end - _aligned(start) + (self.keys - 1), jnp.int32(self.keys)), 0)

    @property
    def tiles(self) -> Array:
        """How many tiles there are in all."""
        return self._count(self.prefix_start, self.prefix_end) + self._count(self.item_start, self.item_end)

    def bounds(self, step: Array) -> tuple[Array, Array, Array]:
        """Returns where tile `step` starts, a multiple of ALIGNMENT, and the first and the end of its keys.

        Keys of the tile outside these belong to another tile or to no query.
        """
        rest = step - self.whole - self._count(self.prefix_start, self.prefix_end)
        in_prefix = (step >= self.whole) & (rest < 0)
        tile = jnp.where(step < self.whole, step + self.before_whole, rest)
        tile = jnp.where((rest >= 0) & (rest >= self.before_whole), rest + self.whole, tile)
        tile = jnp.where(in_prefix, step - self.whole, tile)
        first = jnp.where(in_prefix, self.prefix_start, self.item_start)
        start = _aligned(first) + tile * self.keys
        return start, jnp.maximum(first, start), jnp.where(in_prefix, self.prefix_end, self.item_end)


def _aligned(key: Array) -> Array:
    return lax.div(key, jnp.int32(ALIGNMENT)) * ALIGNMENT
