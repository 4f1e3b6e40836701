"""Losses for ranking and distillation. (stub: signatures are final)"""

from jaxtyping import Array, Bool, Float


def binary_cross_entropy(
    log_odds_RJ: Float[Array, "R J"], labels_RJ: Float[Array, "R J"], valid_RJ: Bool[Array, "R J"]
) -> Float[Array, ""]:
    raise NotImplementedError


def list_softmax(
    log_odds_RJ: Float[Array, "R J"], labels_RJ: Float[Array, "R J"], valid_RJ: Bool[Array, "R J"]
) -> Float[Array, ""]:
    raise NotImplementedError


def pairwise_logistic(
    log_odds_RJ: Float[Array, "R J"], labels_RJ: Float[Array, "R J"], valid_RJ: Bool[Array, "R J"]
) -> Float[Array, ""]:
    raise NotImplementedError


def regression_compatible(
    log_odds_RJ: Float[Array, "R J"], labels_RJ: Float[Array, "R J"], valid_RJ: Bool[Array, "R J"]
) -> Float[Array, ""]:
    """The list part alone: add it to binary_cross_entropy with a weight of about 0.3."""
    raise NotImplementedError


def distillation_kl(
    log_odds_RJ: Float[Array, "R J"],
    teacher_log_odds_RJ: Float[Array, "R J"],
    valid_RJ: Bool[Array, "R J"],
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """T^2 KL(teacher || student) of (no, yes). The teacher may be NaN where valid is False."""
    raise NotImplementedError


def list_kl(
    log_odds_RJ: Float[Array, "R J"],
    teacher_log_odds_RJ: Float[Array, "R J"],
    valid_RJ: Bool[Array, "R J"],
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) over the items of a list."""
    raise NotImplementedError


def hidden_cosine(
    student: Float[Array, "*n D"], teacher: Float[Array, "*n D"], valid: Bool[Array, "*n"]
) -> Float[Array, ""]:
    """Mean of 1 - cos over valid states."""
    raise NotImplementedError


def info_nce(
    queries_BD: Float[Array, "B D"],
    items_BD: Float[Array, "B D"],
    temperature: float,
    positive_BB: Bool[Array, "B B"] | None = None,
) -> Float[Array, ""]:
    """InfoNCE on cosines. positive[i, j], j != i: item j is no negative of query i; positive[i, i] False: pair i is empty."""
    raise NotImplementedError
