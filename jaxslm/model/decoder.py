"""The decoder: token embedding, layers, final norm. Parameters are a plain pytree with one subtree per layer."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxslm.config import ModelConfig
from jaxslm.model.layers import Layer, RMSNorm, initial_matrix
from jaxslm.model.layout import Layout, Rows
from pallas_kernels.dispatch import XLA

Params = dict[str, Any]
"""`{"embedding": [V, D], "layers_0": {...}, ..., "final_norm": {"scale": [D]}, "head": [V, D] when untied}`."""


class Decoder(nn.Module):
    """A causal decoder without a head. `dtype` is what matrices compute in; parameters keep their own.

    `remat`: a backward pass computes each layer's activations again instead of keeping them.
    `implementation`: of the ops that have kernels, as `pallas_kernels.dispatch.choose` takes it. Only XLA's have
    gradients, so training keeps the default.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    implementation: str | None = XLA

    def setup(self) -> None:
        config = self.config
        self.embedding = self.param("embedding", initial_matrix, (config.vocab_size, config.width))
        if not config.tie_embeddings:
            self.head = self.param("head", initial_matrix, (config.vocab_size, config.width))
        layer = nn.remat(Layer, static_argnums=(3, 4)) if self.remat else Layer  # attend and read are functions
        self.layers = [layer(config, index, self.dtype, self.implementation) for index in range(config.num_layers)]
        self.final_norm = RMSNorm(config.norm_eps)

    def __call__(self, tokens: Int[Array, "*n"], layout: Layout) -> Float[Array, "*m D"]:
        """Returns the normed final states of the tokens that the layout reads."""
        return self.decode(self.embed(tokens), layout)

    def embed(self, tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
        """Returns the tokens' rows of the embedding table in the compute dtype. Cost: a gather."""
        return jnp.take(self.embedding, tokens, axis=0, mode="clip").astype(self.dtype)

    def decode(self, x: Float[Array, "*n D"], layout: Layout) -> Float[Array, "*m D"]:
        """Returns the normed final states of the tokens that the layout reads, from input embeddings."""
        for layer in self.layers[:-1]:
            x = layer(x, layout.positions, layout.attend, None)
        x = self.layers[-1](x, layout.positions, layout.attend_read, layout.read)
        return self.final_norm(x)


def init_params(config: ModelConfig, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> Params:
    """Returns random parameters: normal(0.02) matrices, unit norms.

    Matrix by matrix, so that one program draws all of a shape: a program for all of them takes XLA minutes to compile.
    """
    leaves, tree = jax.tree.flatten_with_path(abstract_params(config, dtype))
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jnp.ones(leaf.shape, dtype) if path[-1].key == "scale" else _random_matrix(each, leaf.shape, dtype)
        for each, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    params: Params = jax.tree.unflatten(tree, drawn)
    return params


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _random_matrix(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return initial_matrix(key, shape, jnp.float32).astype(dtype)


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Returns the tree of `init_params` as shapes and dtypes: what restore and conversion expect."""
    rows = Rows(jnp.ones((1, 1), bool))
    made = jax.eval_shape(lambda key: Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32), rows), jax.random.key(0))
    params: Params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), made["params"])
    return params
