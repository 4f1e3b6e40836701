"""Is one run better than another? The paired bootstrap over queries. "No loss" always means its interval."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxslm.errors import InputError
from jaxslm.evaluate.metrics import RESAMPLES, Labels, Run, bootstrap_means, evaluate_run


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference a - b over the same queries.

    Attributes:
        mean: mean over queries of (a - b).
        low: 2.5 % percentile of the resampled means.
        high: 97.5 % percentile.
        share_not_better: share of the resamples whose mean is <= 0: small when a is better than b.
        queries: number of queries.
    """

    mean: float
    low: float
    high: float
    share_not_better: float
    queries: int


def paired_bootstrap(
    a: Mapping[str, float], b: Mapping[str, float], *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedDifference:
    """Returns the mean of a - b over queries with its 95 % percentile interval.

    Resamples the per-query differences, d_q = a_q - b_q, so that what is hard for both cancels (Sakai, "Evaluating
    evaluation metrics based on the bootstrap", SIGIR 2006). Antisymmetric in (a, b); independent of the order of the
    queries.

    Args:
        a: value of a measure by query id.
        b: the same measure and the same queries for the other run.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        InputError: no queries, or the query sets differ (how many, and the first one).
    """
    if set(a) != set(b):
        first_a, first_b = sorted(set(a) - set(b)), sorted(set(b) - set(a))
        first = (first_a or first_b)[0]
        raise InputError(
            f"the runs cover different queries: {len(first_a)} only in the first, {len(first_b)} only in the second "
            f"(for example {first!r})"
        )
    if not a:
        raise InputError("the runs cover no queries")
    query_ids = sorted(a)
    difference = np.array([[a[query_id] - b[query_id]] for query_id in query_ids], dtype=np.float64)
    means = bootstrap_means(difference, resamples, seed)[:, 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return PairedDifference(
        mean=float(difference.mean()),
        low=float(low),
        high=float(high),
        share_not_better=float((means <= 0).mean()),
        queries=len(query_ids),
    )


def compare_runs(
    labels: Labels, run_a: Run, run_b: Run, measure: str = "ndcg_at_10", *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedDifference:
    """Returns the paired difference of `measure` between two runs with the same judgements.

    Raises:
        InputError: the runs answer different queries among the judged ones, or as `evaluate_run`.
    """
    scored = []
    for run in (run_a, run_b):
        answered = {query_id: judged for query_id, judged in labels.items() if run.get(query_id)}
        scored.append(evaluate_run(answered, run, resamples=1).per_query(measure))
    return paired_bootstrap(scored[0], scored[1], resamples=resamples, seed=seed)
