"""From a catalogue to the item store: an item is encoded once, and again only when its text or a model changes.

Items are collected by length until they fill one pass of the encoder, so that passes are full and have little padding
whatever the order of the catalogue. Memory is bounded by these collections, whatever its size (checking a file takes 8
bytes an item more). What is in the store when a run stops is not computed again by the next one.
"""

import hashlib
import json
import re
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float

from jaxslm.data_files import Item, read_records
from jaxslm.errors import InputError
from jaxslm.items.record import (
    CorruptRecord,
    Record,
    RecordHeader,
    RecordIdentity,
    StaleRecord,
    StorageDtype,
    pack_record,
    read_header,
)
from jaxslm.items.store import Store, open_store, required_key_of
from jaxslm.progress import console, progress

DEFAULT_K = 8
_ITEMS_AT_ONCE = 256
_RECORDS_PER_PUT = 256
_REASONS_KEPT = 50

Result = TypeVar("Result")


@runtime_checkable
class ItemEncoder(Protocol):
    """What makes vectors of items; `jaxslm.compress.encoder.load_encoder` returns one."""

    @property
    def identity(self) -> RecordIdentity:
        """What its vectors are valid for."""
        ...

    @property
    def ks(self) -> Sequence[int]:
        """How many vectors an item may become."""
        ...

    def token_counts(self, items: Sequence[Item]) -> list[int]:
        """Returns the number of tokens of each item. Raises InputError if one cannot be encoded."""
        ...

    def pass_shape(self, tokens: int) -> tuple[int, int]:
        """Returns (rows, length) of the pass that encodes an item of so many tokens; items of one shape share it."""
        ...

    def encode_all(self, items: Sequence[Item]) -> Mapping[int, Float[np.ndarray, "B C D"]]:
        """Returns k vectors per item, float32, for every k. Raises InputError if an item cannot be encoded."""
        ...


@dataclass
class Summary:
    """What a run did.

    Attributes:
        encoded, unchanged, failed: numbers of items; their sum is what was read.
        reasons: why items failed: reason -> (number of items, id of the first).
        bytes: written to the store, without the store's own overhead.
    """

    encoded: int = 0
    unchanged: int = 0
    failed: int = 0
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0

    def fail(self, item: Item, error: InputError) -> None:
        """Counts an item that cannot be encoded."""
        self.failed += 1
        reason = re.sub(r"^item \d+: ", "", str(error))  # its number within a batch
        if reason not in self.reasons and len(self.reasons) >= _REASONS_KEPT:
            reason = "other reasons"
        count, first = self.reasons.get(reason, (0, item.id))
        self.reasons[reason] = (count + 1, first)

    @property
    def done(self) -> int:
        """Number of items that need no more work."""
        return self.encoded + self.unchanged + self.failed

    def to_json(self) -> dict[str, Any]:
        """Returns the last line of `jaxslm encode`."""
        reasons = [{"reason": why, "items": n, "first_id": first} for why, (n, first) in self.reasons.items()]
        return {
            "encoded": self.encoded,
            "unchanged": self.unchanged,
            "failed": self.failed,
            "reasons": reasons,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "items_per_s": round(self.encoded / self.seconds, 2) if self.seconds else 0.0,
        }


def encode_file(
    model: Path, items: Path, store_urls: Mapping[int, str] | str, *, dtype: StorageDtype
) -> dict[str, Any]:
    """Encodes the items of a file into a store for each k; returns `Summary.to_json` and the stores' names.

    The whole file is checked before the model loads, and both before a store is made.

    Args:
        store_urls: by k; or one, for the largest k up to `DEFAULT_K` that the compressor was trained for.

    Raises:
        InputError: a line breaks the schema, an id repeats, the compressor was not trained for a k, or the checkpoint
            or the store's URL breaks a rule.
        StoreUnavailable: the store cannot be opened or fails; what was stored before stays.
    """
    total = check_items(items)
    from jaxslm.compress.encoder import load_encoder

    encoder = load_encoder(model)
    if isinstance(store_urls, str):
        store_urls = {max((k for k in encoder.ks if k <= DEFAULT_K), default=min(encoder.ks)): store_urls}
    _check_ks(store_urls, encoder)
    with ExitStack() as stack:
        stores = {k: stack.enter_context(open_store(url)) for k, url in store_urls.items()}
        start = time.perf_counter()
        with progress() as bar:
            task = bar.add_task("encoding items", total=total)

            def show(summary: Summary) -> None:
                rate = summary.encoded / (time.perf_counter() - start)
                bar.update(task, completed=summary.done, description=f"encoding items, {rate:.1f}/s")

            records = read_records(items, Item)
            summary = encode_catalogue(encoder, records, stores, dtype=dtype, on_progress=show)
        for reason, (count, first) in summary.reasons.items():
            console().print(f"{count} of {total} items failed, {first!r} first: {reason}", markup=False)
        return summary.to_json() | {"stores": {str(k): store.url for k, store in stores.items()}}


def check_items(path: Path) -> int:
    """Returns the number of items of a file. Raises InputError as `read_records`, and on a repeated id."""
    hashes = array("q", (hash(item.id) for item in read_records(path, Item)))
    ordered = np.sort(np.frombuffer(hashes, np.int64))
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen = set()
    for item in read_records(path, Item) if suspects else ():
        if item.id in seen:
            raise InputError(f"{path}: item id {item.id!r} appears twice")
        if hash(item.id) in suspects:
            seen.add(item.id)
    return len(hashes)


def encode_catalogue(
    encoder: ItemEncoder,
    items: Iterable[Item],
    stores: Mapping[int, Store],
    *,
    dtype: StorageDtype,
    on_progress: Callable[[Summary], None] | None = None,
) -> Summary:
    """Encodes the items that a store does not have yet and keeps them there; returns what was done.

    An item that cannot be encoded is counted with its reason and left out; what the store has under its id stays, and
    a reader finds it stale if it is. Of items that the store has already the time to live begins anew.

    Args:
        items: ids must not repeat (`check_items`): of two texts under one id either may stay.
        stores: a store for each k that is wanted. One pass of the encoder serves all.
        on_progress: is called with what was done so far, after each pass of the encoder at least.

    Raises:
        InputError: the encoder was not trained for this k.
        StoreUnavailable: the store fails; what was stored before stays.
    """
    _check_ks(stores, encoder)
    run = _Run(encoder, stores, dtype, on_progress or (lambda summary: None))
    start = time.perf_counter()
    stream = iter(items)
    while chunk := list(islice(stream, _ITEMS_AT_ONCE)):
        run.add(chunk)
    run.finish()
    run.summary.seconds = time.perf_counter() - start
    return run.summary


def _check_ks(ks: Iterable[int], encoder: ItemEncoder) -> None:
    for k in ks:
        if k not in encoder.ks:
            raise InputError(f"k = {k}: this compressor was trained for {', '.join(map(str, encoder.ks))}")


def source_sha256(item: Item) -> str:
    """Returns the hash of what an encoder reads of an item: its title and its text."""
    return hashlib.sha256(json.dumps([item.title, item.text]).encode()).hexdigest()


class _Run:
    """Items on their way: collected by shape until a pass is full, then as records until a transaction is."""

    def __init__(
        self,
        encoder: ItemEncoder,
        stores: Mapping[int, Store],
        dtype: StorageDtype,
        on_progress: Callable[[Summary], None],
    ) -> None:
        self._encoder, self._stores, self._dtype = encoder, stores, dtype
        self._on_progress = on_progress
        self._waiting: dict[tuple[int, int], list[Item]] = {}
        self._records: dict[str, dict[int, bytes]] = {}
        self.summary = Summary()

    def add(self, items: Sequence[Item]) -> None:
        """Takes items in; encodes what fills a pass."""
        outdated = self._outdated(items)
        self._on_progress(self.summary)
        for item, tokens in self._each(outdated, self._encoder.token_counts):
            shape = self._encoder.pass_shape(tokens)
            self._waiting.setdefault(shape, []).append(item)
            if len(self._waiting[shape]) == shape[0]:
                self._encode(self._waiting.pop(shape))

    def finish(self) -> None:
        """Encodes what still waits and stores it."""
        for items in self._waiting.values():
            self._encode(items)
        self._waiting.clear()
        self._put()

    def _outdated(self, items: Sequence[Item]) -> list[Item]:
        """Returns the items that must be encoded; counts the others."""
        found, ids = [], [item.id for item in items]
        for store in self._stores.values():
            store.renew(ids)  # before it is asked, so that nothing that counts as unchanged expires meanwhile
        stored = {k: store.get(ids) for k, store in self._stores.items()}
        for number, item in enumerate(items):
            if all(self._is_current(stored[k][number], item, k) for k in stored):
                self.summary.unchanged += 1
                continue
            try:
                required_key_of(item.id)
                found.append(item)
            except InputError as error:
                self.summary.fail(item, error)
        return found

    def _is_current(self, data: bytes | None, item: Item, k: int) -> bool:
        if data is None:
            return False
        try:
            header = read_header(data)
        except (CorruptRecord, StaleRecord):
            return False
        current = RecordHeader(self._encoder.identity, source_sha256(item), self._dtype, k, header.width)
        return header == current

    def _encode(self, items: Sequence[Item]) -> None:
        for item, vectors in self._each(items, self._vectors):
            source = source_sha256(item)
            try:
                records = {
                    k: pack_record(Record(self._encoder.identity, each, source), self._dtype)
                    for k, each in vectors.items()
                }
            except InputError as error:
                self.summary.fail(item, error)
                continue
            self._records[item.id] = records
            self.summary.encoded += 1
            self.summary.bytes += sum(map(len, records.values()))
        if len(self._records) >= _RECORDS_PER_PUT:
            self._put()
        self._on_progress(self.summary)

    def _vectors(self, items: Sequence[Item]) -> list[dict[int, np.ndarray]]:
        """Returns the vectors of each item by k."""
        vectors = self._encoder.encode_all(items)
        return [{k: vectors[k][number] for k in self._stores} for number in range(len(items))]

    def _put(self) -> None:
        for k, store in self._stores.items():
            store.put({item_id: records[k] for item_id, records in self._records.items()})
        self._records = {}

    def _each(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Iterable[Result]]
    ) -> list[tuple[Item, Result]]:
        """Returns items with what `work` returns for them; those that fail are found by halving, and counted."""
        if not items:
            return []
        try:
            return list(zip(items, work(items), strict=True))
        except InputError as error:
            if len(items) == 1:
                self.summary.fail(items[0], error)
                return []
        half = len(items) // 2
        return self._each(items[:half], work) + self._each(items[half:], work)
