"""The held-back queries of a run: nDCG@10 of a scoring function within BM25's candidates."""

import hashlib
from collections.abc import Callable, Sequence
from itertools import chain

from jaxslm.data_files import Item, Query, distinct_queries, items_by_id
from jaxslm.errors import InputError
from jaxslm.evaluate.candidates import CandidateList, candidates
from jaxslm.evaluate.rerank import Score, evaluate_ranker, naming, sample_queries, with_relevant
from jaxslm.train.settings import EvaluationSettings
from jaxslm.train.sources import read_source

Readable = Callable[[str, list[Item]], object]
"""(query text, items): raises InputError for what the model cannot read, as `Prompt.encode` does."""


class HeldOut:
    """Reads and checks the data at once, so that what would end the first evaluation is told before the first update.

    Attributes:
        candidates: the items that `evaluate` has scored, each once; none without settings.
    """

    def __init__(self, settings: EvaluationSettings | None, readable: Readable) -> None:
        """Args: settings: None if there is nothing to evaluate.

        Raises:
            InputError: the files break a rule, no query has a relevant item, a judged id is unknown, or a query with
                its candidates is not `readable`; the message names the file.
        """
        self._settings = settings
        self.candidates: list[Item] = []
        if settings is None:
            return
        self._items = items_by_id(settings.items, read_source(settings.items, Item, streaming=False))
        self._queries = distinct_queries(settings.queries, read_source(settings.queries, Query, streaming=False))
        try:
            chosen = sample_queries(with_relevant(self._queries), settings.limit)
            lists = candidates(chosen, self._items, settings.k)
            self._check(chosen, lists, readable)
        except InputError as error:
            raise InputError(f"{settings.queries}: {error}") from None
        ids = dict.fromkeys(chain.from_iterable(each.ids for each in lists))
        self.candidates = [self._items[item_id] for item_id in ids]

    @property
    def sha256(self) -> str:
        """Hash of the items and queries; of nothing without settings."""
        digest = hashlib.sha256()
        if self._settings is not None:
            for record in chain(self._items.values(), self._queries):
                digest.update(record.model_dump_json().encode())
        return digest.hexdigest()

    def _check(self, queries: Sequence[Query], lists: Sequence[CandidateList], readable: Readable) -> None:
        for query, each in zip(queries, lists, strict=True):
            items = [self._items[item_id] for item_id in each.ids]
            with naming(query, items):
                readable(query.query, items)

    def evaluate(self, score: Score) -> dict[str, float]:
        """Returns "ndcg_at_10", BM25's on the same candidates, and the 95 % interval of the difference."""
        settings = self._settings
        if settings is None:
            return {}
        report = evaluate_ranker(score, self._queries, self._items, k=settings.k, limit=settings.limit)
        return {
            "ndcg_at_10": report.ranker.estimates["ndcg_at_10"].mean,
            "bm25_ndcg_at_10": report.bm25.estimates["ndcg_at_10"].mean,
            "ndcg_minus_bm25": report.difference.mean,
            "ndcg_minus_bm25_low": report.difference.low,
            "ndcg_minus_bm25_high": report.difference.high,
            "queries": float(report.queries),
        }
