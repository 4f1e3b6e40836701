"""Losses against rax, finite differences in float64, and the invariances that their docstrings promise."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rax
from jax.test_util import check_grads

from jaxslm.train import losses

R, J = 5, 9
Loss = Callable[..., jax.Array]


def of_numpy(loss: Loss, **settings: float) -> Loss:
    """The compiled loss, with numpy arrays turned into JAX arrays: the losses themselves take those alone."""
    compiled = jax.jit(partial(loss, **settings))
    return lambda *arrays: compiled(*(jnp.asarray(array) for array in arrays))


binary_cross_entropy = of_numpy(losses.binary_cross_entropy)
list_softmax = of_numpy(losses.list_softmax)
pairwise_logistic = of_numpy(losses.pairwise_logistic)
regression_compatible = of_numpy(losses.regression_compatible)
T = 2.5
distillation_kl = of_numpy(losses.distillation_kl, temperature=T)
list_kl = of_numpy(losses.list_kl, temperature=T)
hidden_cosine = of_numpy(losses.hidden_cosine)
TAU = 0.2
info_nce = of_numpy(lambda queries, items, positive=None: losses.info_nce(queries, items, TAU, positive))

LABEL_LOSSES = {
    "binary_cross_entropy": binary_cross_entropy,
    "list_softmax": list_softmax,
    "pairwise_logistic": pairwise_logistic,
    "regression_compatible": regression_compatible,
}
TEACHER_LOSSES = {
    "distillation_kl": distillation_kl,
    "list_kl": list_kl,
}
ALL_LOSSES = LABEL_LOSSES | TEACHER_LOSSES


def lists(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, labels (grades in thirds) and validity; every list has a relevant item, an irrelevant one and padding."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(R, J)).astype(np.float32) * 3
    labels = (generator.integers(0, 4, size=(R, J)) / 3).astype(np.float32)
    labels[:, 0], labels[:, 1] = 1, 0
    valid = generator.random((R, J)) < 0.8
    valid[:, :2], valid[:, 2] = True, False
    return scores, labels, valid


@pytest.fixture(params=ALL_LOSSES)
def loss(request: pytest.FixtureRequest) -> Loss:
    """Each loss over lists in turn; the teacher's log-odds stand where labels would."""
    return ALL_LOSSES[request.param]


def test_binary_cross_entropy_equals_rax() -> None:
    scores, labels, valid = lists()
    ours = binary_cross_entropy(scores, labels, valid)
    theirs = rax.pointwise_sigmoid_loss(scores, labels, where=valid, reduce_fn=jnp.mean)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_pairwise_logistic_equals_rax() -> None:
    scores, labels, valid = lists()
    ours = pairwise_logistic(scores, labels, valid)
    pairs = (labels[:, :, None] > labels[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    # rax sums over pairs by its own mask when told to sum; its mean counts pairs without a preference too.
    total = rax.pairwise_logistic_loss(scores, labels, where=valid, reduce_fn=jnp.sum)
    np.testing.assert_allclose(ours, total / pairs.sum(), rtol=1e-6)


def test_list_softmax_equals_rax() -> None:
    scores, labels, valid = lists()
    normalise = rax.utils.normalize_probabilities
    theirs = rax.softmax_loss(scores, labels, where=valid, label_fn=normalise, reduce_fn=jnp.mean)
    np.testing.assert_allclose(list_softmax(scores, labels, valid), theirs, rtol=1e-6)


def test_regression_compatible_equals_rax_on_log_sigmoids() -> None:
    # log(p_i / sum p_j) is the log softmax of log p.
    scores, labels, valid = lists()
    normalise = rax.utils.normalize_probabilities
    log_p = jax.nn.log_sigmoid(scores)
    theirs = rax.softmax_loss(log_p, labels, where=valid, label_fn=normalise, reduce_fn=jnp.mean)
    np.testing.assert_allclose(regression_compatible(scores, labels, valid), theirs, rtol=1e-6)


def test_regression_compatible_agrees_with_cross_entropy_at_the_labels() -> None:
    labels = np.array([[0.9, 0.5, 0.3]], np.float32)
    valid = np.ones_like(labels, bool)
    scores = np.log(labels / (1 - labels))
    for one in (binary_cross_entropy, regression_compatible):
        np.testing.assert_allclose(jax.grad(one)(scores, labels, valid), 0, atol=1e-7)
    assert np.abs(jax.grad(list_softmax)(scores, labels, valid)).max() > 0.01


def test_distillation_kl_equals_the_kl_of_two_logits() -> None:
    generator = np.random.default_rng(1)
    student, teacher = generator.normal(size=(2, R, J, 2)).astype(np.float32)
    p, log_q = jax.nn.softmax(teacher / T), jax.nn.log_softmax(student / T)
    expected = T**2 * jnp.mean(jnp.sum(p * (jnp.log(p) - log_q), axis=-1))
    got = distillation_kl(student[..., 1] - student[..., 0], teacher[..., 1] - teacher[..., 0], np.ones((R, J), bool))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_list_kl_by_hand() -> None:
    scores, teacher, valid = lists()
    expected = []
    for row in range(R):
        t, s = (np.exp(x[row][valid[row]].astype(np.float64) / T) for x in (teacher, scores))
        p, q = t / t.sum(), s / s.sum()
        expected.append(T**2 * np.sum(p * np.log(p / q)))
    np.testing.assert_allclose(list_kl(scores, teacher, valid), np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("name", TEACHER_LOSSES)
def test_distillation_is_zero_at_the_teacher_and_leaves_it_alone(name: str) -> None:
    scores, _, valid = lists()
    value, gradients = jax.value_and_grad(TEACHER_LOSSES[name], argnums=(0, 1))(scores, scores, valid)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradients[0], 0, atol=1e-6)
    np.testing.assert_array_equal(gradients[1], 0)


def test_gradients_equal_finite_differences(loss: Loss) -> None:
    with jax.enable_x64(True):
        scores, labels, valid = lists()
        labels_64 = jnp.asarray(labels, jnp.float64)
        check_grads(lambda s: loss(s, labels_64, valid), (jnp.asarray(scores, jnp.float64),), order=1, modes=["rev"])


def test_order_and_padding_change_nothing(loss: Loss) -> None:
    scores, labels, valid = lists()
    expected, gradient = jax.value_and_grad(loss)(scores, labels, valid)
    order = np.random.default_rng(2).permutation(J)
    np.testing.assert_allclose(loss(scores[:, order], labels[:, order], valid[:, order]), expected, rtol=1e-6)
    wide = [np.full((R + 1, J + 3), np.nan, np.float32) for _ in range(2)]
    wide_valid = np.zeros((R + 1, J + 3), bool)
    for target, source in zip((*wide, wide_valid), (scores, labels, valid), strict=True):
        target[:R, :J] = source
    with_gradient = jax.jit(jax.value_and_grad(loss))
    for garbage in (np.nan, np.inf, 1e9):
        for array in wide:
            array[~wide_valid] = garbage
        value, wide_gradient = with_gradient(*(jnp.asarray(array) for array in (*wide, wide_valid)))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(wide_gradient[:R, :J], gradient, rtol=1e-5, atol=1e-8)
        np.testing.assert_array_equal(wide_gradient[~wide_valid], 0)


def test_a_batch_without_a_usable_list_is_zero(loss: Loss) -> None:
    scores, labels, _ = lists()
    value, gradient = jax.value_and_grad(loss)(scores, labels, np.zeros((R, J), bool))
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", ["list_softmax", "pairwise_logistic", "regression_compatible"])
def test_lists_without_a_relevant_item_count_for_nothing(name: str) -> None:
    scores, labels, valid = lists()
    expected = LABEL_LOSSES[name](scores[1:], labels[1:], valid[1:])
    labels[0] = 0
    value, gradient = jax.value_and_grad(LABEL_LOSSES[name])(scores, labels, valid)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(gradient[0], 0)


def test_a_list_of_one_item_has_no_order_to_hand_on() -> None:
    scores, teacher, valid = lists()
    expected = list_kl(scores[1:], teacher[1:], valid[1:])
    valid[0] = False
    valid[0, 3] = True
    np.testing.assert_allclose(list_kl(scores, teacher, valid), expected, rtol=1e-6)


def test_extreme_scores_stay_finite(loss: Loss) -> None:
    _, labels, valid = lists()
    scores = np.where(labels > 0.5, -1e4, 1e4).astype(np.float32)
    value, gradient = jax.value_and_grad(loss)(scores, labels, valid)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_hidden_cosine() -> None:
    generator = np.random.default_rng(3)
    student, teacher = generator.normal(size=(2, 3, 4, 6)).astype(np.float32)
    valid = generator.random((3, 4)) < 0.7
    cosines = np.sum(student * teacher, -1) / np.linalg.norm(student, axis=-1) / np.linalg.norm(teacher, axis=-1)
    np.testing.assert_allclose(hidden_cosine(student, teacher, valid), np.mean(1 - cosines[valid]), rtol=1e-5)
    np.testing.assert_allclose(hidden_cosine(3 * teacher, teacher, valid), 0, atol=1e-6)
    student[~valid] = np.nan
    student[0, 0], valid[0, 0] = 0, True
    gradient = jax.grad(hidden_cosine)(student, teacher, valid)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[~valid], 0)
    half = hidden_cosine(jnp.asarray(teacher, jnp.bfloat16), jnp.asarray(teacher, jnp.bfloat16), valid)
    assert half.dtype == jnp.float32
    with jax.enable_x64(True):
        student, teacher = jnp.asarray(generator.normal(size=(2, 4, 6)))
        check_grads(lambda x: hidden_cosine(x, teacher, np.ones(4, bool)), (student,), order=1, modes=["rev"])


def pairs(count: int = 6, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    queries, items = np.random.default_rng(4).normal(size=(2, count, width)).astype(np.float32)
    return queries, items


def test_info_nce_by_hand() -> None:
    queries, items = pairs()
    positive = np.eye(6, dtype=bool)
    positive[0, 3] = positive[4, 1] = True
    q, x = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, items))
    logits = q @ x.T / TAU
    expected = []
    for row in range(6):
        kept = ~positive[row] | (np.arange(6) == row)
        expected.append(np.log(np.exp(logits[row, kept]).sum()) - logits[row, row])
    np.testing.assert_allclose(info_nce(queries, items, positive), np.mean(expected), rtol=1e-5)
    plain = info_nce(queries, items)
    np.testing.assert_allclose(plain, info_nce(queries, items, np.eye(6, dtype=bool)), rtol=1e-6)
    np.testing.assert_allclose(plain, info_nce(7 * queries, items), rtol=1e-5)


def test_info_nce_leaves_out_empty_pairs() -> None:
    queries, items = pairs()
    positive = np.eye(6, dtype=bool)
    positive[2, 2] = False
    kept = np.arange(6) != 2
    expected = info_nce(queries[kept], items[kept])
    queries[2] = np.nan
    items[2] = 0
    value, gradients = jax.value_and_grad(info_nce, argnums=(0, 1))(queries, items, positive)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[2], 0)
    nothing = info_nce(queries, items, np.zeros((6, 6), bool))
    assert float(nothing) == 0


def test_info_nce_gradient_equals_finite_differences() -> None:
    with jax.enable_x64(True):
        queries, items = (jnp.asarray(rows, jnp.float64) for rows in pairs())
        check_grads(info_nce, (queries, items), order=1, modes=["rev"])
