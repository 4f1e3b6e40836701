"""From lists and pairs of any size to batches of one static shape: which go together, and how they are laid out."""

from collections.abc import Sequence

import numpy as np

from jaxslm.train.data_settings import DataSettings, PairSettings
from jaxslm.train.lists import TokenList, TokenPair

Batch = dict[str, np.ndarray]


def fill(sizes: Sequence[int], room: int, most: int) -> list[int]:
    """Returns places of at most `most` sizes whose sum is at most `room`: the first, then the largest that still fit.

    The first always goes, so that nothing waits longer than there are sizes.
    """
    chosen, room = [0], room - sizes[0]
    for place in sorted(range(1, len(sizes)), key=lambda place: (-sizes[place], place)):
        if len(chosen) == most:
            break
        if sizes[place] <= room:
            chosen.append(place)
            room -= sizes[place]
    return chosen


def collate_lists(chosen: Sequence[TokenList], settings: DataSettings) -> Batch:
    """Returns lists laid end to end, as `ranker_batches` describes."""
    R, J, M = settings.lists_per_batch, settings.items_per_list, settings.tokens_per_batch
    batch = {
        "tokens": np.zeros(M, np.int32),
        "prefix": np.full((R, settings.max_prefix_tokens), M, np.int32),
        "items": np.full((R, J, settings.max_item_tokens), M, np.int32),
        "labels": np.zeros((R, J), np.float32),
        "valid": np.zeros((R, J), bool),
        "list_ids": np.full(R, -1, np.int32),
    }
    if settings.teacher_scores is not None:
        batch["teacher"] = np.full((R, J), np.nan, np.float32)
    used = 0
    for slot, one in enumerate(chosen):
        count = len(one.labels)
        batch["tokens"][used : used + one.size] = one.tokens
        for row, length in zip((batch["prefix"][slot], *batch["items"][slot, :count]), one.lengths, strict=True):
            row[:length] = np.arange(used, used + length, dtype=np.int32)
            used += length
        batch["labels"][slot, :count] = one.labels
        batch["valid"][slot, :count] = True
        batch["list_ids"][slot] = one.index
        if one.teacher is not None:
            batch["teacher"][slot, :count] = one.teacher
    return batch


def collate_pairs(chosen: Sequence[TokenPair], settings: PairSettings) -> Batch:
    """Returns pairs packed flat, as `pair_batches` describes: behind each query the item of the pair before it."""
    B, M, count = settings.pairs_per_batch, settings.tokens_per_batch, len(chosen)
    batch: Batch = {
        "tokens": np.zeros(M, np.int32),
        "prefix": np.full((B, settings.max_prefix_tokens), M, np.int32),
        "items": np.full((B, 1, settings.max_item_tokens), M, np.int32),
        "item_rows": np.zeros(B, np.int32),
        "positive": np.zeros((B, B), bool),
        "list_ids": np.full(B, -1, np.int32),
    }
    catalogue_rows = np.array([pair.item_row for pair in chosen])
    used = 0
    for slot, pair in enumerate(chosen):
        for row, tokens in ((batch["prefix"][slot], pair.query), (batch["items"][slot, 0], chosen[slot - 1].item)):
            batch["tokens"][used : used + len(tokens)] = tokens
            row[: len(tokens)] = np.arange(used, used + len(tokens), dtype=np.int32)
            used += len(tokens)
        batch["item_rows"][slot] = (slot + 1) % count
        batch["positive"][slot, :count] = np.isin(catalogue_rows, pair.relevant)
        batch["list_ids"][slot] = pair.index
    return batch
