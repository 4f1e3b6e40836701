"""Layouts: padding is never seen, a shared prefix equals separate rows, reading the last token equals picking it."""

from collections.abc import Callable
from functools import cache
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.layout import Rows, SharedPrefix
from tests.tiny import TINY_CONFIGS, VOCAB_SIZE, tiny_params

NAMES = ("qwen3-one-kv-head", "llama-3-rope-scaling", "qwen3-non-uniform")
SHAPE = (6, 16)
"""One shape of padded rows for all tests here, so that each model compiles once."""


@cache
def params_of(name: str) -> Params:
    return tiny_params(TINY_CONFIGS[name])


@cache
def compiled(name: str) -> Callable[..., jax.Array]:
    decoder = Decoder(TINY_CONFIGS[name])

    def hidden(params: Params, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, tokens, Rows(valid))  # type: ignore[return-value]

    return jax.jit(hidden)


@cache
def compiled_all_tokens(name: str) -> Callable[..., jax.Array]:
    decoder = Decoder(TINY_CONFIGS[name])

    def hidden(params: Params, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, tokens, Rows(valid, last_only=False))  # type: ignore[return-value]

    return jax.jit(hidden)


@cache
def compiled_shared(name: str) -> Callable[..., jax.Array]:
    decoder = Decoder(TINY_CONFIGS[name])

    def hidden(params: Params, tokens: jax.Array, prefix: jax.Array, items: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, tokens, SharedPrefix(prefix, items, tokens.shape[0]))  # type: ignore[return-value]

    return jax.jit(hidden)


def padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    tokens, valid = np.zeros(SHAPE, np.int32), np.zeros(SHAPE, bool)
    for slot, row in enumerate(rows):
        tokens[slot, : len(row)], valid[slot, : len(row)] = row, True
    return tokens, valid


token_ids = st.integers(0, VOCAB_SIZE - 1)


@pytest.mark.parametrize("name", NAMES)
def test_padding_anywhere_changes_nothing(name: str) -> None:
    hidden, params = compiled(name), params_of(name)
    generator = np.random.default_rng(0)
    row = generator.integers(0, VOCAB_SIZE, 7)
    alone = hidden(params, row[None], np.ones((1, 7), bool))[0]
    tokens, valid = generator.integers(0, VOCAB_SIZE, SHAPE), np.zeros(SHAPE, bool)
    places = ([0, 1, 2, 3, 4, 5, 6], [9, 10, 11, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10], [0, 2, 3, 7, 8, 11, 15])
    for slot, place in enumerate(places):
        tokens[slot, place], valid[slot, place] = row, True
    valid[4, 3] = True  # a row of one token; row 5 has none
    together = hidden(params, tokens, valid)
    assert np.isfinite(together).all()
    for slot in range(len(places)):
        np.testing.assert_allclose(together[slot], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_reading_the_last_token_equals_picking_it_from_all(name: str) -> None:
    rows = [[1, 2, 3, 4, 5], [9], [7, 8, 7]]
    everything = compiled_all_tokens(name)(params_of(name), *padded(rows))
    picked = [everything[slot, len(row) - 1] for slot, row in enumerate(rows)]
    np.testing.assert_allclose(compiled(name)(params_of(name), *padded(rows))[:3], np.stack(picked), rtol=0, atol=1e-5)


def test_later_tokens_are_not_seen() -> None:
    name = NAMES[0]
    tokens, valid = padded([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 50, 60, 70, 80]])
    found = compiled_all_tokens(name)(params_of(name), tokens, valid)
    np.testing.assert_array_equal(found[0, :4], found[1, :4])
    assert np.abs(found[0, 4:8] - found[1, 4:8]).max(axis=-1).min() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(token_ids, min_size=1, max_size=6),
            st.lists(st.lists(token_ids, max_size=5), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=2,
    ),
    order=st.randoms(use_true_random=False),
)
def test_a_shared_prefix_equals_separate_rows(
    name: str, requests: list[tuple[list[int], list[list[int]]]], order: Random
) -> None:
    """Ragged prefixes and items, empty items, items of one token, and flat tokens in any order with padding between."""
    R, P, J, T, M = 2, 6, 3, 5, 48
    places = list(range(M))
    order.shuffle(places)
    tokens = np.full(M, VOCAB_SIZE - 1, np.int32)
    prefix_index, item_index = np.full((R, P), M, np.int32), np.full((R, J, T), M, np.int32)

    def lay(row: list[int], index: np.ndarray) -> None:
        for number, token in enumerate(row):
            index[number] = places.pop()
            tokens[index[number]] = token

    rows, slots = [], []
    for r, (prefix, items) in enumerate(requests):
        lay(prefix, prefix_index[r])
        for j, item in enumerate(items):
            lay(item, item_index[r, j])
            if item:
                rows.append(prefix + item)
                slots.append((r, j))
    found = compiled_shared(name)(params_of(name), tokens, prefix_index, item_index)
    assert found.shape[:2] == (R, J)
    assert np.isfinite(found).all()
    expected = compiled(name)(params_of(name), *padded(rows))
    for number, slot in enumerate(slots):
        np.testing.assert_allclose(found[slot], expected[number], rtol=0, atol=1e-5)


def test_items_do_not_see_one_another() -> None:
    name = NAMES[0]
    prefix, items = np.arange(3)[None], np.array([[[3, 4], [5, 6]]])
    shared, params = compiled_shared(name), params_of(name)
    first = shared(params, np.array([1, 2, 3, 4, 5, 6, 7]), prefix, items)
    second = shared(params, np.array([1, 2, 3, 4, 5, 60, 70]), prefix, items)
    np.testing.assert_array_equal(first[0, 0], second[0, 0])
    assert np.abs(first[0, 1] - second[0, 1]).max() > 1e-3


def test_gradients_of_a_shared_prefix_equal_those_of_rows() -> None:
    """Training may use either layout."""
    name = NAMES[0]
    tokens, valid = padded([[1, 2, 3, 4, 5], [1, 2, 3, 6]])
    flat, prefix, items = np.array([1, 2, 3, 4, 5, 6]), np.array([[0, 1, 2]]), np.array([[[3, 4], [5, 6]]])
    hidden, shared = compiled(name), compiled_shared(name)
    by_rows = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(hidden(params, tokens, valid)[:2]))))(params_of(name))
    by_prefix = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(shared(params, flat, prefix, items)))))(params_of(name))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), by_rows, by_prefix)
