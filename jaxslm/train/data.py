"""The input pipeline: from data files to batches of one static shape, the same again after any interruption.

    queries (file, hub) -> seeded order, this host's share -> list or pair by position -> packing -> batch

The order is a permutation by seed and epoch, and a list depends on its position alone. So the whole state of the
pipeline is a position and the few positions that wait to be packed; `grain`, when installed, builds lists in worker
processes without changing any batch. The tokeniser comes with the package, so a machine without `datasets` and `grain`
trains from the same local files in one process: nothing has to be tokenised beforehand.
"""

import copy
import hashlib
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.prompt import Prompt
from jaxslm.train.data_settings import MAY_CHANGE, DataSettings, PairSettings, SourceSettings
from jaxslm.train.lists import (
    ListChooser,
    RankerLists,
    TokenList,
    TokenPair,
    TokenPairs,
    read_teacher_scores,
    tell_coverage,
)
from jaxslm.train.packing import Batch, collate_lists, collate_pairs, fill
from jaxslm.train.sources import Encoder, Order, Queries, TrainingData, read_training_data

LOOKAHEAD = 8
"""Lists that wait for packing, in batches: more packs tighter and lets a list be overtaken for longer."""
BUFFER_PER_WORKER = 64
"""Lists that a worker process builds ahead."""


@runtime_checkable
class Example(Protocol):
    """What is packed: a list or a pair."""

    @property
    def position(self) -> int: ...

    @property
    def size(self) -> int: ...


ExampleT = TypeVar("ExampleT", bound=Example)
ExampleT_co = TypeVar("ExampleT_co", bound=Example, covariant=True)


@runtime_checkable
class Examples(Protocol[ExampleT_co]):
    """Examples by position; `TokenList`s or `TokenPair`s."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> ExampleT_co: ...


class BatchIterator(Iterator[Batch], Generic[ExampleT]):
    """Batches of one static shape, as dicts of numpy arrays; StopIteration after the last epoch.

    Epochs flow into one another: only the very last batches may be less than full.
    """

    def __init__(
        self,
        examples: Examples[ExampleT],
        queries: Queries,
        *,
        lookahead: int,
        select: Callable[[Sequence[int]], list[int]],
        collate: Callable[[Sequence[ExampleT]], Batch],
        workers: int,
        fingerprint: str,
    ) -> None:
        """Args: see `ranker_batches`.

        lookahead: how many examples wait. select: from their sizes, oldest first, picks those of the next batch, the
        oldest among them. collate: makes the batch. fingerprint: names the data and settings in the state.
        """
        self._examples, self._queries, self._lookahead = examples, queries, lookahead
        self._select, self._collate = select, collate
        self._workers, self._fingerprint = workers, fingerprint
        self._pending: list[ExampleT] = []
        self._upcoming: Iterator[ExampleT]
        self._stop_workers: weakref.finalize | None = None
        self._start(0)

    def __next__(self) -> Batch:
        while len(self._pending) < self._lookahead:
            example = next(self._upcoming, None)
            if example is None:
                break
            self._pending.append(example)
            self._position += 1
        if not self._pending:
            raise StopIteration
        chosen = self._select([example.size for example in self._pending])
        batch = [self._pending[place] for place in chosen]
        self._pending = [example for place, example in enumerate(self._pending) if place not in set(chosen)]
        return self._collate(batch)

    def get_state(self) -> dict[str, Any]:
        """Returns a small JSON-able dict: `set_state` of it goes on with the batch that would have come next."""
        pending = [example.position for example in self._pending]
        return {"position": self._position, "pending": pending, "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called, in this or another process.

        `workers`, `epochs` and the paths of the data and of stored teacher scores may have changed since; nothing else
        may.

        Raises:
            InputError: the state is of other data, settings, prompt or number of hosts.
        """
        if state["fingerprint"] != self._fingerprint:
            raise InputError(
                "training data: items, queries, teacher scores, settings, prompt or hosts differ from the saved run's"
            )
        self._pending = [self._examples[position] for position in state["pending"]]
        self._start(state["position"])

    def query_id(self, list_id: int) -> str:
        """Returns the query id behind an entry of "list_ids", for error reports."""
        return self._queries[list_id].query_id

    def close(self) -> None:
        """Ends the worker processes, if there are any; no batches after it. The end of the program does it too."""
        if self._stop_workers:
            self._stop_workers()

    def _start(self, position: int) -> None:
        self.close()
        self._position = position
        if self._workers:
            processes = _Processes(self._examples, position, self._workers)
            self._upcoming, self._stop_workers = processes, weakref.finalize(self, processes.stop)
        else:
            self._upcoming = (self._examples[place] for place in range(position, len(self._examples)))


class PromptEncoder(Encoder):
    """Prefixes and items as `Prompt.encode` makes them where an item has room for `max_item_tokens`."""

    def __init__(self, settings: DataSettings, prompt: Prompt) -> None:
        self._longest_prefix, self._prompt = settings.max_prefix_tokens, prompt
        longest_row = settings.max_prefix_tokens + settings.max_item_tokens
        if prompt.config.max_tokens < longest_row:
            raise InputError(
                f"prompt max_tokens {prompt.config.max_tokens}: less than max_prefix_tokens + max_item_tokens ="
                f" {longest_row}"
            )
        # The prompt cuts whole rows: rows of this query are as long as leaves an item that room.
        self._query = "any"
        row = len(prompt.encode(self._query, ["any"]).prefix_ids) + settings.max_item_tokens
        self._item_prompt = copy.copy(prompt)
        self._item_prompt.config = prompt.config.model_copy(update={"max_tokens": row})
        try:
            self._item_prompt.encode(self._query, ["any"])
        except InputError:
            fixed = len(prompt.suffix_ids)
            raise InputError(
                f"max_item_tokens {settings.max_item_tokens}: leaves no room for text beside the {fixed} tokens of the"
                " prompt's suffix"
            ) from None

    def items(self, items: Sequence[Item]) -> list[list[int]]:
        return self._item_prompt.encode(self._query, items).item_ids

    def query(self, text: str) -> list[int]:
        return _short_enough(self._prompt.encode_query(text), self._longest_prefix)


class PairEncoder(Encoder):
    """Prefixes as `Prompt.encode` makes them, and items as it does, without the suffix."""

    def __init__(self, settings: PairSettings, prompt: Prompt) -> None:
        self._settings, self._prompt = settings, prompt

    def items(self, items: Sequence[Item]) -> list[list[int]]:
        encoded = self._prompt.encode("any", items, self._settings.max_item_tokens - ROOM_AFTER_ITEM)
        return [ids[: -len(self._prompt.suffix_ids)] for ids in encoded.item_ids]

    def query(self, text: str) -> list[int]:
        return _short_enough(self._prompt.encode_query(text), self._settings.max_prefix_tokens)


ROOM_AFTER_ITEM = 1
"""Tokens that a prompt may have between an item's text and its suffix: a newline at most."""


def _short_enough(prefix_ids: list[int], longest: int) -> list[int]:
    if len(prefix_ids) > longest:
        raise InputError(f"{len(prefix_ids)} tokens with the prompt's words, max_prefix_tokens is {longest}")
    return prefix_ids


def ranker_data(settings: DataSettings, prompt: Prompt) -> TrainingData:
    """Returns what `ranker_batches` draws from; raises InputError as it does."""
    return read_training_data(settings, PromptEncoder(settings, prompt))


def ranker_batches(
    settings: DataSettings,
    prompt: Prompt,
    *,
    host: int = 0,
    hosts: int = 1,
    data: TrainingData | None = None,
    collate: Callable[[Sequence[TokenList]], Batch] | None = None,
) -> BatchIterator[TokenList]:
    """Returns this host's lists for training a ranker, packed flat as `SharedPrefix(prefix, items, M)` reads them.

    A batch is {"tokens": int32 [M], "prefix": int32 [R, P], "items": int32 [R, J, T], "labels": float32 [R, J],
    "valid": bool [R, J], "list_ids": int32 [R]}. `prefix` and `items` are indices into the tokens, M where there is
    none; `list_ids` are places in the queries file, -1 in an empty slot; R is the most lists, fewer when M is full.
    With stored teacher scores also "teacher": float32 [R, J], log-odds, NaN where the teacher gave none. A row's ids
    equal those of `Prompt.encode` at a row length that leaves an item `max_item_tokens`.

    Args:
        data: `ranker_data` of the settings, where it has been read already.
        collate: makes a batch of lists in place of the one described; it must keep "list_ids".

    Raises:
        InputError: data that cannot be read or breaks a rule (`read_training_data`), a query longer than
            `max_prefix_tokens`, shapes that the prompt cannot fill, stored teacher scores of none of the judged pairs.
    """
    data = ranker_data(settings, prompt) if data is None else data
    teacher = None
    if settings.teacher_requests is not None and settings.teacher_scores is not None:
        teacher = read_teacher_scores(Path(settings.teacher_requests), Path(settings.teacher_scores))
        tell_coverage(teacher, settings, host)
    scores = "" if teacher is None else hashlib.sha256(repr(teacher).encode()).hexdigest()
    order = Order(settings, len(data.queries), host, hosts)
    choose = ListChooser(settings, data.catalogue, data.judged_rows)
    return BatchIterator(
        RankerLists(data.queries, data.catalogue, order, choose, teacher),
        data.queries,
        lookahead=LOOKAHEAD * settings.lists_per_batch,
        select=lambda sizes: fill(sizes, settings.tokens_per_batch, settings.lists_per_batch),
        collate=collate or (lambda chosen: collate_lists(chosen, settings)),
        workers=settings.workers,
        fingerprint=_fingerprint(settings, data.sha256 + prompt.sha256 + scores, host, hosts),
    )


def pair_batches(settings: PairSettings, prompt: Prompt, *, host: int = 0, hosts: int = 1) -> BatchIterator[TokenPair]:
    """Returns this host's pairs for contrastive training, packed flat as `SharedPrefix(prefix, items, M)` reads them.

    A batch is {"tokens": int32 [M], "prefix": int32 [B, P], "items": int32 [B, 1, T], "item_rows": int32 [B],
    "positive": bool [B, B], "list_ids": int32 [B]}. The prefix of row i is the query of pair i, but the item behind it
    is another pair's: that of pair i stands in row `item_rows[i]`. So an item's states are trained to say the same
    behind any query, as a ranker will read it, and its own query can give nothing away.
    `positive[i, j]`: the item of pair j has a label above 0 for query i, so it is no negative. Its diagonal is False,
    and nothing is learnt, where a query has no such item or there is no pair (`list_ids` -1).

    Raises:
        InputError: data that cannot be read or breaks a rule (`read_training_data`), a query longer than
            `max_prefix_tokens`.
    """
    data = read_training_data(settings, PairEncoder(settings, prompt))
    order = Order(settings, len(data.queries), host, hosts)
    return BatchIterator(
        TokenPairs(data.queries, data.catalogue, order),
        data.queries,
        lookahead=LOOKAHEAD * settings.pairs_per_batch,
        select=lambda sizes: fill(sizes, settings.tokens_per_batch, settings.pairs_per_batch),
        collate=lambda chosen: collate_pairs(chosen, settings),
        workers=settings.workers,
        fingerprint=_fingerprint(settings, data.sha256 + prompt.sha256, host, hosts),
    )


class _From(Generic[ExampleT]):
    """Examples from a position on, as the random-access source that grain reads."""

    def __init__(self, examples: Examples[ExampleT], start: int) -> None:
        self._examples, self._start = examples, start

    def __len__(self) -> int:
        return max(0, len(self._examples) - self._start)

    def __getitem__(self, place: int) -> np.ndarray:
        # grain hands arrays over in shared memory. What it has to pickle itself fills its pipe, and a worker that waits
        # for a full pipe does not end for half a minute.
        return np.frombuffer(pickle.dumps(self._examples[self._start + place]), np.uint8)


class _Processes(Iterator[ExampleT]):
    """The examples from `start` on, in order, built by grain in worker processes."""

    def __init__(self, examples: Examples[ExampleT], start: int, workers: int) -> None:
        try:
            import grain
            from absl import flags
        except ModuleNotFoundError:
            raise InputError("workers: more than 0 needs the package `grain` (pip install 'jaxslm[train]')") from None
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads a flag of its own and fails in programs that parse none
        # The default options read with 16 threads, which is ten times slower for sources in memory.
        in_process = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=BUFFER_PER_WORKER)
        dataset = grain.MapDataset.source(_From(examples, start)).to_iter_dataset(in_process).mp_prefetch(processes)
        self._iterator: Any = iter(dataset)

    def __next__(self) -> ExampleT:
        example: ExampleT = pickle.loads(next(self._iterator))
        return example

    def stop(self) -> None:
        """Ends the processes and lets go of grain's iterator, which must not outlive the program's modules."""
        self._iterator.close()
        self._iterator = iter(())


def _fingerprint(settings: SourceSettings, data: str, host: int, hosts: int) -> str:
    """Hash of all that decides which batches come in which order; not of what `MAY_CHANGE`."""
    parts = (settings.model_dump_json(exclude=set(MAY_CHANGE)), data, host, hosts)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
