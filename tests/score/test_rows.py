"""Scoring padded rows: a row scores the same whatever stands around it, and every shape is traced once."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslm.checkpoint import load_checkpoint
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder
from jaxslm.model.head import vocab_logits
from jaxslm.model.layout import Rows
from jaxslm.score.scorer import Ranker, load, make_score_fn
from tests.tiny import VOCAB_SIZE, tiny_checkpoint, tiny_config, tiny_params, tiny_ranker_config

CONFIG = tiny_ranker_config(tiny_config(num_kv_heads=1, queries_per_kv=4))
SHAPE = (8, 24)
token_ids = st.integers(0, VOCAB_SIZE - 1)
rows_of_ids = st.lists(st.lists(token_ids, min_size=1, max_size=12), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    return load(tiny_checkpoint(tmp_path_factory.mktemp("scorer") / "ckpt", CONFIG.model))


def probabilities(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))


@cache
def alone(dtype: str, row: tuple[int, ...]) -> np.ndarray:
    """The logits of a row in the first slot of an otherwise empty batch, its padding on the right."""
    tokens, valid = np.zeros(SHAPE, np.int32), np.zeros(SHAPE, bool)
    tokens[0, : len(row)], valid[0, : len(row)] = row, True
    return np.asarray(score(dtype, tokens, valid)[0])


def score(dtype: str, tokens: np.ndarray, valid: np.ndarray) -> jax.Array:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny_params(CONFIG.model))
    return make_score_fn(CONFIG, dtype=jnp.dtype(dtype))(params, {"tokens": tokens, "valid": valid})


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@settings(max_examples=20, deadline=None)
@given(rows=rows_of_ids, data=st.data())
def test_a_row_scores_the_same_in_any_batch_slot_and_padding(
    dtype: str, rows: list[list[int]], data: st.DataObject
) -> None:
    """Real tokens stand at random columns: padding on the left, on the right and in the middle, filled with any ids."""
    B, T = SHAPE
    slots = data.draw(st.permutations(range(B)))
    tokens, valid = np.full(SHAPE, data.draw(token_ids), np.int32), np.zeros(SHAPE, bool)
    for slot, row in zip(slots, rows, strict=False):
        columns = sorted(data.draw(st.permutations(range(T)))[: len(row)])
        tokens[slot, columns], valid[slot, columns] = row, True
    found = np.asarray(score(dtype, tokens, valid))[slots[: len(rows)]]
    expected = np.stack([alone(dtype, tuple(row)) for row in rows])
    if dtype == "float32":
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    else:
        np.testing.assert_allclose(probabilities(found), probabilities(expected), rtol=0, atol=0.01)


def test_score_fn_equals_the_vocabulary_head() -> None:
    params = tiny_params(CONFIG.model)
    tokens, valid = np.array([[5, 17, 9, 0], [3, 4, 0, 0]], np.int32), np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    found = make_score_fn(CONFIG, dtype=jnp.dtype(jnp.float32))(params, {"tokens": tokens, "valid": valid})

    def all_logits() -> jax.Array:
        states = Decoder(CONFIG.model).apply({"params": params}, jnp.asarray(tokens), Rows(jnp.asarray(valid)))
        return vocab_logits(jnp.asarray(states), params)

    expected = jax.jit(all_logits)()[:, np.array(CONFIG.label_token_ids)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_one_trace_per_shape_and_none_at_repeated_calls() -> None:
    """Contract 7, by JAX's own count of compilations."""
    config = tiny_ranker_config(tiny_config(num_layers=1))
    params, score_fn = tiny_params(config.model), make_score_fn(config, dtype=jnp.dtype(jnp.float32))
    compilations = 0

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal compilations
        compilations += event == "/jax/core/compile/backend_compile_duration"

    def call(shape: tuple[int, int], token: int) -> None:
        score_fn(params, {"tokens": np.full(shape, token, np.int32), "valid": np.ones(shape, bool)}).block_until_ready()

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        call((4, 8), 1)
        first = compilations
        assert first >= 1
        call((4, 8), 2)
        call((4, 8), 3)
        assert compilations == first
        call((2, 8), 1)
        second = compilations
        assert second > first
        call((4, 8), 4)
        call((2, 8), 5)
        assert compilations == second
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_label_logits_of_ragged_rows(ranker: Ranker) -> None:
    rows = [[5, 17, 9], [3, 4], list(range(70)), [8]]
    found = ranker.label_logits(rows)
    assert found.shape == (4, 2)
    assert found.dtype == np.float32
    for number, row in enumerate(rows):
        np.testing.assert_allclose(ranker.label_logits([row])[0], found[number], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ranker.label_logits(rows[::-1])[::-1], found, rtol=0, atol=1e-5)


def test_rows_may_be_arrays(ranker: Ranker) -> None:
    expected = ranker.label_logits([[1, 2], [3, 4]])
    np.testing.assert_array_equal(ranker.label_logits(np.array([[1, 2], [3, 4]])), expected)
    np.testing.assert_array_equal(ranker.label_logits([np.array([1, 2], np.int32), (3, 4)]), expected)


def test_scores_are_the_prompts_rows(ranker: Ranker) -> None:
    """P(yes) is the sigmoid of the log-odds after the last token of prefix + item, in the order of the items."""
    items: list[str | Item] = ["We need a developer.", Item(id="b", title="Nurse", text="Care for people."), "x"]
    built = ranker.prompt.encode("python developer", items)
    logits = ranker.label_logits([built.prefix_ids + ids for ids in built.item_ids]).astype(np.float64)
    scores = ranker.score("python developer", items)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(logits[:, 0] - logits[:, 1])), rtol=0, atol=1e-5)
    assert len(set(scores.tolist())) == 3
    found = ranker.score_request("python developer", items)
    assert found.truncated == [False] * 3
    np.testing.assert_allclose(found.log_odds, logits[:, 1] - logits[:, 0], rtol=0, atol=2e-5)


def test_bfloat16_keeps_the_scores(tmp_path: Path, ranker: Ranker) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint(tmp_path / "ckpt", CONFIG.model))
    half = Ranker(checkpoint, dtype=jnp.dtype(jnp.bfloat16))
    rows = [[number, number + 1, number + 2] for number in range(0, 300, 10)]
    found, expected = (probabilities(one.label_logits(rows)) for one in (half, ranker))
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows: at least one"),
        ([[1], []], "row 1: has no tokens"),
        ([[1], [2, VOCAB_SIZE]], f"row 1: a token id is outside 0..{VOCAB_SIZE - 1}"),
        ([[-1]], "row 0: a token id is outside"),
        ([[1] * 8193], "row of 8193 tokens: the longest"),
        ([[1], ["a"]], "row 1: must be a sequence of token ids, whole numbers"),
        ([[1.5, 2]], "row 0: must be a sequence of token ids"),
        ([[1, [2]]], "row 0: must be a sequence of token ids"),
        (["yes"], "row 0: must be a sequence of token ids"),
        (np.zeros((0, 4), int), "rows: at least one"),
        (np.ones((2, 2)), "row 0: must be a sequence of token ids"),
    ],
)
def test_unusable_rows_are_refused(ranker: Ranker, rows: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ranker.label_logits(rows)
