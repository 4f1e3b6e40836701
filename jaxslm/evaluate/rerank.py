"""Re-rank candidate lists with a scoring function and compare it with BM25 on the same lists."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from jaxslm.data_files import Item, Query, with_item_id
from jaxslm.errors import InputError
from jaxslm.evaluate.candidates import CandidateList, candidates
from jaxslm.evaluate.metrics import (
    CONVENTIONS,
    MEASURES,
    RELEVANT_LABEL,
    Evaluation,
    Run,
    evaluate_run,
    has_relevant,
    labels_of,
    stable_hash,
)
from jaxslm.evaluate.significance import PairedDifference, paired_bootstrap
from jaxslm.progress import console, progress

Score = Callable[[str, list[Item]], np.ndarray]  # (query text, items) -> one number per item, larger is better

Check = Callable[[Sequence[CandidateList]], None]  # is given all candidates before the first one is scored


def accept(lists: Sequence[CandidateList]) -> None:
    """The check of who has nothing to check."""


@dataclass(frozen=True)
class Report:
    """A ranker and BM25 over the same candidates of the same queries.

    Attributes:
        name: of the ranker.
        ranker: its evaluation.
        bm25: BM25's evaluation.
        random: a random (hash) order of the same candidates: the floor. It is far above 0 where a query has many judged
            items, because the candidate list holds them all.
        difference: nDCG@10 of the ranker minus BM25's, paired by query.
        queries: evaluated queries.
        queries_available: queries with a relevant item before `limit` took its sample.
        without_relevant: queries left out because no judged item is relevant.
        candidates: scored (query, item) pairs.
        k: BM25 list length (judged items outside it are added).
        seconds: time inside the scoring function, compilation included where it was not warmed up.
        run: the ranker's scores, to be written by `trec.write_run`.
        bm25_run: BM25's scores of the same candidates.
    """

    name: str
    ranker: Evaluation
    bm25: Evaluation
    random: Evaluation
    difference: PairedDifference
    queries: int
    queries_available: int
    without_relevant: int
    candidates: int
    k: int
    seconds: float
    run: Run = field(repr=False)
    bm25_run: Run = field(repr=False)

    @property
    def items_per_s(self) -> float:
        """Scored candidates per second inside the scoring function."""
        return self.candidates / self.seconds if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the ranker's row of a result file, with BM25's figures on the same candidates beside it."""
        return {
            **_row(self.name, self.ranker),
            "items_per_s": round(self.items_per_s, 3),
            "seconds": round(self.seconds, 3),
            "queries": self.queries,
            "candidates": self.candidates,
            "bm25_ndcg_at_10": self.bm25.estimates["ndcg_at_10"].mean,
            "bm25_ndcg_ci95": [self.bm25.estimates["ndcg_at_10"].low, self.bm25.estimates["ndcg_at_10"].high],
            "random_ndcg_at_10": self.random.estimates["ndcg_at_10"].mean,
            "ndcg_minus_bm25": self.difference.mean,
            "ndcg_minus_bm25_ci95": [self.difference.low, self.difference.high],
        }

    def to_result(self) -> dict[str, Any]:
        """Returns a result file for `jaxslm report`: {"rows": [random order, BM25, ranker], "conditions": {...}}."""
        counts = {"queries": self.queries, "candidates": self.candidates}
        baselines = [
            {**_row(name, each), **counts} for name, each in (("random order", self.random), ("BM25", self.bm25))
        ]
        return {"rows": [*baselines, self.to_json()], "conditions": self.conditions()}

    def conditions(self) -> dict[str, Any]:
        """Returns what the numbers depend on: candidates, sample, conventions."""
        return {
            "candidate_list": f"BM25 top {self.k} and the judged items" if self.k else "judged items",
            "queries": self.queries,
            "queries_available": self.queries_available,
            "queries_without_relevant": self.without_relevant,
            "candidates": self.candidates,
            "relevant_label": RELEVANT_LABEL,
            "conventions": CONVENTIONS,
        }


def evaluate_ranker(
    score: Score,
    queries: Sequence[Query],
    items: Mapping[str, Item],
    *,
    k: int = 50,
    limit: int | None = None,
    seed: int = 0,
    name: str = "ranker",
    check: Check = accept,
) -> Report:
    """Scores the candidates of every query and reports the ranker and BM25 on the same lists.

    The result depends on ids, texts and scores only, not on the order of queries, items or judgements.

    Args:
        score: given the query text and its candidates, returns one number per item, larger is better, not NaN.
        queries: queries with judgements; those without a relevant item are left out and counted.
        items: all items by id.
        k: BM25 list length; 0 re-ranks the judged items only.
        limit: evaluate this many queries, chosen by `sample_queries`.
        seed: of that choice.
        name: of the ranker, in tables and results.
        check: raises InputError for candidates that cannot be scored, or whose scores could not be kept.

    Raises:
        InputError: no query has a relevant item, a judged id is unknown, or `score` returns a wrong shape or NaN.
    """
    eligible = with_relevant(queries)
    chosen = sample_queries(eligible, limit, seed)
    lists = candidates(chosen, items, k)
    check(lists)
    run, seconds = score_candidates(score, chosen, lists, items)
    bm25_run = {each.query_id: dict(zip(each.ids, each.bm25.tolist(), strict=True)) for each in lists}
    labels = labels_of(chosen)
    ranker, bm25 = evaluate_run(labels, run), evaluate_run(labels, bm25_run)
    random = evaluate_run(labels, {query_id: dict.fromkeys(row, 0.0) for query_id, row in run.items()})
    return Report(
        name=name,
        ranker=ranker,
        bm25=bm25,
        random=random,
        difference=paired_bootstrap(ranker.per_query(), bm25.per_query()),
        queries=len(chosen),
        queries_available=len(eligible),
        without_relevant=len(queries) - len(eligible),
        candidates=sum(len(each.ids) for each in lists),
        k=k,
        seconds=seconds,
        run=run,
        bm25_run=bm25_run,
    )


def with_relevant(queries: Sequence[Query]) -> list[Query]:
    """Returns the queries that have a relevant judged item. Raises InputError if none has."""
    eligible = [q for q in queries if has_relevant({judged.id: judged.label for judged in q.items})]
    if not eligible:
        raise InputError(f"none of the {len(queries)} queries has a relevant judged item (label >= {RELEVANT_LABEL})")
    return eligible


def sample_queries(queries: Sequence[Query], limit: int | None, seed: int = 0) -> list[Query]:
    """Returns the `limit` queries of smallest hash of (seed, query id), all when limit is None.

    The choice does not depend on the order of the file, and a larger limit contains a smaller one.

    Raises:
        InputError: limit < 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit of queries must be 1 or more, not {limit}")
    if limit is None or limit >= len(queries):
        return list(queries)
    return sorted(queries, key=lambda query: (stable_hash(str(seed), query.query_id), query.query_id))[:limit]


def report_table(report: Report) -> Table:
    """Returns the comparison as a table of means over 95 % intervals; its caption holds the conventions and counts."""
    title = f"{report.name} and BM25 on the same candidates"
    table = Table(title=title, caption=_caption(report), caption_justify="left", show_lines=True)
    table.add_column("ranker")
    for label in MEASURES.values():
        table.add_column(label, justify="right", no_wrap=True)
    for name, evaluation in (("random order", report.random), ("BM25", report.bm25), (report.name, report.ranker)):
        cells = (evaluation.estimates[measure] for measure in MEASURES)
        table.add_row(name, *(_interval(each.mean, each.low, each.high) for each in cells))
    difference = report.difference
    table.add_row("minus BM25", _interval(difference.mean, difference.low, difference.high, sign="+"), "", "")
    return table


def print_report(report: Report) -> None:
    """Prints the table on the console (stderr)."""
    console().print(report_table(report))


def score_candidates(
    score: Score, queries: Sequence[Query], lists: Sequence[CandidateList], items: Mapping[str, Item]
) -> tuple[dict[str, dict[str, float]], float]:
    """Returns the run of `score` over the candidates of each query, and the seconds spent in it; shows a progress bar.

    Raises:
        InputError: `score` raises one, which then names the query, or returns a wrong shape or NaN.
    """
    run: dict[str, dict[str, float]] = {}
    seconds, done = 0.0, 0
    with progress() as bar:
        task = bar.add_task("ranking", total=sum(len(each.ids) for each in lists))
        for query, each in zip(queries, lists, strict=True):
            batch = [items[item_id] for item_id in each.ids]
            start = time.perf_counter()
            with naming(query, batch):
                scores = np.asarray(score(query.query, batch), dtype=np.float64)
            seconds += time.perf_counter() - start
            run[query.query_id] = _checked(query.query_id, each.ids, scores)
            done += len(batch)
            bar.update(task, completed=done, description=f"ranking, {done / max(seconds, 1e-9):,.0f} items/s")
    return run, seconds


@contextmanager
def naming(query: Query, items: Sequence[Item]) -> Iterator[None]:
    """Puts the query's id in front of an InputError, and an item's id for its number among `items`."""
    try:
        yield
    except InputError as error:
        told = with_item_id(error, items).removeprefix("query: ")
        raise InputError(f"query {query.query_id!r}: {told}") from None


def _checked(query_id: str, ids: Sequence[str], scores: np.ndarray) -> dict[str, float]:
    if scores.shape != (len(ids),):
        raise InputError(f"query {query_id!r}: the ranker returned shape {scores.shape} for {len(ids)} items")
    row = dict(zip(ids, scores.tolist(), strict=True))
    for item_id, value in row.items():
        if math.isnan(value):
            raise InputError(f"query {query_id!r}, item {item_id!r}: the score is not a number (NaN)")
    return row


def _row(name: str, evaluation: Evaluation) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name}
    for measure in MEASURES:
        estimate = evaluation.estimates[measure]
        row[measure] = estimate.mean
        row[f"{measure.removesuffix('_at_10')}_ci95"] = [estimate.low, estimate.high]
    return row


def _interval(mean: float, low: float, high: float, sign: str = "") -> str:
    return f"{mean:{sign}.4f}\n[{low:{sign}.4f}, {high:{sign}.4f}]"


def _caption(report: Report) -> str:
    counts = f"{report.queries} of {report.queries_available} queries, {report.candidates} candidates"
    if report.without_relevant:
        counts += f", {report.without_relevant} queries without a relevant item left out"
    return f"{counts}; {report.conditions()['candidate_list']}; {report.items_per_s:,.1f} items/s\n{CONVENTIONS}"
