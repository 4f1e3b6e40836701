"""Ways to choose the groups of an output projection that stay, each with and without the least-squares re-fit."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from jaxslm.prune.osscar import damped, exchange, greedy, least_squares

Criterion = Literal["osscar", "flap", "wanda", "activation", "magnitude", "random"]
"""osscar: least loss after re-fitting (`jaxslm.prune.osscar`). The others give each row j of the projection W a number,
summed over the rows of a group, and keep the largest:

flap        variance of input j times |W_j|^2 (An et al., 2312.11983, without its bias terms)
wanda       |X_j| times sum |W_j| (Sun et al., 2306.11695, by rows)
activation  |X_j|^2 (Muralidharan et al., 2407.14679)
magnitude   |W_j|^2
random      a seeded permutation: the floor
"""


@dataclass(frozen=True)
class Projection:
    """An output projection and its inputs on calibration tokens, all float64.

    Attributes:
        weight: its weights; A rows in groups of `group_size`.
        gram: sum over tokens of x x^T. total: sum over tokens of x. tokens: how many.
    """

    weight: Float[np.ndarray, "A D"]
    gram: Float[np.ndarray, "A A"]
    total: Float[np.ndarray, " A"]
    tokens: int
    group_size: int = 1

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.weight) // self.group_size

    def relative_error(self, pruned_AD: Float[np.ndarray, "A D"]) -> float:
        """Returns |X W - X W'|^2 / |X W|^2 over the calibration tokens; 0 where the dense outputs are all zero."""
        lost, dense = (float(np.sum(each * (self.gram @ each))) for each in (self.weight - pruned_AD, self.weight))
        return lost / dense if dense > 0 else 0.0


@dataclass(frozen=True)
class PrunedProjection:
    """Which groups stay, the new weights with zero rows in the others, and `Projection.relative_error` of them."""

    keep: Bool[np.ndarray, " groups"]
    weight: Float[np.ndarray, "A D"]
    error: float


def prune_projection(
    projection: Projection, criterion: Criterion, keep: int, *, refit: bool = True, swaps: int = 0, seed: int = 0
) -> PrunedProjection:
    """Returns the projection with `keep` of its groups.

    Args:
        refit: the kept rows become the least-squares fit to the dense outputs; otherwise they stay as they are.
        swaps: most exchanges after osscar's choice. seed: of the random criterion.
    """
    hessian = damped(projection.gram)
    weight, size = projection.weight, projection.group_size
    if criterion == "osscar":
        # Damping alone would give inputs that are always zero a price that grows with their weights.
        alive = np.diagonal(projection.gram) > 0
        living = np.where(alive[:, None], weight, 0.0)
        kept, _ = greedy(hessian, living, size, keep)
        if swaps:
            kept, _ = exchange(hessian, living, size, kept, swaps)
    else:
        kept = np.zeros(projection.groups, bool)
        kept[np.argsort(-_importance(projection, criterion, seed), kind="stable")[:keep]] = True
    rows = np.repeat(kept, size)
    pruned = least_squares(hessian, weight, rows) if refit else np.where(rows[:, None], weight, 0.0)
    return PrunedProjection(kept, pruned, projection.relative_error(pruned))


def _importance(projection: Projection, criterion: Criterion, seed: int) -> Float[np.ndarray, " groups"]:
    squares_A = np.diagonal(projection.gram)
    norms_A = np.sum(np.square(projection.weight), axis=1)
    if criterion == "random":
        return np.random.default_rng(seed).permutation(projection.groups).astype(np.float64)
    if criterion == "magnitude":
        rows = norms_A
    elif criterion == "activation":
        rows = squares_A
    elif criterion == "wanda":
        rows = np.sqrt(squares_A) * np.sum(np.abs(projection.weight), axis=1)
    else:
        mean_A = projection.total / projection.tokens
        rows = (squares_A / projection.tokens - np.square(mean_A)) * norms_A
    return rows.reshape(projection.groups, projection.group_size).sum(axis=1)
