"""The measures equal their formulas; order and ties cannot help a run; intervals cover."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslm.errors import InputError
from jaxslm.evaluate.metrics import RELEVANT_LABEL, bootstrap_means, evaluate_run, ranked

LABELS = {"q": {"a": 1.0, "b": 2 / 3, "c": 1 / 3, "d": 0.0}}


def dcg(labels: list[float]) -> float:
    return sum(label / math.log2(rank + 1) for rank, label in enumerate(labels[:10], start=1))


def run_of(order: list[str], query_id: str = "q") -> dict[str, dict[str, float]]:
    return {query_id: {item_id: -float(rank) for rank, item_id in enumerate(order)}}


def means(labels: dict[str, dict[str, float]], run: dict[str, dict[str, float]]) -> list[float]:
    return [estimate.mean for estimate in evaluate_run(labels, run, resamples=10).estimates.values()]


def test_hand_computed() -> None:
    ndcg, rr, recall = means(LABELS, run_of(["x", "c", "b", "a"]))
    assert ndcg == pytest.approx(
        (1 / 3 / math.log2(3) + 2 / 3 / math.log2(4) + 1 / math.log2(5))
        / (1 + 2 / 3 / math.log2(3) + 1 / 3 / math.log2(4)),
        abs=1e-12,
    )
    assert rr == pytest.approx(1 / 4)
    assert recall == 1.0


def test_linear_gain_and_cutoff() -> None:
    distractors = [f"x{n}" for n in range(10)]
    assert means(LABELS, run_of([*distractors, "a", "b"])) == [0.0, 0.0, 0.0]
    ndcg, rr, recall = means(LABELS, run_of([*distractors[:9], "a", "b"]))
    best = 1 + 2 / 3 / math.log2(3) + 1 / 3 / math.log2(4)
    assert ndcg == pytest.approx(1 / math.log2(11) / best, abs=1e-12)
    assert rr == pytest.approx(0.1)
    assert recall == 1.0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=25),
    st.randoms(use_true_random=False),
)
def test_ndcg_of_any_labels(labels: list[float], generator: random.Random) -> None:
    labels[0] = 1.0
    judged = {str(n): label for n, label in enumerate(labels)}
    order = list(judged)
    generator.shuffle(order)
    expected = dcg([judged[item_id] for item_id in order]) / dcg(sorted(labels, reverse=True))
    ndcg, rr, recall = means({"q": judged}, run_of(order))
    assert ndcg == pytest.approx(expected, abs=2e-4)
    relevant = [item_id for item_id in order if judged[item_id] >= RELEVANT_LABEL]
    first = order.index(relevant[0]) + 1
    assert rr == pytest.approx(1 / first if first <= 10 else 0)
    assert recall == pytest.approx(len(set(order[:10]) & set(relevant)) / len(relevant))


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=4), st.sampled_from([0.0, 0.25, 1.0, 7.0]), min_size=1, max_size=20),
    st.randoms(use_true_random=False),
)
def test_order_of_candidates_does_not_matter(scores: dict[str, float], generator: random.Random) -> None:
    rows = list(scores.items())
    generator.shuffle(rows)
    assert ranked("q", dict(rows)) == ranked("q", scores)
    assert ranked("q", {item_id: 2 * score - 5 for item_id, score in rows}) == ranked("q", scores)


def test_order_of_queries_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    labels = {f"q{n}": {"a": 1.0, "b": 0.0} for n in range(30)}
    run = {query_id: {"a": float(generator.random()), "b": 0.5} for query_id in labels}
    backwards = dict(reversed(labels.items()))
    assert evaluate_run(labels, run).estimates == evaluate_run(backwards, dict(reversed(run.items()))).estimates


def test_a_constant_ranker_gets_a_random_order() -> None:
    """One relevant item of 20, listed first, smallest id: the mean reciprocal rank is that of a random permutation."""
    ids = [f"i{n:02}" for n in range(20)]
    queries = [f"q{n}" for n in range(2000)]
    labels = {query_id: {ids[0]: 1.0} for query_id in queries}
    constant = {query_id: dict.fromkeys(ids, 0.5) for query_id in queries}
    evaluation = evaluate_run(labels, constant, resamples=10)
    expected = sum(1 / rank for rank in range(1, 11)) / 20
    assert evaluation.estimates["rr_at_10"].mean == pytest.approx(expected, abs=0.02)
    assert evaluation.estimates["recall_at_10"].mean == pytest.approx(0.5, abs=0.04)


def test_counts() -> None:
    labels = {**LABELS, "none": {"a": 1 / 3}, "silent": {"a": RELEVANT_LABEL}}
    evaluation = evaluate_run(labels, {**run_of(["a", "b", "c"]), "unjudged": {"a": 1.0}})
    assert evaluation.query_ids == ("q", "silent")
    assert (evaluation.without_relevant, evaluation.without_results) == (1, 1)
    assert evaluation.per_query() == {"q": pytest.approx(1.0), "silent": 0.0}


def test_a_label_just_below_the_threshold_is_not_relevant() -> None:
    labels = {"q": {"a": RELEVANT_LABEL - 1e-8, "b": 1.0}}
    assert means(labels, run_of(["a", "b"]))[1] == 0.5


def test_strange_ids_are_safe() -> None:
    strange = {"q \n\0": {"a b": 1.0, "\ud800": 0.0, "": 0.0}}
    assert means(strange, {"q \n\0": {"a b": 2.0, "\ud800": 1.0, "": 1.0}}) == [1.0, 1.0, 1.0]


def test_bad_input_names_the_thing() -> None:
    with pytest.raises(InputError, match=r"query 'q', item 'b': the score is not a number"):
        evaluate_run(LABELS, {"q": {"a": 1.0, "b": math.nan}})
    with pytest.raises(InputError, match=r"query 'q', item 'a': label 1.5 is outside"):
        evaluate_run({"q": {"a": 1.5}}, {"q": {"a": 1.0}})
    with pytest.raises(InputError, match="none of the 1 queries"):
        evaluate_run({"q": {"a": 0.1}}, {"q": {"a": 1.0}})


def test_bootstrap_interval_covers() -> None:
    """The 95 % interval holds the true mean in about 95 % of 300 samples of 60 queries."""
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(300):
        values = generator.beta(0.5, 0.7, size=(60, 1))
        low, high = np.percentile(bootstrap_means(values, 400, seed), [2.5, 97.5])
        covered += bool(low <= 0.5 / 1.2 <= high)
    assert 0.90 <= covered / 300 <= 0.985


def test_bootstrap_is_chunked_and_reproducible() -> None:
    values = np.random.default_rng(0).random((5000, 2))
    first = bootstrap_means(values, 1000, seed=3)
    assert first.shape == (1000, 2)
    np.testing.assert_array_equal(first, bootstrap_means(values, 1000, seed=3))
    np.testing.assert_allclose(first.mean(axis=0), values.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(first.std(axis=0), values.std(axis=0) / np.sqrt(5000), rtol=0.1)
