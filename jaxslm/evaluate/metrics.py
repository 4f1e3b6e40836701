"""nDCG@10, RR@10 and R@10 through `ir_measures`, per query, with bootstrap intervals.

Conventions, printed beside every number (`CONVENTIONS`):

* nDCG@10 has **linear gain**: DCG = sum_{i=1..10} label_i / log2(i + 1), divided by the best DCG of the query's
  judgements (Järvelin and Kekäläinen 2002; `trec_eval`'s `ndcg_cut`).
* RR@10 is 1 / rank of the first relevant item, 0 beyond rank 10. R@10 is the share of the query's relevant items that
  stand in the first 10.
* **Relevant means label >= 0.75**, the same for every data set, so that numbers compare: the top grade of a scale of
  four (1, 2/3, 1/3, 0), the top two of a scale of five. RR and R ask for the right item, not for its neighbours.
* A query without a relevant judged item is left out of all three measures, and counted.
* Items without a judgement count as label 0. A judged query that a run does not answer scores 0, and is counted.
* **Ties**: items with equal scores are ordered by a hash of (query id, item id). A ranker that scores everything
  equal therefore gets the quality of a random order; it inherits neither the candidate order (BM25's) nor the order of
  the ids (which `trec_eval` would use, and which may correlate with the labels).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxslm.data_files import Query
from jaxslm.errors import InputError

Labels = Mapping[str, Mapping[str, float]]  # query id -> item id -> label in [0, 1]
Run = Mapping[str, Mapping[str, float]]  # query id -> item id -> score, larger is better

RELEVANT_LABEL = 0.75
GRADE_SCALE = 27_720  # lcm(1..12): exact for up to 13 equally spaced grades; other labels move by at most 1.8e-5
RESAMPLES = 10_000
MEASURES = {"ndcg_at_10": "nDCG@10", "rr_at_10": "RR@10", "recall_at_10": "R@10"}
CONVENTIONS = f"nDCG with linear gain; relevant: label >= {RELEVANT_LABEL}; ties in hash order; 95 % bootstrap interval"

_DRAWS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean over queries and its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """The measures of one run.

    Attributes:
        query_ids: the evaluated queries, sorted.
        values: per measure (keys of `MEASURES`) the value of each query, float64 [len(query_ids)], in [0, 1].
        estimates: per measure the mean and its interval.
        without_relevant: queries left out because no judged item is relevant.
        without_results: evaluated queries that the run does not answer (they score 0).
    """

    query_ids: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    estimates: Mapping[str, Estimate]
    without_relevant: int
    without_results: int

    def per_query(self, measure: str = "ndcg_at_10") -> dict[str, float]:
        """Returns the value of `measure` by query id."""
        return dict(zip(self.query_ids, self.values[measure].tolist(), strict=True))


def evaluate_run(labels: Labels, run: Run, *, resamples: int = RESAMPLES, seed: int = 0) -> Evaluation:
    """Returns nDCG@10, RR@10 and R@10 of a run (conventions: see the module).

    Depends only on labels, ids and scores; not on the order of queries or items, nor on any monotone map of the scores.

    Args:
        labels: judgements, labels in [0, 1].
        run: scores; queries without judgements are ignored.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        InputError: a score is NaN, a label is outside [0, 1], or no query has a relevant item.
    """
    _check_labels(labels)
    query_ids = tuple(sorted(query_id for query_id, judged in labels.items() if has_relevant(judged)))
    if not query_ids:
        raise InputError(f"none of the {len(labels)} queries has a relevant judged item (label >= {RELEVANT_LABEL})")
    table = _measure([labels[query_id] for query_id in query_ids], [ranked(q, run.get(q, {})) for q in query_ids])
    means = bootstrap_means(table, resamples, seed)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    estimates = {
        name: Estimate(float(table[:, column].mean()), float(low[column]), float(high[column]))
        for column, name in enumerate(MEASURES)
    }
    return Evaluation(
        query_ids=query_ids,
        values={name: table[:, column].copy() for column, name in enumerate(MEASURES)},
        estimates=estimates,
        without_relevant=len(labels) - len(query_ids),
        without_results=sum(not run.get(query_id) for query_id in query_ids),
    )


def labels_of(queries: Sequence[Query]) -> dict[str, dict[str, float]]:
    """Returns the judgements of queries: query id -> item id -> label."""
    return {query.query_id: {judged.id: judged.label for judged in query.items} for query in queries}


def has_relevant(judged: Mapping[str, float]) -> bool:
    """Returns whether any label reaches `RELEVANT_LABEL`."""
    return any(label >= RELEVANT_LABEL for label in judged.values())


def ranked(query_id: str, scores: Mapping[str, float]) -> list[str]:
    """Returns the item ids by score descending; equal scores by a hash of (query id, item id).

    Raises:
        InputError: a score is NaN; the message names the query and the item.
    """
    for item_id, score in scores.items():
        if math.isnan(score):
            raise InputError(f"query {query_id!r}, item {item_id!r}: the score is not a number (NaN)")
    if len(set(scores.values())) == len(scores):
        return sorted(scores, key=lambda item_id: -scores[item_id])
    return sorted(scores, key=lambda item_id: (-scores[item_id], stable_hash(query_id, item_id)))


def stable_hash(*parts: str) -> int:
    """Returns a 64-bit hash of strings: the same in every process and on every machine."""
    key = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def bootstrap_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Returns the means of bootstrap samples of the rows of `values` (Efron and Tibshirani 1993, chapter 13).

    Every column sees the same samples. Memory stays below about 32 MB whatever the number of rows.

    Args:
        values: float64 [queries, measures].
        resamples: number of samples.
        seed: of the draws.

    Returns:
        float64 [resamples, measures].
    """
    rows, columns = values.shape
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, columns))
    chunk = max(1, _DRAWS_AT_ONCE // rows)
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        draws = generator.integers(0, rows, size=(count, rows), dtype=np.int32)
        for column in range(columns):
            means[start : start + count, column] = values[:, column][draws].mean(axis=1)
    return means


def _measure(judgements: Sequence[Mapping[str, float]], rankings: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns float64 [queries, measures]. `ir_measures` gets numbers for ids, ranks for scores: no ties or odd ids."""
    import ir_measures

    relevant = _grade(RELEVANT_LABEL)
    measures = [
        ir_measures.nDCG @ 10,
        ir_measures.RR(rel=relevant) @ 10,
        ir_measures.R(rel=relevant) @ 10,
    ]
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for row, (judged, ranking) in enumerate(zip(judgements, rankings, strict=True)):
        number = {item_id: str(position) for position, item_id in enumerate({**dict.fromkeys(ranking), **judged})}
        qrels[str(row)] = {number[item_id]: _grade(label) for item_id, label in judged.items()}
        if ranking:
            run[str(row)] = {number[item_id]: -float(position) for position, item_id in enumerate(ranking)}
    table = np.zeros((len(qrels), len(measures)))
    column_of = {measure: column for column, measure in enumerate(measures)}
    if run:
        for metric in ir_measures.iter_calc(measures, qrels, run):
            table[int(metric.query_id), column_of[metric.measure]] = metric.value
    return table


def _grade(label: float) -> int:
    """Returns the label as an integer, as `trec_eval` needs it. Rounding never lifts a label to `RELEVANT_LABEL`."""
    grade = round(label * GRADE_SCALE)
    return grade if label >= RELEVANT_LABEL else min(grade, round(RELEVANT_LABEL * GRADE_SCALE) - 1)


def _check_labels(labels: Labels) -> None:
    for query_id, judged in labels.items():
        for item_id, label in judged.items():
            if not 0 <= label <= 1:
                raise InputError(f"query {query_id!r}, item {item_id!r}: label {label} is outside [0, 1]")
