"""How alike two runs order the same items: what a copy should keep, whatever the labels say."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxslm.evaluate.metrics import Estimate, Run, bootstrap_means


def kendall_tau(first: Run, second: Run) -> Estimate | None:
    """Returns the mean over queries of Kendall's tau-b of the two runs' scores, with its 95 % bootstrap interval.

    tau-b = (concordant - discordant pairs) / sqrt(pairs without a tie in the first * those without one in the second),
    in [-1, 1], over the items that both runs score (Kendall, Biometrika 33, 1945). A query whose pairs are all ties in
    one of the runs is left out; None if every query is. It says more than a difference of measures about a pruned or
    compressed model, for every pair of items counts, not only those that the labels tell apart.
    """
    taus = np.array(list(tau_by_query(first, second).values()))
    if not len(taus):
        return None
    low, high = np.percentile(bootstrap_means(taus[:, None])[:, 0], [2.5, 97.5])
    return Estimate(float(taus.mean()), float(low), float(high))


def tau_by_query(first: Run, second: Run) -> dict[str, float]:
    """Returns Kendall's tau-b by query, in the order of the ids, without the queries that have none (`kendall_tau`)."""
    found = {query_id: _tau(first[query_id], second[query_id]) for query_id in sorted(first.keys() & second.keys())}
    return {query_id: tau for query_id, tau in found.items() if tau is not None}


def _tau(first: Mapping[str, float], second: Mapping[str, float]) -> float | None:
    shared = sorted(first.keys() & second.keys())
    order_a, order_b = (np.sign(np.subtract.outer(each, each)) for each in _scores(shared, first, second))
    comparable = float(np.sum(order_a != 0)) * float(np.sum(order_b != 0))
    return float(np.sum(order_a * order_b)) / comparable**0.5 if comparable else None


def _scores(items: Sequence[str], *runs: Mapping[str, float]) -> list[np.ndarray]:
    return [np.array([run[item] for item in items]) for run in runs]
