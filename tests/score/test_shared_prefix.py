"""Scoring with a shared prefix equals scoring whole padded rows, whatever is packed together."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslm.compress.splice import splice
from jaxslm.config import Bucket, BucketConfig
from jaxslm.errors import InputError
from jaxslm.model import layout
from jaxslm.model.layout import LONG_PREFIX
from jaxslm.score.compiled import CompiledScorer, make_score_fn
from jaxslm.score.forward import PackRequest
from jaxslm.score.warmup import compilations, warm_up
from tests.tiny import TINY_CONFIGS, VOCAB_SIZE, tiny_params, tiny_ranker_config

BUCKETS = BucketConfig(
    buckets=(
        Bucket(tokens=40, rows=4, prefix_tokens=8, items_per_row=2, item_tokens=6),
        Bucket(tokens=72, rows=3, prefix_tokens=8, items_per_row=1, item_tokens=16),
    ),
    overhead_tokens=4,
)
NAMES = ("qwen3-one-kv-head", "llama-3-rope-scaling")
TIGHT: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
token_ids = st.integers(0, VOCAB_SIZE - 1)


@cache
def scorer(name: str) -> CompiledScorer:
    config = TINY_CONFIGS[name]
    one = CompiledScorer(
        tiny_ranker_config(config), tiny_params(config), devices=jax.local_devices()[:1], buckets=BUCKETS
    )
    warm_up(one)
    return one


def padded_logits(name: str, rows: list[list[int]], length: int = 24) -> np.ndarray:
    """The reference path: whole rows of a fixed shape, one after another."""
    config = TINY_CONFIGS[name]
    tokens, valid = np.zeros((64, length), np.int32), np.zeros((64, length), bool)
    for slot, row in enumerate(rows):
        tokens[slot, : len(row)], valid[slot, : len(row)] = row, True
    score_fn = make_score_fn(tiny_ranker_config(config), dtype=jnp.float32)
    return np.asarray(score_fn(tiny_params(config), {"tokens": tokens, "valid": valid}))[: len(rows)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(token_ids, max_size=8),
            st.lists(st.lists(token_ids, min_size=1, max_size=16), min_size=1, max_size=12),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_packed_requests_equal_separate_rows_and_nothing_compiles(
    name: str, requests: list[tuple[list[int], list[list[int]]]]
) -> None:
    one = scorer(name)
    padded_logits(name, [])
    before = compilations()
    found = one.logits([PackRequest(*request) for request in requests])
    assert compilations() == before
    expected = padded_logits(name, [[*prefix, *item] for prefix, items in requests for item in items])
    np.testing.assert_allclose(found, expected, **TIGHT)


def test_behind_long_prefixes_only_what_is_new_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    name, random = NAMES[0], np.random.default_rng(0)
    bucket = Bucket(tokens=384, rows=8, prefix_tokens=LONG_PREFIX + 22, items_per_row=2, item_tokens=6)
    buckets = BucketConfig(buckets=(bucket,), overhead_tokens=4)
    config = TINY_CONFIGS[name]
    one = CompiledScorer(
        tiny_ranker_config(config), tiny_params(config), devices=jax.local_devices()[:1], buckets=buckets
    )
    prefixes = [random.integers(VOCAB_SIZE, size=length).tolist() for length in (150, 0, 7, 129)]
    requests = [PackRequest(prefix, random.integers(VOCAB_SIZE, size=(5, 6)).tolist()) for prefix in prefixes]
    attended: dict[str, list[int]] = {"causal_attention": [], "prefix_item_attention": []}

    def counted(name: str) -> Any:
        function, rows = getattr(layout, name), attended[name]

        def count(q: Any, *others: Any) -> Any:
            jax.debug.callback(lambda q: rows.append(len(q)), q)
            return function(q, *others)

        return count

    for each in attended:
        monkeypatch.setattr(layout, each, counted(each))
    found = one.logits(requests)
    rows = [[*request.prefix_ids, *item] for request in requests for item in request.item_ids]
    np.testing.assert_allclose(found, padded_logits(name, rows, length=160), **TIGHT)
    jax.effects_barrier()
    passes = [forward for group in one.packer.pack(requests, 1) for forward in group]
    of_prefixes, of_items = attended.values()
    assert set(of_prefixes) == {1}
    assert len(of_prefixes) <= config.num_layers * (len(requests) + len(passes) - 1)  # one may go on in another pass
    used = [len(np.unique(forward.places // bucket.items_per_row)) for forward in passes]
    assert sum(used) < len(passes) * bucket.rows
    # The last layer reads a token per item, of all rows together.
    assert sorted(of_items) == [1] * (config.num_layers - 1) * sum(used) + [bucket.rows] * len(passes)


def test_a_request_scores_the_same_alone_and_among_others() -> None:
    one = scorer(NAMES[0])
    requests = [PackRequest([number] * 5, [[number, 7 * number + 1, 3]] * 3) for number in range(1, 9)]
    together = one.logits(requests)
    alone = np.concatenate([one.logits([request]) for request in requests])
    np.testing.assert_allclose(together, alone, **TIGHT)


def test_vectors_that_are_token_embeddings_change_nothing() -> None:
    name = NAMES[0]
    config, params = TINY_CONFIGS[name], tiny_params(TINY_CONFIGS[name])
    bucket = Bucket(tokens=64, rows=4, prefix_tokens=8, items_per_row=2, item_tokens=4, vectors_per_item=3)
    with_vectors = CompiledScorer(
        tiny_ranker_config(config),
        params,
        devices=jax.local_devices()[:1],
        buckets=BucketConfig(buckets=(*BUCKETS.buckets, bucket)),
    )
    items = np.random.default_rng(0).integers(0, VOCAB_SIZE, (7, 4))
    table = np.asarray(params["embedding"])
    hidden_ids = [[0, 0, 0, int(item[3])] for item in items]
    found = with_vectors.logits([PackRequest([1, 2, 3], hidden_ids, table[items[:, :3]])])
    expected = with_vectors.logits([PackRequest([1, 2, 3], items.tolist())])
    np.testing.assert_allclose(found, expected, **TIGHT)
    assert np.abs(with_vectors.logits([PackRequest([1, 2, 3], hidden_ids)]) - expected).max() > 1e-4


def test_overrides_that_are_token_embeddings_change_nothing_wherever_they_stand() -> None:
    """Requests with one to three of them, or none in some items, share passes; one has too long a prefix to share."""
    config, params = TINY_CONFIGS[NAMES[0]], tiny_params(TINY_CONFIGS[NAMES[0]])
    bucket = Bucket(tokens=64, rows=4, prefix_tokens=8, items_per_row=2, item_tokens=16, overrides_per_item=3)
    text = bucket.model_copy(update={"overrides_per_item": 0})
    scorer = CompiledScorer(
        tiny_ranker_config(config),
        params,
        devices=jax.local_devices()[:1],
        buckets=BucketConfig(buckets=(text, bucket)),
    )
    table, generator = np.asarray(params["embedding"]), np.random.default_rng(0)
    plain, overridden = [], []
    for prefix, count in ((3, 1), (8, 3), (9, 2), (0, 3)):
        items = generator.integers(0, VOCAB_SIZE, (5, 6))
        places = np.stack([generator.permutation(6)[:count] for _ in items])
        hidden = items.copy()
        np.put_along_axis(hidden, places, 0, axis=1)
        vectors = table[np.take_along_axis(items, places, axis=1)]
        places[0], hidden[0], vectors[0] = -1, items[0], np.nan
        prefix_ids = generator.integers(0, VOCAB_SIZE, prefix).tolist()
        plain.append(PackRequest(prefix_ids, items.tolist()))
        overridden.append(PackRequest(prefix_ids, hidden.tolist(), vectors, places))
    np.testing.assert_allclose(scorer.logits(overridden), scorer.logits(plain), **TIGHT)
    with pytest.raises(InputError, match=r"item of 17 tokens with 1 overrides .* may have 16 tokens"):
        scorer.logits([PackRequest([1], [[2] * 17], np.zeros((1, 1, 32), np.float32), np.zeros((1, 1), int))])
    with pytest.raises(InputError, match=r"no bucket holds it \(none is for items with 4 overrides\)"):
        scorer.logits([PackRequest([1], [[2] * 5], np.zeros((1, 4, 32), np.float32), np.zeros((1, 4), int))])


def test_splice_leaves_other_tokens_alone() -> None:
    x_MD = jnp.arange(12.0).reshape(6, 2)
    items_RJT = jnp.array([[[2, 3, 4], [6, 6, 6]]])
    spliced = splice(x_MD, -jnp.ones((1, 2, 2, 2)), items_RJT)
    np.testing.assert_array_equal(spliced[np.array([2, 3])], -np.ones((2, 2)))
    np.testing.assert_array_equal(spliced[np.array([0, 1, 4, 5])], x_MD[np.array([0, 1, 4, 5])])
