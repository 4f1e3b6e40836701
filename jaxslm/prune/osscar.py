"""OSSCAR: which input groups of an output projection can go when the others are re-fitted (Meng et al., 2403.12983).

An output projection W [A, D] reads A inputs: the F neurons of an MLP, or the N H head values of attention. With the
Gram matrix H = sum x x^T + damping of its inputs, the pruned weights minimise

    loss(W') = 1/2 tr((W - W')^T H (W - W')) = 1/2 |X W - X W'|^2 + damping / 2 |W - W'|^2

over the W' whose rows are zero outside the kept groups. All D outputs share H, so the problem has A^2 numbers, not
(A D)^2. Groups are removed one at a time, each time the one whose loss, after the survivors are re-fitted, is least:

    loss of removing g = 1/2 tr(inv(Hinv_gg) W_g W_g^T),  Hinv -= Hinv_:g inv(Hinv_gg) Hinv_g:,
    W -= Hinv_:g inv(Hinv_gg) W_g

`exchange` then swaps a kept group for a removed one as long as the same loss falls.

Only W W^T enters the losses, so it is updated in place of W. Updates are kept as products and applied a block at a
time: the numbers are those of one-at-a-time removal, at the speed of matrix products. Everything is float64.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float

DAMPING = 0.01
"""Added to the diagonal of a Gram matrix, as a share of its mean (the default of both published implementations)."""

BLOCK = 64
"""Removed rows whose updates are applied together."""

EXCHANGE_GAIN = 1e-10
"""A swap must lower the loss by this share of the loss of removing everything: less is rounding."""

Square = Float[np.ndarray, "A A"]
Weight = Float[np.ndarray, "A D"]


def damped(gram_AA: Square) -> Square:
    """Returns the Gram matrix with `DAMPING` times its mean diagonal added to the diagonal."""
    return gram_AA + DAMPING * np.mean(np.diagonal(gram_AA)) * np.eye(len(gram_AA))


def loss(hessian_AA: Square, weight_AD: Weight, pruned_AD: Weight) -> float:
    """Returns 1/2 tr((W - W')^T H (W - W')), in units of squared outputs summed over tokens."""
    difference = weight_AD - pruned_AD
    return 0.5 * float(np.sum(difference * (hessian_AA @ difference)))


def least_squares(hessian_AA: Square, weight_AD: Weight, keep_A: Bool[np.ndarray, " A"]) -> Weight:
    """Returns the weights of least loss whose rows are zero outside `keep_A`. Cost: O(A^3 + A^2 D)."""
    fitted = np.zeros_like(weight_AD)
    to_removed = hessian_AA[np.ix_(keep_A, ~keep_A)] @ weight_AD[~keep_A]
    fitted[keep_A] = weight_AD[keep_A] + np.linalg.solve(hessian_AA[np.ix_(keep_A, keep_A)], to_removed)
    return fitted


def greedy(
    hessian_AA: Square, weight_AD: Weight, group_size: int, keep: int
) -> tuple[Bool[np.ndarray, " groups"], float]:
    """Removes groups of consecutive rows one at a time until `keep` are left.

    Cost: O(A^3 + A^2 D) time and four arrays of A^2 numbers, whatever the number of groups removed.

    Args:
        hessian_AA: positive definite. group_size: rows of a group; divides A.

    Returns:
        Which groups stay, and the loss of `least_squares` on them, as the updates predict it.
    """
    return next(_removals(hessian_AA, weight_AD, group_size, [keep]))


def removal_losses(
    hessian_AA: Square, weight_AD: Weight, group_size: int, keeps: Sequence[int]
) -> Float[np.ndarray, " keeps"]:
    """Returns the loss of `greedy` for each number of groups to keep, at the cost of the least of them alone.

    Args:
        keeps: ascending.
    """
    return np.array([lost for _, lost in _removals(hessian_AA, weight_AD, group_size, keeps[::-1])])[::-1]


def _removals(
    hessian_AA: Square, weight_AD: Weight, group_size: int, keeps: Sequence[int]
) -> Iterator[tuple[Bool[np.ndarray, " groups"], float]]:
    """Yields what `greedy` returns for each of `keeps`, which descend: one pass of removals."""
    groups = np.arange(len(weight_AD) // group_size)
    inverse, products = np.linalg.inv(hessian_AA), weight_AD @ weight_AD.T
    left, total = groups, 0.0
    for keep in keeps:
        while len(left) > keep:
            count = min(len(left) - keep, max(1, BLOCK // group_size))
            stays, lost, inverse, products = _remove(inverse, products, group_size, count)
            left, total = left[stays], total + lost
        yield np.isin(groups, left), total


def exchange(
    hessian_AA: Square, weight_AD: Weight, group_size: int, keep: Bool[np.ndarray, " groups"], most: int
) -> tuple[Bool[np.ndarray, " groups"], int]:
    """Swaps a kept group for a removed one, each time the pair that lowers the loss most, until none does.

    Cost: O(A^3 + A^2 D) once, O(A^2) per swap for single rows (O(A^2 group_size) otherwise), memory O(A^2).

    Args:
        keep: where to begin, as `greedy` returns it. most: swaps at most.

    Returns:
        Which groups stay, and how many swaps were made.
    """
    size, kept = group_size, keep.copy()
    swept, products = _swept(hessian_AA, weight_AD, np.repeat(kept, size))
    least_gain = EXCHANGE_GAIN * loss(hessian_AA, weight_AD, np.zeros_like(weight_AD))
    for made in range(most):
        inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
        if not len(outside):
            return kept, made
        changes = _exchange_losses(swept, products, size, inside, outside)
        removed, added = np.unravel_index(np.argmin(changes), changes.shape)
        if changes[removed, added] > -least_gain:
            return kept, made
        for group, sign in ((int(inside[removed]), -1.0), (int(outside[added]), 1.0)):
            _sweep(swept, products, slice(group * size, (group + 1) * size), sign)
            kept[group] = sign > 0
    return kept, most


def _swept(hessian_AA: Square, weight_AD: Weight, rows: Bool[np.ndarray, " A"]) -> tuple[Square, Square]:
    """Returns the Hessian swept on the kept rows S, and E E^T.

    Swept is -inv(H_SS) within S, inv(H_SS) H_SR beside it, and among the others, R, the Schur complement C. E holds the
    fitted weights of S and C W_R, what the removed rows would still explain.
    """
    inverse = np.linalg.inv(hessian_AA[np.ix_(rows, rows)])
    across = inverse @ hessian_AA[np.ix_(rows, ~rows)]
    complement = hessian_AA[np.ix_(~rows, ~rows)] - hessian_AA[np.ix_(~rows, rows)] @ across
    swept, explained = np.empty_like(hessian_AA), np.empty_like(weight_AD)
    swept[np.ix_(rows, rows)], swept[np.ix_(~rows, ~rows)] = -inverse, complement
    swept[np.ix_(rows, ~rows)], swept[np.ix_(~rows, rows)] = across, across.T
    explained[rows] = weight_AD[rows] + across @ weight_AD[~rows]
    explained[~rows] = complement @ weight_AD[~rows]
    return swept, explained @ explained.T


def _sweep(swept: Square, products: Square, rows: slice, sign: float) -> None:
    """Takes rows in (sign 1) or out (sign -1), in place: one update of the rank of a group for each array."""
    pivot = np.linalg.inv(swept[rows, rows])
    factor = swept[:, rows] @ pivot
    swept -= factor @ swept[rows]
    swept[:, rows], swept[rows], swept[rows, rows] = sign * factor, sign * factor.T, -pivot
    factor[rows] = np.eye(len(pivot)) - sign * pivot
    half = products[:, rows] - 0.5 * factor @ products[rows, rows]
    products -= factor @ half.T
    products -= half @ factor.T


def _exchange_losses(
    swept: Square, products: Square, size: int, inside: np.ndarray, outside: np.ndarray
) -> Float[np.ndarray, "inside outside"]:
    """By how much the loss changes when a kept group goes and a removed one comes back, for every pair."""
    times = np.multiply if size == 1 else np.matmul  # the same for blocks of one number, and faster
    shape = (len(swept) // size, size, len(swept) // size, size)
    swept_gg, products_gg = (each.reshape(shape).transpose(0, 2, 1, 3) for each in (swept, products))
    go, come = swept_gg[inside, inside][:, None], swept_gg[outside, outside]
    go_products, come_products = products_gg[inside, inside][:, None], products_gg[outside, outside]
    pairs = np.ix_(outside, inside)
    across = swept_gg[pairs].transpose(1, 0, 2, 3)  # [inside, outside, size, size]
    factor = times(across, np.linalg.inv(go))
    gone = come - times(factor, across.transpose(0, 1, 3, 2))
    cross = times(factor, products_gg[pairs].transpose(1, 0, 3, 2))
    square = times(times(factor, go_products), factor.transpose(0, 1, 3, 2))
    gone_products = come_products - cross - cross.transpose(0, 1, 3, 2) + square
    return _removal_losses(-go, go_products) - _removal_losses(gone, gone_products)


def _remove(
    inverse: Square, products: Square, size: int, count: int
) -> tuple[Bool[np.ndarray, " groups"], float, Float[np.ndarray, "A2 A2"], Float[np.ndarray, "A2 A2"]]:
    """Removes `count` groups one at a time.

    Returns which groups stay, the loss of the others, and the inverse and W W^T of those that stay. The updates are
    inverse - V^T V and products - V^T Q - Q^T V, with a row of V and of Q for each row removed.
    """
    groups = len(inverse) // size
    v_rows, q_rows = np.zeros((2, count * size, len(inverse)))
    on_diagonal = np.arange(groups)
    inverse_gg, products_gg = (
        each.reshape(groups, size, groups, size)[on_diagonal, :, on_diagonal] for each in (inverse, products)
    )
    stays, total = np.ones(groups, bool), 0.0
    for step in range(count):
        losses = np.where(stays, _removal_losses(inverse_gg, products_gg), np.inf)
        group = int(np.argmin(losses))
        total += float(losses[group])
        stays[group] = False
        rows, done = slice(group * size, (group + 1) * size), slice(0, step * size)
        v_done, q_done = v_rows[done], q_rows[done]
        from_inverse = inverse[rows] - v_done[:, rows].T @ v_done
        from_products = products[rows] - v_done[:, rows].T @ q_done - q_done[:, rows].T @ v_done
        root = np.linalg.inv(np.linalg.cholesky(from_inverse[:, rows]))  # root^T root = inv(Hinv_gg)
        v, k = root @ from_inverse, root @ from_products
        q = k - 0.5 * (k[:, rows] @ root.T) @ v
        v_rows[step * size : (step + 1) * size], q_rows[step * size : (step + 1) * size] = v, q
        v_g, q_g = (each.reshape(size, groups, size).transpose(1, 2, 0) for each in (v, q))
        cross = v_g @ q_g.transpose(0, 2, 1)
        inverse_gg = inverse_gg - v_g @ v_g.transpose(0, 2, 1)
        products_gg = products_gg - cross - cross.transpose(0, 2, 1)
        inverse_gg[group], products_gg[group] = np.eye(size), 0.0
    kept = np.repeat(stays, size)
    v_rows, q_rows = v_rows[:, kept], q_rows[:, kept]
    cross = v_rows.T @ q_rows
    inverse = inverse[np.ix_(kept, kept)] - v_rows.T @ v_rows
    return stays, total, inverse, products[np.ix_(kept, kept)] - cross - cross.T


def _removal_losses(inverse_gg: np.ndarray, products_gg: np.ndarray) -> np.ndarray:
    """1/2 tr(inv(Hinv_gg) W_g W_g^T) of each group, from blocks [..., size, size] of inverse and products."""
    if inverse_gg.shape[-1] == 1:
        losses: np.ndarray = 0.5 * products_gg[..., 0, 0] / inverse_gg[..., 0, 0]
        return losses
    return 0.5 * np.trace(np.linalg.solve(inverse_gg, products_gg), axis1=-2, axis2=-1)
