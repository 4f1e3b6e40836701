"""Where training queries and items come from: local files or Hugging Face `datasets`, as token ids, in seeded order."""

import hashlib
import itertools
import logging
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from jaxslm.data_files import Item, Query, items_by_id, read_records, with_item_id
from jaxslm.errors import InputError
from jaxslm.train.data_settings import SourceSettings

HUB = "hf://"
_HUB_ID = re.compile(r"[\w-]+(/[\w.-]+)?/[\w-]+")
ITEMS_PER_CALL = 1024

Record = TypeVar("Record", bound=BaseModel)


class Encoder(ABC):
    """Makes token ids of texts. Goes to worker processes, so it can be pickled."""

    @abstractmethod
    def items(self, items: Sequence[Item]) -> list[list[int]]:
        """Token ids of each item. Raises InputError that begins with "item N: " for an item without text."""

    @abstractmethod
    def query(self, text: str) -> list[int]:
        """Token ids of a query. Raises InputError if it cannot be used."""


@dataclass(frozen=True)
class EncodedQuery:
    """A query and its judgements, ready for lists.

    Attributes:
        tokens: int32, the text as the encoder made it.
        rows: int32, its judged items as rows of the catalogue. labels: float32, theirs.
    """

    query_id: str
    text: str
    tokens: np.ndarray
    rows: np.ndarray
    labels: np.ndarray


class Catalogue:
    """All items, tokenised once; an item is known by its row, in file order. `flat`: their tokens end to end, int32."""

    def __init__(self, items: dict[str, Item], encoder: Encoder) -> None:
        self.items = items
        self.row_of = {item_id: row for row, item_id in enumerate(items)}
        rows = []
        for start in range(0, len(items), ITEMS_PER_CALL):
            rows += _encode_named(list(itertools.islice(items.values(), start, start + ITEMS_PER_CALL)), encoder)
        self._ends = np.cumsum([len(row) for row in rows])
        self.flat = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(self._ends[-1]))

    def __len__(self) -> int:
        return len(self._ends)

    def tokens(self, row: int) -> np.ndarray:
        """The token ids of an item, int32."""
        return self.flat[self._ends[row - 1] if row else 0 : self._ends[row]]


def encode_query(query: Query, catalogue: Catalogue, encoder: Encoder, where: str) -> EncodedQuery:
    """Returns a query ready for lists; an InputError of the encoder gets the file and the query's id in front."""
    rows = np.array([catalogue.row_of[judged.id] for judged in query.items], np.int32)
    labels = np.array([judged.label for judged in query.items], np.float32)
    try:
        tokens = np.array(encoder.query(query.query), np.int32)
    except InputError as error:
        raise InputError(f"{where}: query {query.query_id!r}: {error}") from None
    return EncodedQuery(query.query_id, query.query, tokens, rows, labels)


class StreamedQueries:
    """Queries that are read when they are wanted: one window of neighbours is in memory, and going back reads anew."""

    def __init__(self, settings: SourceSettings, length: int, catalogue: Catalogue, encoder: Encoder) -> None:
        self._settings, self._length, self._catalogue, self._encoder = settings, length, catalogue, encoder
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
        return encode_query(self._held[offset], self._catalogue, self._encoder, self._settings.queries)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_rows": None, "_window": -1, "_held": []}


Queries = list[EncodedQuery] | StreamedQueries
"""Queries by their index in the file."""


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
        if _HUB_ID.fullmatch(where) and not Path(where).exists():
            raise InputError(f"{where}: no such file; a split of a hub data set is hf://owner/name/split")
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
        with _quiet("huggingface_hub", "datasets"):
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


@contextmanager
def _quiet(*libraries: str) -> Iterator[None]:
    """Holds back the warnings of libraries that raise what they warn of, too: each retry of a request, for example."""
    loggers = [logging.getLogger(name) for name in libraries]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True)
class TrainingData:
    """Items and queries of one training run.

    Attributes:
        judged_rows: catalogue rows of the items that any query judges, int32, ascending.
        sha256: hash of all that was read, as tokens.
    """

    catalogue: Catalogue
    queries: Queries
    judged_rows: np.ndarray
    sha256: str


def read_training_data(settings: SourceSettings, encoder: Encoder) -> TrainingData:
    """Returns items and queries, tokenised.

    Reads the whole queries file once, also when streaming, so that ids and labels are known to be good before training
    begins; when streaming it keeps only the ids, and queries are tokenised (and found too long) as they are used.

    Raises:
        InputError: as `read_source`; a repeated id, an unknown item id, an item without text, or what the encoder
            refuses.
    """
    items = items_by_id(settings.items, read_source(settings.items, Item, streaming=settings.streaming))
    catalogue = Catalogue(items, encoder)
    digest = hashlib.sha256(catalogue.flat.tobytes())

    kept: list[EncodedQuery] = []
    judged_rows = np.zeros(len(catalogue), bool)
    length = 0
    for query in checked_queries(settings, items):
        length += 1
        digest.update(query.model_dump_json().encode())
        judged_rows[[catalogue.row_of[judged.id] for judged in query.items]] = True
        if not settings.streaming:
            kept.append(encode_query(query, catalogue, encoder, settings.queries))
    if length == 0:
        raise InputError(f"{settings.queries}: holds no records")
    queries = StreamedQueries(settings, length, catalogue, encoder) if settings.streaming else kept
    return TrainingData(catalogue, queries, np.flatnonzero(judged_rows).astype(np.int32), digest.hexdigest())


def checked_queries(settings: SourceSettings, items: Collection[str]) -> Iterator[Query]:
    """Yields the queries; raises InputError on repeated query ids and on item ids that are not in `items`."""
    ids: set[str] = set()
    for query in read_source(settings.queries, Query, streaming=settings.streaming):
        if query.query_id in ids:
            raise InputError(f"{settings.queries}: query id {query.query_id!r} appears twice")
        ids.add(query.query_id)
        unknown = next((judged.id for judged in query.items if judged.id not in items), None)
        if unknown is not None:
            raise InputError(
                f"{settings.queries}: query {query.query_id!r}: item {unknown!r} is not in {settings.items}"
            )
        yield query


def _encode_named(items: Sequence[Item], encoder: Encoder) -> list[list[int]]:
    """Encodes items; an error names the item's id in place of its number in the call."""
    try:
        return encoder.items(items)
    except InputError as error:
        raise InputError(with_item_id(error, items)) from None
