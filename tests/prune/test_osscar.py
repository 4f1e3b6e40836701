"""OSSCAR on tiny problems, against brute force in float64."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslm.prune.osscar import BLOCK, damped, exchange, greedy, least_squares, loss, removal_losses


def problem(
    inputs: int, seed: int = 0, outputs: int = 3, tokens: int = 60
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Correlated inputs X, their damped Gram matrix, and weights."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((tokens, inputs)) @ generator.standard_normal((inputs, inputs))
    return x, damped(x.T @ x), generator.standard_normal((inputs, 3))


def fitted_loss(hessian: np.ndarray, weight: np.ndarray, keep: np.ndarray, size: int) -> float:
    return loss(hessian, weight, least_squares(hessian, weight, np.repeat(keep, size)))


sizes = st.tuples(st.integers(1, 3), st.integers(2, 7), st.integers(0, 1000))


@settings(max_examples=30, deadline=None)
@given(sizes=sizes)
def test_each_removal_is_the_best_one_and_costs_what_is_predicted(sizes: tuple[int, int, int]) -> None:
    """At each step every group that is left is removed on trial and the others re-fitted from scratch."""
    size, groups, seed = sizes
    _, hessian, weight = problem(size * groups, seed)
    before = np.ones(groups, bool)
    for keep in range(groups - 1, 0, -1):
        after, predicted = greedy(hessian, weight, size, keep)
        trials = {}
        for group in np.flatnonzero(before):
            trial = before.copy()
            trial[group] = False
            trials[int(group)] = fitted_loss(hessian, weight, trial, size)
        removed = np.flatnonzero(before & ~after).tolist()
        assert removed == [min(trials, key=lambda group: trials[group])]
        assert predicted == pytest.approx(trials[removed[0]], rel=1e-6)
        before = after


def test_removal_by_blocks_is_removal_one_at_a_time() -> None:
    """More rows than a block holds: the same choice and loss as when updates are never put off."""
    _, hessian, weight = problem(2 * BLOCK + 9, tokens=400)
    keep, predicted = greedy(hessian, weight, 1, 5)
    inverse, fitted, left = np.linalg.inv(hessian), weight.copy(), np.ones(len(weight), bool)
    while left.sum() > 5:
        losses = np.where(left, 0.5 * np.sum(fitted**2, axis=1) / np.diagonal(inverse), np.inf)
        row = int(np.argmin(losses))
        column = inverse[:, row] / inverse[row, row]
        fitted -= np.outer(column, fitted[row])
        inverse -= np.outer(column, inverse[row])
        left[row], inverse[row, row], fitted[row] = False, 1.0, 0.0
    np.testing.assert_array_equal(keep, left)
    assert predicted == pytest.approx(fitted_loss(hessian, weight, keep, 1), rel=1e-6)


def test_losses_of_every_number_kept_are_those_of_separate_removals() -> None:
    _, hessian, weight = problem(2 * (BLOCK + 9), tokens=400)
    keeps = [1, 7, BLOCK, BLOCK + 9]
    losses = removal_losses(hessian, weight, 2, keeps)
    expected = [greedy(hessian, weight, 2, keep)[1] for keep in keeps]
    np.testing.assert_allclose(losses, expected, rtol=1e-9, atol=0)
    assert losses[-1] == 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_least_squares_has_the_least_loss(seed: int) -> None:
    x, hessian, weight = problem(6, seed)
    keep = np.array([True, False, True, True, False, True])
    fitted = least_squares(hessian, weight, keep)
    assert (fitted[~keep] == 0).all()
    best = loss(hessian, weight, fitted)
    ridge = hessian[0, 0] - (x.T @ x)[0, 0]
    by_hand = 0.5 * (np.sum((x @ (weight - fitted)) ** 2) + ridge * np.sum((weight - fitted) ** 2))
    assert best == pytest.approx(by_hand, rel=1e-9)
    generator = np.random.default_rng(seed)
    for scale in (1e-3, 1.0):
        other = fitted + scale * generator.standard_normal(fitted.shape) * keep[:, None]
        assert loss(hessian, weight, other) > best


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_greedy_is_close_to_the_best_of_all_choices(seed: int) -> None:
    _, hessian, weight = problem(8, seed)
    keep, predicted = greedy(hessian, weight, 1, 4)
    losses = [fitted_loss(hessian, weight, np.isin(np.arange(8), chosen), 1) for chosen in combinations(range(8), 4)]
    assert keep.sum() == 4
    assert min(losses) <= predicted * (1 + 1e-9)
    assert predicted <= np.median(losses)


def exchanged_loss(hessian: np.ndarray, weight: np.ndarray, keep: np.ndarray, size: int, most: int) -> float:
    after, made = exchange(hessian, weight, size, keep, most)
    assert after.sum() == keep.sum()
    assert (after & ~keep).sum() <= made <= most
    return fitted_loss(hessian, weight, after, size)


@settings(max_examples=30, deadline=None)
@given(sizes=sizes, data=st.data())
def test_each_swap_is_the_best_of_all_pairs(sizes: tuple[int, int, int], data: st.DataObject) -> None:
    """From any choice; every pair is tried from scratch, and the loss is never higher than before."""
    size, groups, seed = sizes
    _, hessian, weight = problem(size * groups, seed)
    keep = np.zeros(groups, bool)
    keep[data.draw(st.permutations(range(groups)))[: data.draw(st.integers(1, groups - 1))]] = True
    before, trials = fitted_loss(hessian, weight, keep, size), []
    for gone in np.flatnonzero(keep):
        for back in np.flatnonzero(~keep):
            trial = keep.copy()
            trial[gone], trial[back] = False, True
            trials.append(fitted_loss(hessian, weight, trial, size))
    losses = [exchanged_loss(hessian, weight, keep, size, most) for most in range(6)]
    assert losses[0] == before
    assert losses[1] == pytest.approx(min(before, *trials), rel=1e-6)
    assert all(after <= former * (1 + 1e-9) for former, after in pairwise(losses))


def test_swaps_reach_the_best_of_all_choices_more_often() -> None:
    best = {"greedy": 0, "swaps": 0}
    for seed in range(40):
        _, hessian, weight = problem(8, seed)
        choices = (np.isin(np.arange(8), chosen) for chosen in combinations(range(8), 4))
        least = min(fitted_loss(hessian, weight, choice, 1) for choice in choices) * (1 + 1e-9)
        keep, predicted = greedy(hessian, weight, 1, 4)
        found = exchanged_loss(hessian, weight, keep, 1, 20)
        assert predicted > least or found <= least
        best["greedy"] += predicted <= least
        best["swaps"] += found <= least
    assert best["swaps"] > best["greedy"]


def test_nothing_to_swap_with() -> None:
    _, hessian, weight = problem(6)
    keep, made = exchange(hessian, weight, 2, np.ones(3, bool), 5)
    assert (keep.all(), made) == (True, 0)


def test_a_duplicate_costs_nothing() -> None:
    """Of two equal inputs one goes first, at (nearly) no loss: what criteria that look at one input cannot see."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((200, 5))
    x[:, 3] = x[:, 1] = 10 * x[:, 1]
    weight = generator.standard_normal((5, 4))
    hessian = x.T @ x + 1e-6 * np.eye(5)
    keep, predicted = greedy(hessian, weight, 1, 4)
    assert keep.sum() == 4
    assert not (keep[1] and keep[3])
    assert predicted < 1e-6 * loss(hessian, weight, np.zeros_like(weight))


def test_keeping_everything_changes_nothing() -> None:
    _, hessian, weight = problem(6)
    keep, predicted = greedy(hessian, weight, 2, 3)
    assert keep.all()
    assert predicted == 0
    np.testing.assert_array_equal(least_squares(hessian, weight, np.ones(6, bool)), weight)
