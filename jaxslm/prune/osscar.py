"""OSSCAR: which input groups of an output projection can go when the others are re-fitted (Meng et al., 2403.12983).

An output projection W [A, D] reads A inputs: the F neurons of an MLP, or the N H head values of attention. With the
Gram matrix H = sum x x^T + damping of its inputs, the pruned weights minimise

    loss(W') = 1/2 tr((W - W')^T H (W - W')) = 1/2 |X W - X W'|^2 + damping / 2 |W - W'|^2

over the W' whose rows are zero outside the kept groups. All D outputs share H, so the problem has A^2 numbers, not
(A D)^2. Groups are removed one at a time, each time the one whose loss, after the survivors are re-fitted, is least:

    loss of removing g = 1/2 tr(inv(Hinv_gg) W_g W_g^T),  Hinv -= Hinv_:g inv(Hinv_gg) Hinv_g:,
    W -= Hinv_:g inv(Hinv_gg) W_g

Only W W^T enters the losses, so it is updated in place of W. Updates are kept as products and applied a block at a
time: the numbers are those of one-at-a-time removal, at the speed of matrix products. Everything is float64.
"""

import numpy as np
from jaxtyping import Bool, Float

DAMPING = 0.01
"""Added to the diagonal of a Gram matrix, as a share of its mean (the default of both published implementations)."""

BLOCK = 64
"""Removed rows whose updates are applied together."""

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
    left = np.arange(len(weight_AD) // group_size)
    inverse, products = np.linalg.inv(hessian_AA), weight_AD @ weight_AD.T
    total = 0.0
    while len(left) > keep:
        count = min(len(left) - keep, max(1, BLOCK // group_size))
        stays, lost, inverse, products = _remove(inverse, products, group_size, count)
        left, total = left[stays], total + lost
    return np.isin(np.arange(len(weight_AD) // group_size), left), total


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
    """The loss of removing each group alone, from the diagonal blocks [groups, size, size] of inverse and products."""
    if inverse_gg.shape[1] == 1:
        losses: np.ndarray = 0.5 * products_gg[:, 0, 0] / inverse_gg[:, 0, 0]
        return losses
    return 0.5 * np.trace(np.linalg.solve(inverse_gg, products_gg), axis1=1, axis2=2)
