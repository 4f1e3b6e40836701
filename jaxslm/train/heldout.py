"""The held-back queries of a run: nDCG@10 of a scoring function within BM25's candidates."""

import hashlib
from functools import cached_property
from itertools import chain

from jaxslm.data_files import Item, Query, distinct_queries, items_by_id
from jaxslm.evaluate.candidates import candidates
from jaxslm.evaluate.metrics import has_relevant
from jaxslm.evaluate.rerank import Score, evaluate_ranker, sample_queries
from jaxslm.train.settings import EvaluationSettings
from jaxslm.train.sources import read_source


class HeldOut:
    """Reads the files at once, so that a missing one is told before the first update. None: nothing to evaluate."""

    def __init__(self, settings: EvaluationSettings | None) -> None:
        self._settings = settings
        if settings is not None:
            self._items = items_by_id(settings.items, read_source(settings.items, Item, streaming=False))
            self._queries = distinct_queries(settings.queries, read_source(settings.queries, Query, streaming=False))

    @property
    def sha256(self) -> str:
        """Hash of the items and queries; of nothing without settings."""
        digest = hashlib.sha256()
        if self._settings is not None:
            for record in chain(self._items.values(), self._queries):
                digest.update(record.model_dump_json().encode())
        return digest.hexdigest()

    @cached_property
    def candidates(self) -> list[Item]:
        """The items that `evaluate` has scored, each once; none without settings."""
        settings = self._settings
        if settings is None:
            return []
        eligible = [each for each in self._queries if has_relevant({judged.id: judged.label for judged in each.items})]
        found = candidates(sample_queries(eligible, settings.limit), self._items, settings.k)
        return [self._items[item_id] for item_id in dict.fromkeys(chain.from_iterable(each.ids for each in found))]

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
