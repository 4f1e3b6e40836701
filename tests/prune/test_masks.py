"""Masks and the smaller model: masked = shrunk for any shapes and masks, shrinking twice changes nothing."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslm.bench.workloads import MODELS
from jaxslm.config import ModelConfig
from jaxslm.errors import InputError
from jaxslm.model.cost import count_parameters, linear_flops_per_token
from jaxslm.model.decoder import Decoder, Params, abstract_params
from jaxslm.model.layout import Rows
from jaxslm.prune.masks import Masks, check_masks, keep_all
from jaxslm.prune.shrink import shrink, shrunk_config
from tests.tiny import TINY_CONFIGS, tiny_config, tiny_params

TOKENS = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]], np.int32)
VALID = np.array([[True] * 6, [True] * 3 + [False] * 3])


@cache
def _compiled(config: ModelConfig) -> Any:
    return jax.jit(lambda variables: Decoder(config).apply(variables, jnp.asarray(TOKENS), Rows(jnp.asarray(VALID))))


def hidden(config: ModelConfig, params: Params, masks: Masks | None = None) -> np.ndarray:
    variables = {"params": params} | ({} if masks is None else {"masks": masks.variables(config)})
    return np.asarray(_compiled(config)(variables))


def random_masks(config: ModelConfig, seed: int, share: float) -> Masks:
    """Masks that keep about `share` of everything, and at least one of each."""
    generator = np.random.default_rng(seed)

    def some_of(there: np.ndarray) -> np.ndarray:
        keep = there & (generator.random(len(there)) < share)
        keep[generator.integers(there.sum())] = True
        return keep

    everything = keep_all(config)
    return Masks(
        np.stack([some_of(row) for row in everything.keep_neurons]),
        np.stack([some_of(row) for row in everything.keep_kv_groups]),
        some_of(everything.keep_layers),
    )


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(sorted(TINY_CONFIGS)), seed=st.integers(0, 10_000), share=st.floats(0.05, 0.95))
def test_masked_equals_shrunk(name: str, seed: int, share: float) -> None:
    config = TINY_CONFIGS[name]
    masks, params = random_masks(config, seed, share), tiny_params(config)
    smaller, shrunk = shrink(config, params, masks)
    np.testing.assert_allclose(hidden(config, params, masks), hidden(smaller, shrunk), rtol=0, atol=1e-5)
    assert jax.tree.map(np.shape, shrunk) == jax.tree.map(np.shape, abstract_params(smaller))
    again_config, again = shrink(smaller, shrunk, keep_all(smaller))
    assert again_config == smaller
    jax.tree.map(np.testing.assert_array_equal, again, shrunk)


def test_masks_that_keep_everything_change_nothing() -> None:
    config = TINY_CONFIGS["qwen3-non-uniform"]
    params = tiny_params(config)
    same, shrunk = shrink(config, params, keep_all(config))
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, shrunk, params)
    np.testing.assert_array_equal(hidden(config, params, keep_all(config)), hidden(config, params))


def test_gradients_flow_through_masks() -> None:
    """As floats between 0 and 1 masks are differentiable: what learning them would need."""
    config = tiny_config()
    params, masks = tiny_params(config), keep_all(config)

    def total(neurons: jax.Array) -> jax.Array:
        variables = masks.variables(config)
        for layer in range(2):
            variables[f"layers_{layer}"]["mlp"]["keep_neurons"] = neurons[layer]
        states: jax.Array = _compiled(config)({"params": params, "masks": variables})
        return states.sum()

    gradient = np.asarray(jax.grad(total)(jnp.full((2, 48), 0.5)))
    assert np.isfinite(gradient).all()
    assert (gradient != 0).all()


def test_masks_are_a_pytree_of_booleans() -> None:
    masks = keep_all(tiny_config())
    assert {leaf.dtype for leaf in jax.tree.leaves(masks)} == {np.dtype(bool)}
    assert masks.tree().keys() == {"keep_neurons", "keep_kv_groups", "keep_layers"}
    assert replace(masks, keep_vocab=np.ones(384, bool)).tree().keys() > masks.tree().keys()


def test_the_pruned_qwen3_06b() -> None:
    """Nothing is allocated: shapes alone."""
    config = MODELS["qwen3-0.6b"]
    everything = keep_all(config)
    masks = replace(
        everything,
        keep_neurons=everything.keep_neurons & (np.arange(3072) % 2 == 0),
        keep_layers=np.arange(28) < 20,
    )
    smaller = shrunk_config(config, masks)
    tree = jax.eval_shape(lambda params: shrink(config, params, masks)[1], abstract_params(config))
    assert smaller == MODELS["qwen3-0.6b-pruned"]
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count_parameters(smaller).total == 375_830_528
    assert 2 * linear_flops_per_token(smaller) == linear_flops_per_token(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_layers": np.zeros(2, bool)}, "keep_layers: leaves no layer"),
        ({"keep_layers": np.ones(3, bool)}, r"keep_layers: must be booleans of shape \(2,\), is bool of shape \(3,\)"),
        ({"keep_neurons": np.ones((2, 48), np.float32)}, "keep_neurons: must be booleans"),
        ({"keep_neurons": np.arange(96).reshape(2, 48) < 48}, "keep_neurons: leaves no neuron in layer 1"),
        ({"keep_kv_groups": np.zeros((2, 2), bool)}, "keep_kv_groups: leaves no KV group in layer 0"),
        ({"keep_vocab": np.ones(383, bool)}, "keep_vocab: must have 384 rows"),
    ],
)
def test_masks_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    config = tiny_config()
    with pytest.raises(InputError, match=message):
        shrink(config, abstract_params(config), replace(keep_all(config), **changes))


def test_masks_that_keep_what_is_not_there() -> None:
    config = tiny_config(mlp_width=(48, 16))
    masks = keep_all(config)
    check_masks(config, masks)
    with pytest.raises(InputError, match="keep_neurons: keeps what layer 1 does not have"):
        check_masks(config, replace(masks, keep_neurons=np.ones((2, 48), bool)))
