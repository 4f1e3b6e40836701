"""From ragged rows to a few static shapes, in plain numpy: no other shape ever reaches the compiled function."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxslm.errors import InputError

LENGTH_EDGES = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Row lengths that are compiled for, in tokens; neighbours differ by a third to a half, which bounds the padding."""

TOKENS_PER_BATCH = 4096
"""A batch holds at most this many tokens, padding included, unless one row alone is longer."""


@dataclass(frozen=True)
class RowBatch:
    """One static shape filled with rows.

    Attributes:
        tokens: [B, T] int32, zero where there is padding. valid: [B, T], True at real tokens.
        rows: index of each real row in the input; the batch's first `len(rows)` rows, in this order.
    """

    tokens: np.ndarray
    valid: np.ndarray
    rows: np.ndarray


def row_shape(length: int, count: int) -> tuple[int, int]:
    """Returns the static (B, T) for up to `count` rows of up to `length` tokens: T an edge, B a power of four or full.

    Raises:
        InputError: the length is above the last edge.
    """
    if length > LENGTH_EDGES[-1]:
        raise InputError(f"row of {length} tokens: the longest that is compiled for is {LENGTH_EDGES[-1]}")
    T = next(edge for edge in LENGTH_EDGES if edge >= length)
    full = max(1, TOKENS_PER_BATCH // T)
    return min(full, next(4**power for power in range(16) if 4**power >= count)), T


def pack_rows(rows: Sequence[Sequence[int]]) -> Iterator[RowBatch]:
    """Yields batches that hold every row once, longest first, each in the smallest static shape that fits.

    Raises:
        InputError: a row is empty or longer than the last edge.
    """
    lengths = np.array([len(row) for row in rows])
    if (lengths == 0).any():
        raise InputError(f"row {int(np.argmin(lengths))}: has no tokens")
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        B, T = row_shape(int(lengths[order[start]]), len(order) - start)
        chosen = order[start : start + B]
        start += len(chosen)
        tokens, valid = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
        for slot, row in enumerate(chosen):
            tokens[slot, : lengths[row]] = rows[row]
            valid[slot, : lengths[row]] = True
        yield RowBatch(tokens, valid, chosen)
