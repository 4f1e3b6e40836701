"""Batches for training a compressor: lists of a query as the ranker reads them, on text, on vectors, or on both.

What an update trains on follows from its number alone (`plan_of`), so that a resumed run goes on with the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxslm.compress.encoder import ItemTokenizer, pad_items
from jaxslm.compress.pooling import segments
from jaxslm.compress.splice import MixedPrompt, text_of
from jaxslm.config import CompressorConfig
from jaxslm.prompt import Prompt
from jaxslm.train.compressor_settings import CompressorTraining
from jaxslm.train.data import ranker_batches
from jaxslm.train.data_settings import DataSettings
from jaxslm.train.lists import TokenList
from jaxslm.train.packing import Batch, collate_lists
from jaxslm.train.sources import TrainingData

TEXT = ("tokens", "prefix", "items")
"""The arrays of a batch that hold rows of text."""
MIXED = tuple(f"mixed_{name}" for name in TEXT)
"""Those of rows of vectors."""


@dataclass(frozen=True)
class Plan:
    """What one update trains on.

    Attributes:
        k: vectors per item; 0 for an update on full text. warm_up: whether the projector alone is trained.
        align, teach: factors of the terms of alignment and of the teacher.
        noise: whether vectors are rounded as storage rounds them.
    """

    k: int
    warm_up: bool = False
    align: float = 1.0
    teach: float = 1.0
    noise: bool = False


def plan_of(update: int, settings: CompressorTraining) -> Plan:
    """Returns the plan of an update, counted from 0. Updates on text lie evenly; k is drawn by the data's seed."""
    curriculum, ks = settings.curriculum, settings.compressor.ks
    later, steps = update - curriculum.projector_steps, settings.steps - curriculum.projector_steps
    if later < 0:
        return Plan(ks[-1], warm_up=True, teach=curriculum.quiet)
    share = curriculum.text_share
    if int((later + 1) * share) > int(later * share):
        return Plan(0)
    first = later < curriculum.first_phase * steps
    return Plan(
        k=int(np.random.default_rng([3, settings.data.seed, update]).choice(ks)),
        align=1.0 if first else curriculum.quiet,
        teach=curriculum.quiet if first else 1.0,
        noise=update >= round((1 - curriculum.noise_share) * settings.steps),
    )


@dataclass(frozen=True)
class CompressorItems:
    """What the items of a catalogue are for a compressor, by their rows in it.

    Attributes:
        ids: token ids as the encoder reads them, cut. texts: what stays text, if anything does.
        pooled: per k the encoder's pooled states [items, k, E], if it is frozen.
    """

    ids: Sequence[np.ndarray]
    texts: Sequence[str] | None
    pooled: Mapping[int, np.ndarray] | None

    @classmethod
    def of(cls, data: TrainingData, config: CompressorConfig, tokenizer: ItemTokenizer) -> "CompressorItems":
        """Returns the items of training data, without pooled states."""
        items = list(data.catalogue.items.values())
        limit, fields = config.max_item_tokens, config.text_fields
        ids = [np.array(each[:limit], np.int32) for each in tokenizer(items)]
        return cls(ids, [text_of(item, fields) for item in items] if fields else None, None)

    def arrays(self, rows: np.ndarray, config: CompressorConfig, k: int) -> Batch:
        """Returns what the vectors of these items are computed from; row -1 is an empty place.

        Either {"pooled": float32 [n, C, E]} or {"item_tokens": int32 [n, T], "item_valid": bool [n, T], "segments":
        int32 [n, C, 2]}: C is the largest of the compressor's ks, and vectors behind the k-th mean nothing.
        """
        most = config.ks[-1]
        if self.pooled is not None:
            states = self.pooled[k][np.maximum(rows, 0)]
            return {"pooled": np.pad(states, ((0, 0), (0, most - k), (0, 0)))}
        ids = [self.ids[row] if row >= 0 else self.ids[0][:0] for row in rows.tolist()]
        tokens, valid = pad_items(ids, len(rows), config.max_item_tokens)
        lengths = np.maximum([len(each) for each in ids], 1)
        places = segments(lengths, k, config.pooling)
        places = np.concatenate([places, np.repeat(places[:, -1:], most - k, axis=1)], axis=1)
        return {"item_tokens": tokens, "item_valid": valid, "segments": places}


class MixedLists:
    """Lays out lists whose items are vectors: one static shape, that of the largest k.

    A smaller k leaves places empty, which costs less than a program of its own: two cores compile one in 12 seconds or
    more, and an update of the quickstart with one vector an item takes them 1.8 so and 1.6 in its own.
    """

    def __init__(
        self,
        settings: DataSettings,
        config: CompressorConfig,
        prompt: Prompt,
        items: CompressorItems,
    ) -> None:
        self._settings, self._config, self._items = settings, config, items
        self._mixed = MixedPrompt(prompt, config)

    def collate(self, chosen: Sequence[TokenList], k: int) -> Batch:
        """Returns the arrays `MIXED` of these lists and `CompressorItems.arrays` of R * J places."""
        R, J = self._settings.lists_per_batch, self._settings.items_per_list
        longest = self._mixed.longest_item(self._config.ks[-1])
        shape = {
            "max_item_tokens": longest,
            "tokens_per_batch": R * (self._settings.max_prefix_tokens + J * longest),
            "teacher_scores": None,
        }
        batch = collate_lists([self._as_vectors(one, k) for one in chosen], self._settings.model_copy(update=shape))
        rows = np.full((R, J), -1, np.int64)
        for slot, one in enumerate(chosen):
            rows[slot, : len(one.rows)] = one.rows
        mixed = {name: batch[source] for name, source in zip(MIXED, TEXT, strict=True)}
        return mixed | self._items.arrays(rows.reshape(-1), self._config, k)

    def _as_vectors(self, one: TokenList, k: int) -> TokenList:
        known, prefix = self._items.texts, one.tokens[: one.lengths[0]]
        texts = [known[row] for row in one.rows.tolist()] if known is not None else None
        items = self._mixed.item_ids([k] * len(one.rows), texts)
        tokens = np.concatenate([prefix, *(np.array(ids, np.int32) for ids in items)])
        # Stored scores of a teacher stand in the batch of text.
        return replace(one, tokens=tokens, lengths=[len(prefix), *map(len, items)], teacher=None)


class CompressorBatches:
    """Batches by the plan of each update, for one host; see `jaxslm.train.loop.Batches`.

    A batch has what `ranker_batches` says, with the arrays `TEXT` only where something reads text, and, unless the
    update is one on text, those of `MixedLists.collate`, "k", "align", "teach", "noise" (float32 []) and "joint" (bool
    []: whether ranker and encoder train too, a value so that one program does for both).
    """

    def __init__(
        self,
        settings: CompressorTraining,
        prompt: Prompt,
        data: TrainingData,
        mixed: MixedLists,
        *,
        parts: int,
        host: int = 0,
        hosts: int = 1,
    ) -> None:
        """Args: parts: batches of this host in one update, which have one plan."""
        self._settings, self._mixed, self._parts = settings, mixed, parts
        self._given = 0
        self._lists = ranker_batches(settings.data, prompt, host=host, hosts=hosts, data=data, collate=self._collate)

    def __next__(self) -> Batch:
        return next(self._lists)

    def get_state(self) -> dict[str, Any]:
        """Returns a small JSON-able dict for `set_state`."""
        return self._lists.get_state() | {"given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called. Raises InputError if the state is of other data or settings."""
        self._lists.set_state(state)
        self._given = state["given"]

    def query_id(self, list_id: int) -> str:
        """Returns the query id behind an entry of "list_ids"."""
        return self._lists.query_id(list_id)

    def _collate(self, chosen: Sequence[TokenList]) -> Batch:
        plan = plan_of(self._given // self._parts, self._settings)
        self._given += 1
        batch = collate_lists(chosen, self._settings.data)
        if plan.k == 0:
            return batch
        if not reads_text(self._settings):
            batch = {name: array for name, array in batch.items() if name not in TEXT}
        batch |= self._mixed.collate(chosen, plan.k)
        for name in ("k", "align", "teach", "noise"):
            batch[name] = np.array(getattr(plan, name), np.float32)
        return batch | {"joint": np.array(not plan.warm_up)}


def reads_text(settings: CompressorTraining) -> bool:
    """Whether updates on vectors read the text of their items too: for alignment, or for a teacher that runs along."""
    return settings.losses.aligns or (settings.losses.uses_teacher and settings.data.teacher_scores is None)
