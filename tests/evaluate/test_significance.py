"""The paired bootstrap is antisymmetric, sees paired differences and refuses unequal query sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslm.errors import InputError
from jaxslm.evaluate.significance import compare_runs, paired_bootstrap

VALUES = st.dictionaries(
    st.text(min_size=1, max_size=3), st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20
)


@settings(max_examples=30, deadline=None)
@given(VALUES)
def test_antisymmetric_and_order_free(values: dict[str, tuple[float, float]]) -> None:
    a = {query_id: pair[0] for query_id, pair in values.items()}
    b = {query_id: pair[1] for query_id, pair in reversed(values.items())}
    forth, back = paired_bootstrap(a, b, resamples=200), paired_bootstrap(b, a, resamples=200)
    assert forth.mean == pytest.approx(-back.mean, abs=1e-12)
    assert forth.low == pytest.approx(-back.high, abs=1e-12)
    assert forth.high == pytest.approx(-back.low, abs=1e-12)
    assert forth.low - 1e-12 <= forth.high


def test_a_run_equals_itself() -> None:
    same = {f"q{n}": n / 10 for n in range(10)}
    result = paired_bootstrap(same, same)
    assert (result.mean, result.low, result.high, result.share_not_better) == (0.0, 0.0, 0.0, 1.0)


def test_pairing_sees_a_small_steady_gain() -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(200)
    b = {f"q{n}": float(value) for n, value in enumerate(hard)}
    a = {query_id: value + 0.01 + 0.01 * float(generator.normal()) for query_id, value in b.items()}
    result = paired_bootstrap(a, b)
    assert 0.005 < result.low < result.mean < result.high < 0.015
    assert result.share_not_better == 0.0
    assert paired_bootstrap(b, a).share_not_better == 1.0


def test_different_queries_are_refused() -> None:
    with pytest.raises(InputError, match=r"1 only in the first, 2 only in the second \(for example 'x'\)"):
        paired_bootstrap({"q": 1.0, "x": 0.0}, {"q": 1.0, "y": 0.0, "z": 0.0})
    with pytest.raises(InputError, match="cover no queries"):
        paired_bootstrap({}, {})


def test_compare_runs() -> None:
    labels = {f"q{n}": {"a": 1.0, "b": 0.0} for n in range(4)}
    good = {query_id: {"a": 1.0, "b": 0.0} for query_id in labels}
    bad = {query_id: {"a": 0.0, "b": 1.0} for query_id in labels}
    assert compare_runs(labels, good, bad, "rr_at_10").mean == 0.5
    assert compare_runs(labels, good, bad).mean == pytest.approx(1 - 1 / np.log2(3))
    del bad["q2"]
    with pytest.raises(InputError, match="'q2'"):
        compare_runs(labels, good, bad)
