"""The held-back queries of a run: nDCG@10 of a scoring function within BM25's candidates."""

from pathlib import Path

from jaxslm.data_files import read_items, read_queries
from jaxslm.evaluate.rerank import Score, evaluate_ranker
from jaxslm.train.settings import EvaluationSettings


class HeldOut:
    """Reads the files at once, so that a missing one is told before the first update. None: nothing to evaluate."""

    def __init__(self, settings: EvaluationSettings | None) -> None:
        self._settings = settings
        if settings is not None:
            self._items, self._queries = read_items(Path(settings.items)), read_queries(Path(settings.queries))

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
