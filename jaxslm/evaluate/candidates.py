"""Candidate lists: the BM25 top k of every query plus its judged items, with BM25's own score for all of them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxslm.data_files import Item, Query
from jaxslm.errors import InputError
from jaxslm.progress import progress

K1 = 1.5
B = 0.75


@dataclass(frozen=True)
class CandidateList:
    """The items that a ranker has to order for one query.

    Attributes:
        query_id: the query.
        ids: item ids by (BM25 score descending, id), each once. The order tells nothing about the labels.
        bm25: BM25 scores of `ids`, float64 [len(ids)], non-increasing.
    """

    query_id: str
    ids: tuple[str, ...]
    bm25: np.ndarray


class Bm25:
    """BM25 over `title` and `text` of items, the Lucene variant:

        score(q, d) = sum_{t in q} ln(1 + (N - n_t + 0.5) / (n_t + 0.5)) * f_td / (f_td + k1 (1 - b + b |d| / avg|d|))

    with N documents, n_t of them holding t, f_td occurrences of t in d, |d| tokens. A token that the query repeats
    counts each time. Tokens: lower-cased words of two or more letters or digits, without the 33 English stop words of
    `bm25s` (Lucene's list), no stemming. Scores are float64 sums in query order, one thread; they do not depend on the
    order of the items, the hash seed, or whether numba is installed.

    Source: Kamphuis et al., "Which BM25 Do You Mean?", ECIR 2020; `bm25s` (Lù 2024).
    """

    def __init__(self, items: Mapping[str, Item], *, k1: float = K1, b: float = B) -> None:
        """Indexes the items (about 0.1 ms each). Raises InputError when there are none."""
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG, which any root handler would print
        if not items:
            raise InputError("BM25 needs at least one item")
        self.ids = tuple(items)
        ids = np.array(self.ids, dtype=object)
        self._id_order = np.empty(len(ids), dtype=np.int64)
        self._id_order[np.argsort(ids, kind="stable")] = np.arange(len(ids))
        self._row_of = {item_id: row for row, item_id in enumerate(self.ids)}
        tokens = bm25s.tokenize([document_text(item) for item in items.values()], stopwords="en", show_progress=False)
        self._index = None
        if tokens.vocab:
            self._index = bm25s.BM25(k1=k1, b=b, method="lucene", dtype="float64", backend="numpy")
            self._index.index(tokens, create_empty_token=False, show_progress=False)

    def scores(self, query: str) -> np.ndarray:
        """Returns the BM25 score of every item, float64 [len(ids)], >= 0, in the order of `ids`."""
        import bm25s

        if self._index is None:
            return np.zeros(len(self.ids))
        words = bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
        return np.asarray(self._index.get_scores_from_ids(self._index.get_tokens_ids(words)), dtype=np.float64)

    def search(self, query: str, k: int) -> list[tuple[str, float]]:
        """Returns the k best (id, score) by (score descending, id); all items when there are fewer than k.

        Items that share no word with the query score 0 and fill the list, so that it always has k entries.
        """
        scores = self.scores(query)
        return [(self.ids[row], float(scores[row])) for row in self._top_rows(scores, k)]

    def candidates(self, query: Query, k: int) -> CandidateList:
        """Returns the top k of `query` and its judged items, as `candidates`."""
        scores = self.scores(query.query)
        rows = dict.fromkeys(self._top_rows(scores, k).tolist())
        for judged in query.items:
            if judged.id not in self._row_of:
                raise InputError(f"query {query.query_id!r}: judged item {judged.id!r} is not among the items")
            rows[self._row_of[judged.id]] = None
        ordered = self._sorted_rows(scores, np.array(list(rows), dtype=np.int64))
        return CandidateList(query.query_id, tuple(self.ids[row] for row in ordered), scores[ordered])

    def _top_rows(self, scores: np.ndarray, k: int) -> np.ndarray:
        if k < 0:
            raise InputError(f"k must be 0 or more, not {k}")
        k = min(k, len(scores))
        if k == 0:
            return np.empty(0, dtype=np.int64)
        worst = np.partition(scores, len(scores) - k)[len(scores) - k]
        return self._sorted_rows(scores, np.flatnonzero(scores >= worst))[:k]

    def _sorted_rows(self, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return rows[np.lexsort((self._id_order[rows], -scores[rows]))]


def document_text(item: Item) -> str:
    """Returns what BM25 reads of an item: title, line break, text."""
    return f"{item.title}\n{item.text}" if item.title else item.text


def candidates(queries: Sequence[Query], items: Mapping[str, Item], k: int = 50) -> list[CandidateList]:
    """Returns for every query, in order, its BM25 top k plus the judged items outside it, in BM25 order.

    Judged items outside the top k carry their true BM25 score, so that BM25 can be measured on the same lists. Depends
    on neither the order of the items nor that of the judgements. Cost: one sparse sum over the items per query.

    Args:
        queries: queries with their judged items.
        items: all items by id.
        k: size of the BM25 list; 0 keeps the judged items only.

    Raises:
        InputError: a judged id is not among `items` (the message names the query and the id); k < 0; no items.
    """
    index = Bm25(items)
    lists = []
    with progress() as bar:
        task = bar.add_task("BM25 candidates", total=len(queries))
        for query in queries:
            lists.append(index.candidates(query, k))
            bar.advance(task)
    return lists
