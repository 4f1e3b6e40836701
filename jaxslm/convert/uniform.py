"""Layers of one width, for formats that have one number for all: the narrower ones are filled up with zeros."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxslm.config import ModelConfig
from jaxslm.model.decoder import Params, abstract_params


def fill_up(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Returns the model with every layer as wide as the widest; scores stay, to rounding.

    A neuron whose weights are zero gives zero, and so does a KV group. They cost what others cost. Nothing changes
    where all layers are alike.
    """
    widths = {"mlp_width": max(config.mlp_width_by_layer), "num_kv_heads": max(config.kv_heads_by_layer)}
    uniform = config.model_copy(update=widths)

    def fill(leaf: Array, wanted: jax.ShapeDtypeStruct) -> Array:
        if leaf.shape == wanted.shape:
            return leaf
        return jnp.pad(leaf, [(0, size - had) for size, had in zip(wanted.shape, leaf.shape, strict=True)])

    filled: Params = jax.tree.map(fill, params, abstract_params(uniform))
    return uniform, filled
