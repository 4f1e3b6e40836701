"""The input pipeline. (stub: signatures are final)"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxslm.prompt import Prompt
from jaxslm.train.data_settings import DataSettings, PairSettings

Batch = dict[str, np.ndarray]


class BatchIterator(Iterator[Batch]):
    """Batches of one static shape, as dicts of numpy arrays; StopIteration after the last epoch."""

    def __next__(self) -> Batch:
        raise NotImplementedError

    @property
    def padding_fraction(self) -> float:
        """Share of padding among all tokens of the batches given out so far (0 before the first)."""
        raise NotImplementedError

    def get_state(self) -> dict[str, Any]:
        """Small JSON-able dict; `set_state` of it goes on with exactly the batch that would have come next."""
        raise NotImplementedError

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises InputError when the state is of other data, settings, seed or number of hosts."""
        raise NotImplementedError

    def query_id(self, list_id: int) -> str:
        """The query id behind a `list_ids` entry, for error reports."""
        raise NotImplementedError


def ranker_batches(settings: DataSettings, prompt: Prompt, *, host: int = 0, hosts: int = 1) -> BatchIterator:
    """Lists for training a ranker, this host's share of them.

    {"tokens": int32 [M], "prefix": int32 [R, P] index into M, M where there is none, "items": int32 [R, J, T] likewise,
     "labels": float32 [R, J], "valid": bool [R, J], "list_ids": int32 [R], -1 for an empty slot}
    and, with settings.teacher_scores, "teacher": float32 [R, J] log-odds, NaN where the teacher gave none.
    R lists is a maximum: fewer when M is full. The layout is `SharedPrefix(prefix, items, M)`.
    """
    raise NotImplementedError


def pair_batches(settings: PairSettings, tokenizer_json: str, *, host: int = 0, hosts: int = 1) -> BatchIterator:
    """Pairs for contrastive training, rows of plain text (" " + text) without the prompt's words.

    {"query_tokens": int32 [B, Tq], "query_valid": bool [B, Tq], "item_tokens": int32 [B, Ti], "item_valid": bool [B, Ti],
     "positive": bool [B, B] item j is relevant to query i; the diagonal is True for real pairs, False for empty rows,
     "list_ids": int32 [B], -1 for an empty row}
    """
    raise NotImplementedError
