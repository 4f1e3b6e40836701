"""The first and the last layers are models by themselves, with their own widths."""

from typing import Any

import jax
import pytest

from jaxslm.config import ModelConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params, abstract_params
from jaxslm.model.depth import first_layers, last_layers
from tests.tiny import tiny_config, tiny_params

UNEVEN: dict[str, Any] = {"num_layers": 3, "mlp_width": (48, 32, 16), "num_kv_heads": (2, 1, 2)}


def assert_shapes(config: ModelConfig, params: Params) -> None:
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))


def test_the_first_layers_are_a_model() -> None:
    model = tiny_config(**UNEVEN)
    short, kept = first_layers(model, tiny_params(model), 2)
    assert (short.num_layers, short.mlp_width, short.num_kv_heads) == (2, (48, 32), (2, 1))
    assert_shapes(short, kept)


def test_layers_that_are_alike_have_one_width() -> None:
    model = tiny_config(num_layers=3, mlp_width=(32, 32, 16), num_kv_heads=2)
    short, kept = first_layers(model, tiny_params(model), 2)
    assert (short.mlp_width, short.num_kv_heads) == (32, 2)
    assert_shapes(short, kept)


def test_a_model_has_no_more_layers_than_it_has() -> None:
    model = tiny_config(num_layers=3)
    with pytest.raises(InputError, match="layers: 5 are to be kept, the model has 3"):
        first_layers(model, tiny_params(model), 5)


def test_the_last_layers_keep_their_own_widths() -> None:
    model = tiny_config(**UNEVEN)
    last = last_layers(model, 2)
    assert (last.num_layers, last.mlp_width_by_layer, last.kv_heads_by_layer) == (2, (32, 16), (1, 2))
    assert last_layers(model, None) == last_layers(model, 5) == model
