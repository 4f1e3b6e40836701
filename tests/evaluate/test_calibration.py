"""Calibration recovers what made the labels, keeps the order, and survives separable data."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslm.config import Calibration, validate
from jaxslm.errors import InputError
from jaxslm.evaluate.calibration import (
    brier,
    calibration_report,
    ece,
    fit_platt,
    fit_temperature,
    nll,
    reliability_table,
)

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(0.3, 2.0, size=4000)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("scale", [0.05, 0.5, 1.0, 3.0])
def test_soft_labels_give_back_the_temperature(scale: float) -> None:
    found = fit_temperature(LOGITS, sigmoid(scale * LOGITS))
    assert found.scale == pytest.approx(scale, rel=1e-3)
    assert found.bias == 0


@pytest.mark.parametrize(("scale", "bias"), [(0.5, -1.5), (2.0, 1.0), (1.0, 0.0)])
def test_soft_labels_give_back_scale_and_bias(scale: float, bias: float) -> None:
    found = fit_platt(LOGITS, sigmoid(scale * LOGITS + bias))
    assert found.scale == pytest.approx(scale, rel=1e-3)
    assert found.bias == pytest.approx(bias, abs=2e-3)


def test_hard_labels_give_back_the_temperature() -> None:
    labels = (GENERATOR.random(len(LOGITS)) < sigmoid(0.4 * LOGITS)).astype(float)
    assert fit_temperature(LOGITS, labels).scale == pytest.approx(0.4, rel=0.1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(0, 1)), min_size=2, max_size=30))
def test_fits_are_optimal_finite_and_monotone(pairs: list[tuple[float, float]]) -> None:
    logits, labels = np.array(pairs).T
    if logits.std() < 1e-3:
        return
    for fit in (fit_temperature, fit_platt):
        found = fit(logits, labels)
        assert found.scale > 0
        probabilities = found.apply(np.sort(logits))
        assert np.isfinite(probabilities).all()
        assert (np.diff(probabilities) >= -1e-15).all()
        for factor in (0.9, 1.1):
            other = Calibration(scale=found.scale * factor, bias=found.bias)
            if other.scale * logits.std() < 2e-3:  # at the lower bound
                continue
            assert _objective(found, logits, labels) <= _objective(other, logits, labels) + 1e-12


def _objective(calibration: Calibration, logits: np.ndarray, labels: np.ndarray) -> float:
    log_odds = calibration.log_odds(logits)
    return float(np.mean(np.logaddexp(0, log_odds) - labels * log_odds + 1e-6 / 2 * log_odds**2))


def test_separable_data_stay_finite_and_scale_with_the_logits() -> None:
    logits, labels = np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0.0, 0.0, 1.0, 1.0])
    found = fit_platt(logits, labels)
    assert 5 < np.abs(found.log_odds(logits)).min() < 20
    assert fit_platt(1000 * logits, labels).scale == pytest.approx(found.scale / 1000, rel=1e-6)


def test_logits_against_the_labels_never_reverse_the_order() -> None:
    labels = sigmoid(-LOGITS)
    found = fit_platt(LOGITS, labels)
    assert found.scale > 0
    np.testing.assert_allclose(found.apply(LOGITS), labels.mean(), atol=2e-3)


def test_calibration_lowers_ece_and_nll() -> None:
    truth = sigmoid(0.5 * LOGITS - 1)
    raw = calibration_report(Calibration().apply(LOGITS), truth)
    fitted = calibration_report(fit_platt(LOGITS, truth).apply(LOGITS), truth)
    assert raw.ece > 0.1
    assert fitted.ece < 1e-3
    assert fitted.nll < raw.nll
    assert fitted.brier < raw.brier


def test_ece_of_perfect_probabilities() -> None:
    probabilities = sigmoid(LOGITS)
    assert ece(probabilities, probabilities) == pytest.approx(0, abs=1e-15)
    drawn = (GENERATOR.random(len(LOGITS)) < probabilities).astype(float)
    assert ece(probabilities, drawn) < 0.03


def test_ece_does_not_depend_on_order_even_with_ties() -> None:
    labels = np.repeat([0.0, 1.0], 50)
    constant = np.full(100, 0.7)
    assert ece(constant, labels) == pytest.approx(0.2)
    mixed = np.tile([0.1, 0.1, 0.9, 0.4], 25)
    order = GENERATOR.permutation(100)
    assert ece(mixed, labels) == pytest.approx(ece(mixed[order], labels[order]), abs=1e-15)


def test_bins_hold_equal_mass() -> None:
    table = reliability_table(GENERATOR.permutation(np.linspace(0, 1, 150)), np.zeros(150))
    assert [row.count for row in table] == [10] * 15
    assert all(first.high < second.low for first, second in pairwise(table))


def test_brier_and_nll_by_hand() -> None:
    probabilities, labels = np.array([0.8, 0.5]), np.array([1.0, 0.25])
    assert brier(probabilities, labels) == pytest.approx((0.04 + 0.0625) / 2)
    assert nll(probabilities, labels) == pytest.approx((-np.log(0.8) - np.log(0.5)) / 2)
    assert np.isfinite(nll(np.array([0.0, 1.0]), np.array([1.0, 0.0])))


def test_json_round_trip() -> None:
    found = fit_platt(LOGITS, sigmoid(0.3 * LOGITS + 1))
    assert Calibration.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    "tree",
    [
        {"method": "platt", "scale": "1"},
        {"method": "isotonic"},
        {"scale": -1.0},
        {"scale": 0.0},
        {"bias": float("inf")},
        {"temperature": 1.0},
    ],
)
def test_settings_that_would_change_the_order_are_refused(tree: dict[str, object]) -> None:
    with pytest.raises(InputError, match="calibration: "):
        validate(Calibration, tree, "calibration")


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([1.0], [1.0], "2 pairs"),
        ([1.0, 2.0], [1.0], "equal length"),
        ([1.0, np.nan], [1.0, 0.0], "pair 1: the value is not finite"),
        ([1.0, 2.0], [1.0, 1.5], "pair 1: label 1.5"),
        ([1.0, 1.0], [1.0, 0.0], "not all equal"),
    ],
)
def test_bad_pairs(logits: list[float], labels: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_platt(np.array(logits), np.array(labels))
