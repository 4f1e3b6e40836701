"""Where training queries and items come from: local files or Hugging Face `datasets`, as token ids, in seeded order."""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from jaxslm.data_files import Item, Query, read_records
from jaxslm.errors import InputError
from jaxslm.train.data_settings import SourceSettings

HUB = "hf://"
ITEMS_PER_CALL = 1024

Record = TypeVar("Record", bound=BaseModel)
EncodeItems = Callable[[Sequence[Item]], list[list[int]]]
EncodeQuery = Callable[[str], list[int]]


@dataclass(frozen=True)
class EncodedQuery:
    """A query and its judgements, ready for lists.

    Attributes:
        tokens: int32, what `EncodeQuery` made of the text.
        rows: int32, its judged items as rows of the catalogue. labels: float32, theirs.
    """

    query_id: str
    text: str
    tokens: np.ndarray
    rows: np.ndarray
    labels: np.ndarray


class Catalogue:
    """All items, tokenised once; an item is known by its row, in file order."""

    def __init__(self, items: dict[str, Item], encode: EncodeItems) -> None:
        self.items = items
        self.row_of = {item_id: row for row, item_id in enumerate(items)}
        rows = []
        for start in range(0, len(items), ITEMS_PER_CALL):
            rows += _encode_named(list(itertools.islice(items.values(), start, start + ITEMS_PER_CALL)), encode)
        self._ends = np.cumsum([len(row) for row in rows])
        self._flat = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(self._ends[-1]))

    def __len__(self) -> int:
        return len(self._ends)

    def tokens(self, row: int) -> np.ndarray:
        """The token ids of an item, int32."""
        return self._flat[self._ends[row - 1] if row else 0 : self._ends[row]]


class Queries(Protocol):
    """Queries by their index in the file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> EncodedQuery: ...


class StreamedQueries:
    """Queries that are read when they are wanted: one window of neighbours is in memory, and going back reads anew."""

    def __init__(self, settings: SourceSettings, length: int, encode: Callable[[Query], EncodedQuery]) -> None:
        self._settings, self._length, self._encode = settings, length, encode
        self._rows: Iterator[Query] | None = None
        self._window = -1
        self._held: list[Query] = []

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> EncodedQuery:
        window, offset = divmod(index, self._settings.shuffle_window)
        if self._rows is None or window < self._window:
            self._rows, self._window = read_source(self._settings.queries, Query, streaming=True), -1
        while self._window < window:
            self._held = list(itertools.islice(self._rows, self._settings.shuffle_window))
            self._window += 1
        if offset >= len(self._held):
            raise InputError(f"{self._settings.queries}: has changed since training began: query {index} is gone")
        return self._encode(self._held[offset])

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_rows": None, "_window": -1, "_held": []}


class Order:
    """Which query stands where: positions of one host, counted over all epochs -> (epoch, index in the file).

    Every epoch is a new permutation of windows' insides (one window = all queries, unless streaming); host h of n takes
    its places h, h + n, ... so that hosts share no query and leave out none.
    """

    def __init__(self, settings: SourceSettings, length: int, host: int, hosts: int) -> None:
        if not 0 <= host < hosts:
            raise InputError(f"host {host}: must be 0..{hosts - 1}")
        if length < hosts:
            raise InputError(f"{settings.queries}: {length} queries are too few for {hosts} hosts")
        self._seed, self._length, self._host, self._hosts = settings.seed, length, host, hosts
        self._window = settings.shuffle_window if settings.streaming else length
        self._per_epoch = len(range(host, length, hosts))
        self._epochs = settings.epochs
        self._held: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return sys.maxsize if self._epochs is None else self._epochs * self._per_epoch

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self._per_epoch)
        window, place = divmod(offset * self._hosts + self._host, self._window)
        if self._held is None or self._held[0] != (epoch, window):
            size = min(self._window, self._length - window * self._window)
            shuffled = np.random.default_rng([0, self._seed, epoch, window]).permutation(size)
            self._held = ((epoch, window), shuffled)
        return epoch, window * self._window + int(self._held[1][place])

    def generator(self, epoch: int, index: int) -> np.random.Generator:
        """The random numbers of one query in one epoch; the same on every host."""
        return np.random.default_rng([1, self._seed, epoch, index])


def read_source(where: str, kind: type[Record], *, streaming: bool) -> Iterator[Record]:
    """Yields the records of a local file or of `hf://owner/name/split`, each checked against `kind`.

    Local files are read by `jaxslm.data_files`, record by record; only hub names need the package `datasets`, which
    downloads and caches the whole split unless streaming.

    Raises:
        InputError: as `read_records`; a hub name that is not of that form, cannot be found, or `datasets` is absent.
    """
    if not where.startswith(HUB):
        yield from read_records(Path(where), kind)
        return
    owner_and_name, _, split = where.removeprefix(HUB).rpartition("/")
    if owner_and_name.count("/") != 1 or not split:
        raise InputError(f"{where}: must be hf://owner/name/split")
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError(f"{where}: needs the package `datasets` (pip install 'jaxslm[train]')") from None
    try:
        rows = datasets.load_dataset(owner_and_name, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{where}: cannot be loaded ({str(error).splitlines()[0]})") from error
    for number, row in enumerate(rows, start=1):
        try:
            yield kind.model_validate({key: value for key, value in row.items() if value is not None})
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False)[0]
            field = ".".join(str(part) for part in problem["loc"])
            raise InputError(f"{where}: row {number}: {field}: {problem['msg']}") from None


def read_catalogue(settings: SourceSettings, encode: EncodeItems) -> Catalogue:
    """Returns all items. Raises InputError as `read_source`, and on repeated ids or an item without text."""
    items: dict[str, Item] = {}
    for item in read_source(settings.items, Item, streaming=settings.streaming):
        if item.id in items:
            raise InputError(f"{settings.items}: item id {item.id!r} appears twice")
        items[item.id] = item
    if not items:
        raise InputError(f"{settings.items}: holds no records")
    return Catalogue(items, encode)


def read_training_queries(
    settings: SourceSettings, catalogue: Catalogue, encode: EncodeQuery
) -> tuple[Queries, np.ndarray]:
    """Returns the queries and the catalogue rows that any of them judges, int32, ascending.

    Reads the whole file once, also when streaming, so that ids and labels are known to be good before training
    begins; when streaming it keeps only the ids, and queries are tokenised (and found too long) as they are used.

    Raises:
        InputError: as `read_source`; a repeated query id, an unknown item id, or what `encode` raises.
    """

    def encoded(query: Query) -> EncodedQuery:
        rows = np.array([catalogue.row_of[judged.id] for judged in query.items], np.int32)
        labels = np.array([judged.label for judged in query.items], np.float32)
        try:
            tokens = np.array(encode(query.query), np.int32)
        except InputError as error:
            raise InputError(f"{settings.queries}: query {query.query_id!r}: {error}") from None
        return EncodedQuery(query.query_id, query.query, tokens, rows, labels)

    ids: set[str] = set()
    kept: list[EncodedQuery] = []
    judged_rows = np.zeros(len(catalogue), bool)
    for query in read_source(settings.queries, Query, streaming=settings.streaming):
        if query.query_id in ids:
            raise InputError(f"{settings.queries}: query id {query.query_id!r} appears twice")
        ids.add(query.query_id)
        for judged in query.items:
            if judged.id not in catalogue.row_of:
                raise InputError(
                    f"{settings.queries}: query {query.query_id!r}: item {judged.id!r} is not in {settings.items}"
                )
            judged_rows[catalogue.row_of[judged.id]] = True
        if not settings.streaming:
            kept.append(encoded(query))
    if not ids:
        raise InputError(f"{settings.queries}: holds no records")
    queries = StreamedQueries(settings, len(ids), encoded) if settings.streaming else kept
    return queries, np.flatnonzero(judged_rows).astype(np.int32)


def _encode_named(items: Sequence[Item], encode: EncodeItems) -> list[list[int]]:
    """Encodes items; an error names the item's id in place of its number in the call."""
    try:
        return encode(items)
    except InputError:
        for item in items:
            try:
                encode([item])
            except InputError as error:
                raise InputError(f"item {item.id!r}: {str(error).removeprefix('item 0: ')}") from None
        raise
