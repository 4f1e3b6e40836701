"""One training example at a time, by its position: a query with its list of items, or a query with one good item.

Both are sequences whose element depends on nothing but the position (and the settings), so any process can build any
of them, and a resumed run builds the same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from jaxslm.data_files import Query, Request, read_records
from jaxslm.errors import InputError
from jaxslm.evaluate.candidates import Bm25
from jaxslm.progress import console
from jaxslm.train.data_settings import DataSettings
from jaxslm.train.sources import Catalogue, EncodedQuery, Order, Queries, read_source

TeacherScores = dict[str, dict[str, float]]
"""Log-odds by the query's words, then by item id."""


@dataclass(frozen=True)
class TokenList:
    """A query with its items.

    Attributes:
        position: its place in the order. index: the query's place in the file.
        tokens: int32, prefix and items end to end. lengths: tokens of the prefix, then of each item.
        rows: int32, the items as rows of the catalogue. labels: float32, one per item.
        teacher: float32 log-odds, NaN where unknown; None without a teacher.
    """

    position: int
    index: int
    tokens: np.ndarray
    lengths: list[int]
    rows: np.ndarray
    labels: np.ndarray
    teacher: np.ndarray | None

    @property
    def size(self) -> int:
        """Tokens in all."""
        return len(self.tokens)


@dataclass(frozen=True)
class TokenPair:
    """A query with one of its best items; `relevant` are the catalogue rows of all items with a label above 0."""

    position: int
    index: int
    query: np.ndarray
    item: np.ndarray
    item_row: int
    relevant: np.ndarray

    @property
    def size(self) -> int:
        """Tokens in all."""
        return len(self.query) + len(self.item)


class ListChooser:
    """Chooses the items of a list: relevant ones of every grade, hard negatives and random negatives.

    Negatives come only from items that some query of the training file judges: what the file never mentions, such as
    the postings of a held-back group, is never trained on. Items that a query does not list count as irrelevant to it.
    """

    def __init__(self, settings: DataSettings, catalogue: Catalogue, judged_rows: np.ndarray) -> None:
        """Args: judged_rows: rows of all items that any query judges."""
        self._hard, self._random = settings.hard_negatives, settings.random_negatives
        self._size, self._pool = settings.items_per_list, settings.hard_negative_pool
        self._catalogue, self._judged_rows = catalogue, judged_rows
        self._bm25: Bm25 | None = None
        if self._hard and self._pool:
            ids = list(catalogue.items)
            self._bm25 = Bm25({ids[row]: catalogue.items[ids[row]] for row in judged_rows})
        self._found: dict[str, np.ndarray] | None = None if settings.streaming else {}

    def __call__(self, query: EncodedQuery, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns catalogue rows and labels of up to J items in random order; fewer only if the data has no more."""
        relevant = query.labels > 0
        places = self._size - self._hard - self._random
        chosen = spread_over_grades(query.labels[relevant], places, generator)
        rows, labels = [query.rows[relevant][chosen]], query.labels[relevant][chosen]
        pool = np.concatenate([query.rows[~relevant], np.setdiff1d(self._search(query), query.rows)])
        rows.append(generator.permutation(pool)[: self._size - self._random - len(labels)])
        missing = self._size - len(rows[0]) - len(rows[1])
        taken = np.concatenate([query.rows, rows[1]])
        # So many distinct draws leave enough even if every taken item is among them.
        drawn = generator.choice(self._judged_rows, min(missing + len(taken), len(self._judged_rows)), replace=False)
        rows.append(drawn[~np.isin(drawn, taken)][:missing])
        all_rows = np.concatenate(rows)
        all_labels = np.zeros(len(all_rows), np.float32)
        all_labels[: len(labels)] = labels
        order = generator.permutation(len(all_rows))
        return all_rows[order], all_labels[order]

    def _search(self, query: EncodedQuery) -> np.ndarray:
        """Rows of BM25's best items for a query; kept, so that later epochs do not search again."""
        if self._bm25 is None:
            return np.empty(0, np.int32)
        found = self._found.get(query.query_id) if self._found is not None else None
        if found is None:
            row_of = self._catalogue.row_of
            found = np.array([row_of[item_id] for item_id, _ in self._bm25.search(query.text, self._pool)], np.int32)
            if self._found is not None:
                self._found[query.query_id] = found
        return found


def spread_over_grades(labels: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Returns the places of up to `count` labels: one of the highest, then draws in which every grade weighs the same.

    Without this, a grade that most items have would fill the list. Labels that all differ are drawn uniformly.
    """
    if not len(labels):
        return np.empty(0, np.int64)
    _, grade, size = np.unique(labels, return_inverse=True, return_counts=True)
    # The smallest of exponential times over weights: sampling without replacement (Efraimidis and Spirakis 2006).
    times = generator.exponential(size=len(labels)) * size[grade]
    best = np.flatnonzero(labels == labels.max())
    times[best[np.argmin(times[best])]] = -1
    return np.argsort(times)[:count]


class RankerLists:
    """The lists of one host, by position."""

    def __init__(
        self,
        queries: Queries,
        catalogue: Catalogue,
        order: Order,
        choose: ListChooser,
        teacher: TeacherScores | None,
    ) -> None:
        self._queries, self._catalogue, self._order = queries, catalogue, order
        self._choose, self._teacher = choose, teacher
        self._ids = list(catalogue.items)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> TokenList:
        epoch, index = self._order[position]
        query = self._queries[index]
        rows, labels = self._choose(query, self._order.generator(epoch, index))
        parts = [query.tokens, *(self._catalogue.tokens(row) for row in rows.tolist())]
        teacher = None
        if self._teacher is not None:
            known = self._teacher.get(query.text, {})
            teacher = np.array([known.get(self._ids[row], np.nan) for row in rows], np.float32)
        lengths = [len(part) for part in parts]
        return TokenList(position, index, np.concatenate(parts), lengths, rows.astype(np.int32), labels, teacher)


class TokenPairs:
    """The pairs of one host, by position. Each epoch draws anew among the best items of a query."""

    def __init__(self, queries: Queries, catalogue: Catalogue, order: Order) -> None:
        self._queries, self._catalogue, self._order = queries, catalogue, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> TokenPair:
        epoch, index = self._order[position]
        query = self._queries[index]
        best = query.rows[query.labels == query.labels.max()]
        row = int(self._order.generator(epoch, index).choice(best))
        relevant = query.rows[query.labels > 0]
        return TokenPair(position, index, query.tokens, self._catalogue.tokens(row), row, relevant)


class ScoredRequest(BaseModel):
    """An output line of `jaxslm score`, as far as it teaches."""

    model_config = ConfigDict(frozen=True, strict=True)
    logits: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = Field(strict=False)


def read_teacher_scores(requests: Path, scores: Path) -> TeacherScores:
    """Returns the log-odds that `jaxslm score` gave: line i of `scores` belongs to line i of `requests`.

    Raises:
        InputError: as `read_records`; an item without id, or files that do not belong together.
    """
    found: TeacherScores = {}
    asked, scored = list(read_records(requests, Request)), list(read_records(scores, ScoredRequest))
    if len(asked) != len(scored):
        raise InputError(f"{scores}: has {len(scored)} lines, {requests} has {len(asked)}")
    for number, (request, answer) in enumerate(zip(asked, scored, strict=True), start=1):
        if len(request.items) != len(answer.logits):
            raise InputError(
                f"{scores}: record {number}: has {len(answer.logits)} logits for {len(request.items)} items"
            )
        by_id = found.setdefault(request.query, {})
        for item, logit in zip(request.items, answer.logits, strict=True):
            if item.id is None:
                raise InputError(f"{requests}: record {number}: a teacher's items need ids")
            by_id[item.id] = logit
    return found


def tell_coverage(teacher: TeacherScores, settings: DataSettings, host: int) -> None:
    """The first host says how many judged pairs of the training queries have a score, unless all have.

    Reads the queries once more: streamed ones are not kept.

    Raises:
        InputError: none has one, so that the teacher would teach nothing: the scores are of other queries or ids.
    """
    pairs = scored = 0
    for query in read_source(settings.queries, Query, streaming=settings.streaming):
        known = teacher.get(query.query, {})
        pairs += len(query.items)
        scored += sum(judged.id in known for judged in query.items)
    if not scored:
        raise InputError(
            f"{settings.teacher_requests}: holds none of the {pairs:,} judged pairs of {settings.queries}: each is"
            " found by the query's words and the item's id"
        )
    if scored < pairs and host == 0:
        line = f"{settings.teacher_requests}: holds {scored:,} of the {pairs:,} judged pairs of {settings.queries}"
        console().print(line, markup=False, soft_wrap=True)
