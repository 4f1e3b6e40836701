"""Kendall's tau of two runs: by its definition, and what it does not depend on."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxslm.evaluate.agreement import kendall_tau
from jaxslm.evaluate.metrics import Run

scores = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12)


def runs(pairs: list[tuple[int, int]]) -> tuple[Run, Run]:
    first, second = ({"q": {f"i{n}": float(pair[side]) for n, pair in enumerate(pairs)}} for side in (0, 1))
    return first, second


@given(scores)
def test_tau_is_the_balance_of_pairs(pairs: list[tuple[int, int]]) -> None:
    agree = disagree = untied_first = untied_second = 0
    for (a, b), (c, d) in combinations(pairs, 2):
        agree += (a - c) * (b - d) > 0
        disagree += (a - c) * (b - d) < 0
        untied_first += a != c
        untied_second += b != d
    found = kendall_tau(*runs(pairs))
    if untied_first and untied_second:
        assert found is not None
        assert found.mean == pytest.approx((agree - disagree) / (untied_first * untied_second) ** 0.5)
    else:
        assert found is None


@given(scores)
def test_tau_reads_the_order_alone(pairs: list[tuple[int, int]]) -> None:
    """Either way round the same; a rising function of the scores changes nothing, a falling one the sign."""
    found = kendall_tau(*runs(pairs))
    assert kendall_tau(*runs([(b, a) for a, b in pairs])) == found
    assert kendall_tau(*runs([(a**3, 2 * b + 7) for a, b in pairs])) == found
    mirrored = kendall_tau(*runs([(-a, b) for a, b in pairs]))
    if found is not None:
        assert mirrored is not None
        assert mirrored.mean == -found.mean


def test_tau_is_the_mean_over_queries_of_the_items_that_both_score() -> None:
    first = {"alike": {"a": 3.0, "b": 2.0, "only": 9.0}, "turned": {"a": 1.0, "b": 2.0}, "tied": {"a": 1.0, "b": 1.0}}
    second = {"alike": {"a": 5.0, "b": 1.0}, "turned": {"a": 2.0, "b": 1.0}, "tied": {"a": 1.0, "b": 0.0}}
    found = kendall_tau(first, second | {"unshared": {"a": 1.0, "b": 0.0}})
    assert found is not None
    assert found.mean == 0
    assert (found.low, found.high) == (-1, 1)
    assert kendall_tau({"q": {"a": 1.0}}, {"q": {"a": 1.0}}) is None
