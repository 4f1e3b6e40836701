"""From a catalogue to the item store: an item is encoded once, and again only when its text or a model changes.

Memory is bounded by two windows of items with their vectors, whatever the size of the catalogue (checking a file takes
8 bytes an item more). What is in the store when a run stops is not computed again by the next one.
"""

import hashlib
import json
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

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

_RECORDS_PER_PUT = 256
_IDS_PER_GET = 512
_REASONS_KEPT = 50


class ItemEncoder(Protocol):
    """What makes vectors of items; `jaxslm.compress.encoder.load_encoder` returns one."""

    @property
    def identity(self) -> RecordIdentity:
        """What its vectors are valid for."""
        ...

    def token_counts(self, items: Sequence[Item]) -> list[int]:
        """Returns how many tokens it reads of each item. Raises InputError if one cannot be encoded."""
        ...

    def encode(self, items: Sequence[Item], k: int) -> Float[np.ndarray, "B C D"]:
        """Returns k vectors per item, float32. Raises InputError if one cannot be encoded."""
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
        reason = str(error)
        if reason not in self.reasons and len(self.reasons) >= _REASONS_KEPT:
            reason = "other reasons"
        count, first = self.reasons.get(reason, (0, item.id))
        self.reasons[reason] = (count + 1, first)

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


def encode_file(model: Path, items: Path, store_url: str, *, k: int, dtype: StorageDtype) -> dict[str, Any]:
    """Encodes the items of a file into a store; returns `Summary.to_json` and the store's name.

    The whole file is checked before the model loads.

    Raises:
        InputError: a line breaks the schema, an id repeats, or the checkpoint or the store's URL breaks a rule.
        StoreUnavailable: the store cannot be opened or fails; what was stored before stays.
    """
    total = check_items(items)
    with open_store(store_url) as store:
        from jaxslm.compress.encoder import load_encoder

        encoder = load_encoder(model)
        summary = encode_catalogue(encoder, read_records(items, Item), store, k=k, dtype=dtype, total=total)
        for reason, (count, first) in summary.reasons.items():
            console().print(f"{count} of {total} items failed, {first!r} first: {reason}", markup=False)
        return summary.to_json() | {"store": store.url}


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
    store: Store,
    *,
    k: int,
    dtype: StorageDtype,
    batch_tokens: int = 16384,
    window: int = 4096,
    total: int | None = None,
) -> Summary:
    """Encodes the items that the store does not have yet and keeps them there; returns what was done.

    An item that cannot be encoded is counted with its reason and left out; what the store has under its id stays, and
    a reader finds it stale if it is.

    Args:
        items: ids must not repeat (`check_items`): of two texts under one id either may stay.
        batch_tokens: most tokens of a batch, padding included; an item that is longer makes a batch of its own.
        window: number of items that are sorted by length together.
        total: number of items, for the progress bar.

    Raises:
        StoreUnavailable: the store fails; what was stored before stays.
    """
    run = _Run(encoder, store, k, dtype, batch_tokens)
    start = time.perf_counter()
    stream = iter(items)
    outdated: list[Item] = []
    with progress() as bar:
        task = bar.add_task("encoding items", total=total)

        def show() -> None:
            done = run.summary.encoded + run.summary.unchanged + run.summary.failed
            rate = run.summary.encoded / (time.perf_counter() - start)
            bar.update(task, completed=done, description=f"encoding items, {rate:.0f}/s")

        while chunk := list(islice(stream, window)):
            outdated += run.outdated(chunk)
            show()
            if len(outdated) >= window:
                for _ in run.encode(outdated):
                    show()
                outdated = []
        for _ in run.encode(outdated):
            show()
    run.summary.seconds = time.perf_counter() - start
    return run.summary


def source_sha256(item: Item) -> str:
    """Returns the hash of what an encoder reads of an item: its title and its text."""
    return hashlib.sha256(json.dumps([item.title, item.text]).encode()).hexdigest()


@dataclass
class _Run:
    encoder: ItemEncoder
    store: Store
    k: int
    dtype: StorageDtype
    batch_tokens: int
    summary: Summary = field(default_factory=Summary)

    def outdated(self, items: Sequence[Item]) -> list[Item]:
        """Returns the items that must be encoded; counts the others."""
        found: list[Item] = []
        for start in range(0, len(items), _IDS_PER_GET):
            some = items[start : start + _IDS_PER_GET]
            for item, data in zip(some, self.store.get([item.id for item in some]), strict=True):
                if data is not None and self._is_current(data, item):
                    self.summary.unchanged += 1
                else:
                    found.append(item)
        return found

    def encode(self, items: Sequence[Item]) -> Iterator[None]:
        """Encodes and stores items, longest first; yields after each batch."""
        by_length = sorted(self._token_counts(items), key=lambda pair: -pair[1])
        records: dict[str, bytes] = {}
        for batch in _batches(by_length, self.batch_tokens):
            for item, vectors in self._encode_batch(batch):
                try:
                    required_key_of(item.id)
                    record = Record(self.encoder.identity, vectors, source_sha256(item))
                    records[item.id] = pack_record(record, self.dtype)
                except InputError as error:
                    self.summary.fail(item, error)
            if len(records) >= _RECORDS_PER_PUT:
                self._put(records)
                records = {}
            yield
        self._put(records)
        yield

    def _is_current(self, data: bytes, item: Item) -> bool:
        try:
            header = read_header(data)
        except (CorruptRecord, StaleRecord):
            return False
        return header == RecordHeader(self.encoder.identity, source_sha256(item), self.dtype, self.k, header.width)

    def _token_counts(self, items: Sequence[Item]) -> list[tuple[Item, int]]:
        """Returns the items that can be encoded with their lengths; counts the others."""
        try:
            return list(zip(items, self.encoder.token_counts(items), strict=True)) if items else []
        except InputError as error:
            if len(items) == 1:
                self.summary.fail(items[0], error)
                return []
        half = len(items) // 2
        return self._token_counts(items[:half]) + self._token_counts(items[half:])

    def _encode_batch(self, items: Sequence[Item]) -> list[tuple[Item, np.ndarray]]:
        """Returns the items that can be encoded with their vectors; counts the others."""
        try:
            return list(zip(items, self.encoder.encode(items, self.k), strict=True))
        except InputError as error:
            if len(items) == 1:
                self.summary.fail(items[0], error)
                return []
        half = len(items) // 2
        return self._encode_batch(items[:half]) + self._encode_batch(items[half:])

    def _put(self, records: dict[str, bytes]) -> None:
        if records:
            self.store.put(records)
            self.summary.encoded += len(records)
            self.summary.bytes += sum(map(len, records.values()))


def _batches(items: Sequence[tuple[Item, int]], batch_tokens: int) -> Iterator[list[Item]]:
    """Cuts items, longest first, into batches of at most `batch_tokens` with padding, and of one item at least."""
    start = 0
    while start < len(items):
        longest = items[start][1]
        end = start + max(1, batch_tokens // max(1, longest))
        yield [item for item, _ in items[start:end]]
        start = end
