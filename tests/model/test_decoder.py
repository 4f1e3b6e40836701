"""The decoder's parts: RoPE turns by relative position, masks equal the smaller model, heads agree, dtypes hold."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslm.config import ModelConfig
from jaxslm.model.decoder import Decoder, Params, abstract_params, init_params
from jaxslm.model.head import label_logits, label_rows, log_normalisers, log_odds, vocab_logits
from jaxslm.model.layers import rope_frequencies, rotate
from jaxslm.model.layout import Rows
from tests.tiny import LLAMA3_SCALING, TINY_CONFIGS, VOCAB_SIZE, tiny_config, tiny_params

TOKENS = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]], np.int32)
VALID = np.array([[True] * 6, [True] * 3 + [False] * 3])


@cache
def _compiled(config: ModelConfig) -> Any:
    def apply(variables: dict[str, Any], tokens: jax.Array, valid: jax.Array) -> Any:
        return Decoder(config).apply(variables, tokens, Rows(valid))

    return jax.jit(apply)


def hidden(config: ModelConfig, params: Params, masks: dict[str, Any] | None = None) -> np.ndarray:
    variables = {"params": params} | ({} if masks is None else {"masks": masks})
    return np.asarray(_compiled(config)(variables, TOKENS, VALID))


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 900), second=st.integers(0, 900), shift=st.integers(0, 900), scaled=st.booleans())
def test_rope_depends_on_relative_position_only(first: int, second: int, shift: int, scaled: bool) -> None:
    frequencies = rope_frequencies(16, 5e5, LLAMA3_SCALING if scaled else None)
    generator = np.random.default_rng(0)
    q, k = (jnp.asarray(generator.standard_normal((1, 16), np.float32)) for _ in range(2))

    def product(q_position: int, k_position: int) -> float:
        return float(jnp.sum(rotate(q, q_position * frequencies) * rotate(k, k_position * frequencies)))

    assert product(first, second) == pytest.approx(product(first + shift, second + shift), abs=1e-3)
    assert float(jnp.linalg.norm(rotate(q, first * frequencies))) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-5)


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    plain, scaled = (np.asarray(rope_frequencies(128, 5e5, scaling)) for scaling in (None, LLAMA3_SCALING))
    wavelengths = 2 * np.pi / plain
    short = wavelengths < LLAMA3_SCALING.original_max_positions / LLAMA3_SCALING.high_freq_factor
    long = wavelengths > LLAMA3_SCALING.original_max_positions / LLAMA3_SCALING.low_freq_factor
    assert short.any()
    assert long.any()
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / LLAMA3_SCALING.factor, rtol=1e-6)
    between = scaled[~short & ~long] / plain[~short & ~long]
    assert ((between > 1 / LLAMA3_SCALING.factor) & (between < 1)).all()


def test_masked_neurons_equal_a_narrower_model() -> None:
    """Different widths in different layers."""
    config = tiny_config()
    params, kept = tiny_params(config), ([0, 2, 3, 5, 47], list(range(1, 48, 2)))
    masks, smaller = {}, jax.tree.map(lambda leaf: leaf, params)
    for layer, neurons in enumerate(kept):
        masks[f"layers_{layer}"] = {"mlp": {"keep_neurons": np.isin(np.arange(48), neurons)}}
        mlp = params[f"layers_{layer}"]["mlp"]
        index = np.array(neurons)
        smaller[f"layers_{layer}"]["mlp"] = {
            "gate": mlp["gate"][:, index],
            "up": mlp["up"][:, index],
            "down": mlp["down"][index],
        }
    narrow = tiny_config(mlp_width=tuple(len(neurons) for neurons in kept))
    np.testing.assert_allclose(hidden(config, params, masks), hidden(narrow, smaller), rtol=0, atol=1e-5)


def test_masked_kv_groups_equal_a_model_without_them() -> None:
    config = tiny_config()
    params, G, H, K = tiny_params(config), 2, 8, 2
    masks, smaller = {}, jax.tree.map(lambda leaf: leaf, params)
    kept = ([1], [0, 1])
    for layer, groups in enumerate(kept):
        masks[f"layers_{layer}"] = {"attention": {"keep_kv_groups": np.isin(np.arange(K), groups)}}
        attention = smaller[f"layers_{layer}"]["attention"]
        keys = np.concatenate([np.arange(group * H, (group + 1) * H) for group in groups])
        queries = np.concatenate([np.arange(group * G * H, (group + 1) * G * H) for group in groups])
        attention |= {
            "q": attention["q"][:, queries],
            "k": attention["k"][:, keys],
            "v": attention["v"][:, keys],
            "o": attention["o"][queries],
        }
    fewer = tiny_config(num_kv_heads=tuple(len(groups) for groups in kept))
    np.testing.assert_allclose(hidden(config, params, masks), hidden(fewer, smaller), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_a_masked_layer_equals_a_model_without_it(dropped: int) -> None:
    """The last layer too, which computes its outputs for the read tokens only."""
    config = tiny_config(num_layers=3)
    params = tiny_params(config)
    masks = {f"layers_{layer}": {"keep_layer": np.array(layer != dropped)} for layer in range(3)}
    left = [params[f"layers_{layer}"] for layer in range(3) if layer != dropped]
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    smaller = rest | {f"layers_{layer}": tree for layer, tree in enumerate(left)}
    np.testing.assert_allclose(hidden(config, params, masks), hidden(tiny_config(), smaller), rtol=0, atol=1e-5)


def test_masks_that_keep_everything_change_nothing() -> None:
    config = tiny_config()
    params = tiny_params(config)
    masks = {
        f"layers_{layer}": {
            "mlp": {"keep_neurons": np.ones(48, bool)},
            "attention": {"keep_kv_groups": np.ones(2, bool)},
            "keep_layer": np.array(True),
        }
        for layer in range(2)
    }
    np.testing.assert_array_equal(hidden(config, params, masks), hidden(config, params))


@pytest.mark.parametrize("name", ["llama", "llama-multi-head"])
def test_heads_agree(name: str) -> None:
    """Tied and untied: the label logits are two columns of the vocabulary's, the log-odds their difference."""
    config = TINY_CONFIGS[name]
    params = tiny_params(config)
    states = jnp.asarray(hidden(config, params))
    rows = label_rows(params, (17, 4))
    everything = vocab_logits(states, params)
    assert everything.shape == (2, VOCAB_SIZE)
    both = label_logits(states, rows)
    np.testing.assert_allclose(both, everything[:, np.array([17, 4])], rtol=0, atol=1e-5)
    np.testing.assert_allclose(log_odds(states, rows), both[:, 1] - both[:, 0], rtol=0, atol=1e-5)
    many = jnp.tile(states, (150, 1))  # more than are computed at once, and no multiple of that
    expected = np.tile(np.log(np.exp(np.asarray(everything, np.float64)).sum(axis=1)), 150)
    np.testing.assert_allclose(log_normalisers(many, params), expected, rtol=1e-6)


def test_numbers_of_bfloat16_compute() -> None:
    """States come in the compute dtype; logits and log-odds are float32 whatever the states are."""
    config = tiny_config()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_params(config))

    def shapes(params: Params) -> Any:
        decoder, rows = Decoder(config, jnp.dtype(jnp.bfloat16)), Rows(jnp.asarray(VALID))
        states: Any = decoder.apply({"params": params}, jnp.asarray(TOKENS), rows)
        labels = label_rows(params, (1, 2))
        return states, vocab_logits(states, params), label_logits(states, labels), log_odds(states, labels)

    dtypes = [leaf.dtype.name for leaf in jax.eval_shape(shapes, params)]
    assert dtypes == ["bfloat16", "float32", "float32", "float32"]


def test_initial_parameters() -> None:
    """Non-uniform widths give trees of non-uniform shapes; norms start at one, matrices near zero."""
    config = TINY_CONFIGS["qwen3-non-uniform"]
    params = init_params(config, jax.random.key(3), jnp.dtype(jnp.bfloat16))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract_params(config, jnp.dtype(jnp.bfloat16))
    )
    assert [params[f"layers_{layer}"]["mlp"]["gate"].shape for layer in range(3)] == [(32, 48), (32, 16), (32, 40)]
    assert [params[f"layers_{layer}"]["attention"]["k"].shape for layer in range(3)] == [(32, 16), (32, 8), (32, 16)]
    assert float(jnp.min(params["final_norm"]["scale"])) == float(jnp.max(params["final_norm"]["scale"])) == 1
    assert 0.01 < float(jnp.std(params["embedding"].astype(jnp.float32))) < 0.03
