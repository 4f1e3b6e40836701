"""Losses for ranking and for distillation: pure functions that return one float32 scalar.

Lists are rows [R, J]: R queries with up to J items each. s_i is an item's log-odds z_yes - z_no, y_i its label in
[0, 1], sigma the logistic function. Items that are not valid, and lists that a formula cannot use, add nothing to the
value, to the average's count or to any gradient, whatever they hold (NaN included); a batch without any usable list
gives 0. No loss depends on the order of the items or on how much padding a list has.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def binary_cross_entropy(
    log_odds_RJ: Float[Array, "R J"], labels_RJ: Float[Array, "R J"], valid_RJ: Bool[Array, "R J"]
) -> Float[Array, ""]:
    """Returns the mean over valid items of -y log sigma(s) - (1 - y) log(1 - sigma(s)), in nats.

    Labels are probabilities: the minimum is at sigma(s) = y, so that scores are calibrated. Up to the labels' own
    entropy this is KL(y || sigma(s)).
    """
    s_RJ, y_RJ = _zero(log_odds_RJ, valid_RJ), _zero(labels_RJ, valid_RJ)
    return _mean(jax.nn.softplus(s_RJ) - y_RJ * s_RJ, valid_RJ)


def list_softmax(
    log_odds_RJ: Float[Array, "R J"], labels_RJ: Float[Array, "R J"], valid_RJ: Bool[Array, "R J"]
) -> Float[Array, ""]:
    """Returns the mean over lists of -sum_i q_i log softmax(s)_i with q_i = y_i / sum_j y_j, in nats.

    A list without a label above 0 is left out. Not calibrated: adding a constant to a list's scores changes nothing.
    Source: Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach" (ListNet), ICML 2007, with
    labels normalised by their sum, as in Bruch et al., ICTIR 2019.
    """
    q_RJ, used_R = _normalised(labels_RJ, valid_RJ)
    return _mean(-jnp.sum(q_RJ * _log_softmax(log_odds_RJ, valid_RJ), axis=1), used_R)


def pairwise_logistic(
    log_odds_RJ: Float[Array, "R J"], labels_RJ: Float[Array, "R J"], valid_RJ: Bool[Array, "R J"]
) -> Float[Array, ""]:
    """Returns the mean over the pairs of a list with y_i > y_j of log(1 + exp(-(s_i - s_j))), in nats.

    The mean is over all pairs of the batch, so that a list counts by its number of pairs; ties make no pair.
    Source: Burges et al., "Learning to Rank Using Gradient Descent" (RankNet), ICML 2005.
    """
    s_RJ, y_RJ = _zero(log_odds_RJ, valid_RJ), _zero(labels_RJ, valid_RJ)
    pair_RJJ = (y_RJ[:, :, None] > y_RJ[:, None, :]) & valid_RJ[:, :, None] & valid_RJ[:, None, :]
    return _mean(jax.nn.softplus(s_RJ[:, None, :] - s_RJ[:, :, None]), pair_RJJ)


def regression_compatible(
    log_odds_RJ: Float[Array, "R J"], labels_RJ: Float[Array, "R J"], valid_RJ: Bool[Array, "R J"]
) -> Float[Array, ""]:
    """Returns the mean over lists of -sum_i q_i log(sigma(s_i) / sum_j sigma(s_j)) with q_i = y_i / sum_j y_j, in nats.

    The list part of RCR alone: add it, times about 0.3, to `binary_cross_entropy`. Both have a minimum at
    sigma(s) = y, so that, unlike `list_softmax`, it does not pull against calibration. A list without a label above 0
    is left out. Source: Bai et al., "Regression Compatible Listwise Objectives for Calibrated Ranking with Binary
    Relevance", arXiv 2211.01494.
    """
    q_RJ, used_R = _normalised(labels_RJ, valid_RJ)
    log_sigma_RJ = jax.nn.log_sigmoid(_zero(log_odds_RJ, valid_RJ))
    return _mean(-jnp.sum(q_RJ * _log_softmax(log_sigma_RJ, valid_RJ), axis=1), used_R)


def distillation_kl(
    log_odds_RJ: Float[Array, "R J"],
    teacher_log_odds_RJ: Float[Array, "R J"],
    valid_RJ: Bool[Array, "R J"],
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Returns the mean over valid items of T^2 KL(p_teacher || p_student), p = softmax of the (no, yes) logits / T.

    Two logits enter a softmax through their difference alone, so log-odds t (teacher) and s are enough:
    KL = p (log sigma(t / T) - log sigma(s / T)) + (1 - p) (log sigma(-t / T) - log sigma(-s / T)), p = sigma(t / T).
    T^2 keeps the gradient's size as T grows. In nats times T^2. Source: Hinton et al., arXiv 1503.02531.

    Args:
        teacher_log_odds_RJ: z_yes - z_no of the teacher; no gradient flows into it. May be NaN where not valid.
        valid_RJ: items that both sides have.
        temperature: T > 0.
    """
    s_RJ = _zero(log_odds_RJ, valid_RJ) / temperature
    t_RJ = jax.lax.stop_gradient(_zero(teacher_log_odds_RJ, valid_RJ)) / temperature
    log_sigmoid = jax.nn.log_sigmoid
    kl_RJ = jax.nn.sigmoid(t_RJ) * (log_sigmoid(t_RJ) - log_sigmoid(s_RJ))
    kl_RJ += jax.nn.sigmoid(-t_RJ) * (log_sigmoid(-t_RJ) - log_sigmoid(-s_RJ))
    return temperature**2 * _mean(kl_RJ, valid_RJ)


def list_kl(
    log_odds_RJ: Float[Array, "R J"],
    teacher_log_odds_RJ: Float[Array, "R J"],
    valid_RJ: Bool[Array, "R J"],
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Returns the mean over lists of T^2 KL(softmax(t / T) || softmax(s / T)) over a list's valid items.

    Hands on the teacher's order and gaps within a list, not its level. A list with fewer than two valid items says
    nothing and is left out. In nats times T^2. Arguments as `distillation_kl`.
    """
    teacher_RJ = jax.lax.stop_gradient(_log_softmax(_zero(teacher_log_odds_RJ, valid_RJ) / temperature, valid_RJ))
    student_RJ = _log_softmax(_zero(log_odds_RJ, valid_RJ) / temperature, valid_RJ)
    kl_R = jnp.sum(jnp.where(valid_RJ, jnp.exp(teacher_RJ) * (teacher_RJ - student_RJ), 0), axis=1)
    return temperature**2 * _mean(kl_R, jnp.sum(valid_RJ, axis=1) > 1)


def hidden_cosine(
    student: Float[Array, "*n D"], teacher: Float[Array, "*n D"], valid: Bool[Array, "*n"]
) -> Float[Array, ""]:
    """Returns the mean over valid states of 1 - cos(student, teacher), in [0, 2]; a state of zeros has cosine 0.

    Sums in float32 whatever the states' type. No gradient flows into the teacher.
    """
    student_unit = _unit(_zero(student, valid[..., None]))
    teacher_unit = _unit(_zero(jax.lax.stop_gradient(teacher), valid[..., None]))
    return _mean(1 - jnp.sum(student_unit * teacher_unit, axis=-1), valid)


def info_nce(
    queries_BD: Float[Array, "B D"],
    items_BD: Float[Array, "B D"],
    temperature: float,
    positive_BB: Bool[Array, "B B"] | None = None,
) -> Float[Array, ""]:
    """Returns the mean over pairs i of -log(exp(c_ii / tau) / sum_j exp(c_ij / tau)), c = cosine of query and item.

    Every other pair's item is a negative of query i, unless it is known to be relevant too. Cost 2 B^2 D FLOP.
    Source: van den Oord et al., arXiv 1807.03748; in-batch negatives as in Karpukhin et al., EMNLP 2020.

    Args:
        temperature: tau > 0; 0.05 is usual.
        positive_BB: [i, j] with j != i: item j is relevant to query i, so it leaves the sum. [i, i] False: pair i is
            empty, so it counts neither as a pair nor as a negative. None: all pairs are real, no others are relevant.
    """
    B = queries_BD.shape[0]
    diagonal_BB = jnp.eye(B, dtype=bool)
    positive_BB = diagonal_BB if positive_BB is None else positive_BB
    real_B = jnp.diagonal(positive_BB)
    queries_BD = _unit(_zero(queries_BD, real_B[:, None]))
    items_BD = _unit(_zero(items_BD, real_B[:, None]))
    cosine_BB = jnp.einsum("BD,CD->BC", queries_BD, items_BD)
    counted_BB = (diagonal_BB | ~positive_BB) & real_B[:, None] & real_B[None, :]
    return _mean(-jnp.diagonal(_log_softmax(cosine_BB / temperature, counted_BB)), real_B)


def _zero(x: Array, valid: Array) -> Array:
    """x in float32 or wider, 0 where not valid: what stands there reaches neither values nor gradients."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(valid, x, 0)


def _mean(values: Array, counted: Array) -> Array:
    """The mean of the counted values; 0 if there are none."""
    total = jnp.sum(jnp.where(counted, values, 0))
    return total / jnp.maximum(jnp.sum(counted, dtype=total.dtype), 1)


def _normalised(labels_RJ: Array, valid_RJ: Array) -> tuple[Array, Array]:
    """Labels divided by their sum in each list, and which lists have a sum above 0."""
    y_RJ = _zero(labels_RJ, valid_RJ)
    total_R = jnp.sum(y_RJ, axis=1)
    used_R = total_R > 0
    return y_RJ / jnp.where(used_R, total_R, 1)[:, None], used_R


def _log_softmax(x_RJ: Array, valid_RJ: Array) -> Array:
    """log softmax over the valid items of each row; 0 at the others, so that all rows are finite."""
    x_RJ = _zero(x_RJ, valid_RJ)
    lowest = jnp.finfo(x_RJ.dtype).min
    log_total_R = jax.nn.logsumexp(jnp.where(valid_RJ, x_RJ, lowest), axis=1)
    log_total_R = jnp.where(jnp.any(valid_RJ, axis=1), log_total_R, 0)
    return jnp.where(valid_RJ, x_RJ - log_total_R[:, None], 0)


def _unit(x: Array) -> Array:
    """Vectors of length 1; a vector of zeros stays so, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))
