"""Criteria share one interface; re-fitting never hurts; OSSCAR loses least where inputs are redundant."""

from typing import get_args

import numpy as np
import pytest

from jaxslm.prune.criteria import Criterion, Projection, prune_projection

CRITERIA = get_args(Criterion)


def projection(inputs: int = 24, group_size: int = 1, seed: int = 0, rank: int = 8) -> Projection:
    """Inputs that are nearly a few numbers in disguise."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((300, rank)) @ generator.standard_normal((rank, inputs))
    x = (x + 0.1 * generator.standard_normal(x.shape)) * np.exp(generator.standard_normal(inputs))
    weight = generator.standard_normal((inputs, 5))
    return Projection(weight, x.T @ x, x.sum(axis=0), len(x), group_size)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("group_size", [1, 4])
def test_any_criterion(criterion: Criterion, group_size: int) -> None:
    whole = projection(group_size=group_size)
    keep = whole.groups // 2
    fitted, plain = (prune_projection(whole, criterion, keep, refit=refit, seed=3) for refit in (True, False))
    np.testing.assert_array_equal(fitted.keep, plain.keep)
    assert fitted.keep.sum() == keep
    rows = np.repeat(fitted.keep, group_size)
    assert (fitted.weight[~rows] == 0).all()
    assert (plain.weight[~rows] == 0).all()
    np.testing.assert_array_equal(plain.weight[rows], whole.weight[rows])
    assert 0 < fitted.error < plain.error
    everything = prune_projection(whole, criterion, whole.groups)
    np.testing.assert_array_equal(everything.weight, whole.weight)
    assert everything.error == 0


def test_osscar_loses_least_where_inputs_are_redundant() -> None:
    problems = [projection(seed=seed) for seed in range(6)]
    errors = {
        criterion: sum(prune_projection(whole, criterion, 10).error for whole in problems) for criterion in CRITERIA
    }
    assert min(errors, key=lambda name: errors[name]) == "osscar"


@pytest.mark.parametrize("group_size", [1, 4])
def test_swaps_lower_the_error_and_none_are_the_default(group_size: int) -> None:
    problems = [projection(12 * group_size, group_size, seed) for seed in range(12)]
    plain = [prune_projection(whole, "osscar", whole.groups // 3) for whole in problems]
    zero, swapped = (
        [prune_projection(whole, "osscar", whole.groups // 3, swaps=swaps) for whole in problems] for swaps in (0, 20)
    )
    for default, none in zip(plain, zero, strict=True):
        np.testing.assert_array_equal(default.weight, none.weight)
    assert sum(each.error for each in swapped) < sum(each.error for each in plain)


def test_relative_error_is_that_of_the_outputs() -> None:
    generator = np.random.default_rng(0)
    x, weight = generator.standard_normal((50, 6)), generator.standard_normal((6, 3))
    whole = Projection(weight, x.T @ x, x.sum(axis=0), 50)
    other = weight + generator.standard_normal(weight.shape)
    expected = np.sum((x @ weight - x @ other) ** 2) / np.sum((x @ weight) ** 2)
    assert whole.relative_error(other) == pytest.approx(expected)
    assert Projection(0 * weight, whole.gram, whole.total, 50).relative_error(other) == 0


@pytest.mark.parametrize(
    ("criterion", "kept"), [("magnitude", 0), ("activation", 1), ("flap", 2), ("wanda", 3), ("random", None)]
)
def test_what_each_baseline_looks_at(criterion: Criterion, kept: int | None) -> None:
    """One input each has the largest weight, size, variance and size times weight."""
    x = np.array([[0.1, 9.0, 2.0, 7.0], [0.1, 9.1, -2.0, 7.1]])
    weight = np.array([[5.0], [0.3], [1.0], [0.5]])
    whole = Projection(weight, x.T @ x, x.sum(axis=0), 2)
    found = np.flatnonzero(prune_projection(whole, criterion, 1, refit=False).keep)
    assert found.tolist() == [kept] if kept is not None else len(found) == 1


def test_random_differs_by_seed_and_repeats() -> None:
    whole = projection()
    keeps = [prune_projection(whole, "random", 12, seed=seed).keep.tolist() for seed in (0, 0, 1, 2)]
    assert keeps[0] == keeps[1]
    assert keeps[2] != keeps[0] != keeps[3]


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in ("magnitude", "random")])
def test_dead_inputs_go_first(criterion: Criterion) -> None:
    """Neurons that are zero on every token, whatever their weights."""
    whole = projection()
    dead = np.isin(np.arange(24), [3, 11, 12])
    alive = np.outer(~dead, ~dead)
    weight = whole.weight * np.where(dead, 100.0, 1.0)[:, None]
    killed = Projection(weight, np.where(alive, whole.gram, 0.0), np.where(dead, 0.0, whole.total), whole.tokens)
    result = prune_projection(killed, criterion, 21)
    assert result.keep.tolist() == (~dead).tolist()
    assert result.error == pytest.approx(0, abs=1e-12)
