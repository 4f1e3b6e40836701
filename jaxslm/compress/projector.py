"""From pooled states to vectors that the ranker reads: RMSNorm, Linear, GELU, Linear, as in LCLM (2606.09659)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxslm.config import CompressorConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from jaxslm.model.layers import RMSNorm


class Projector(nn.Module):
    """[..., encoder's width] -> [..., D], in float32: a few vectors per item cost nothing."""

    config: CompressorConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*n E"]) -> Float[Array, "*n D"]:
        E, D = self.config.encoder.width, self.config.width
        matrix, zeros = nn.initializers.normal(stddev=0.02), nn.initializers.zeros
        w_in, w_out = self.param("in", matrix, (E, D)), self.param("out", matrix, (D, D))
        b_in, b_out = self.param("in_bias", zeros, (D,)), self.param("out_bias", zeros, (D,))
        w_in, w_out, b_in, b_out = (each.astype(jnp.float32) for each in (w_in, w_out, b_in, b_out))
        h = RMSNorm(self.config.encoder.norm_eps, name="norm")(x.astype(jnp.float32))
        return jnp.asarray(jax.nn.gelu(h @ w_in + b_in) @ w_out + b_out)


def project(config: CompressorConfig, params: Params, pooled: Float[Array, "*n E"]) -> Float[Array, "*n D"]:
    """Returns the vectors of pooled states, float32; `params` are the projector's."""
    return jnp.asarray(Projector(config).apply({"params": params}, pooled))


def init_projector(
    config: CompressorConfig, pooled_nE: Float[np.ndarray, "n E"], target_rms: float, seed: int = 0
) -> Params:
    """Returns a random projector whose vectors have mean 0 and the given RMS over a sample of pooled states.

    Final states of a decoder share a large common part and are far larger than input embeddings. Both linear maps
    subtract their input's mean, so that what differs between items is what reaches the ranker, at a scale that its
    residual stream knows.

    Args:
        pooled_nE: pooled states of a sample of items, two different ones at least.
        target_rms: of the outputs; that of the ranker's token embeddings.
    """
    generator = np.random.default_rng(seed)
    eps = config.encoder.norm_eps
    x = pooled_nE / np.sqrt(np.mean(np.square(pooled_nE), axis=1, keepdims=True) + eps)
    w_in, b_in = _centred(x, config.width, 1.0, generator)
    hidden = np.asarray(jax.nn.gelu(jnp.asarray(x @ w_in + b_in)))
    w_out, b_out = _centred(hidden, config.width, target_rms, generator)
    tree = {"norm": {"scale": np.ones(config.encoder.width)}, "in": w_in, "in_bias": b_in, "out": w_out}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree | {"out_bias": b_out})


PASS_THROUGH = 150.0
"""Size of the vectors that pass through, in RMS of token embeddings. The stream grows about 30-fold over six layers of
SmolLM2; vectors five times larger than it are changed little by what the layers add."""


def pass_through_projector(
    config: CompressorConfig,
    pooled_nE: Float[np.ndarray, "n E"],
    final_scale_E: Float[np.ndarray, " E"],
    embedding_rms: float,
) -> Params:
    """Returns a projector that hands pooled final states on, before the scale of the final norm, and large.

    So large a vector keeps its direction through the ranker's layers, and the last of them sees nearly what it would
    see of the item's own states. Good when the ranker has grown from the encoder and its last layer does the
    comparison (`jaxslm.train.comparison`): a short training run then starts near the ranker's quality. Its vectors do
    not have the embeddings' RMS, as random ones do.

    GELU is the identity far above 0: each input is shifted there, by its range over the sample, and shifted back.

    Args:
        pooled_nE: pooled states of a sample of items. final_scale_E: scale of the encoder's final norm.
        embedding_rms: of the ranker's token embeddings.

    Raises:
        InputError: encoder and ranker differ in width.
    """
    if config.encoder.width != config.width:
        raise InputError(
            f"projector pass_through: encoder width {config.encoder.width} is not the ranker's {config.width}"
        )
    x = pooled_nE / np.sqrt(np.mean(np.square(pooled_nE), axis=1, keepdims=True) + config.encoder.norm_eps)
    middle, reach = x.mean(axis=0), np.maximum(np.abs(x - x.mean(axis=0)).max(axis=0), 1e-3)
    shift = 4.0  # GELU(4 - 1) is 3 to one part in a thousand
    size = PASS_THROUGH * embedding_rms / np.sqrt(np.mean(np.square(x / final_scale_E)))
    tree = {
        "norm": {"scale": np.ones(config.width)},
        "in": np.diag(1 / reach),
        "in_bias": shift - middle / reach,
        "out": np.diag(size * reach / final_scale_E),
        "out_bias": size * (middle - shift * reach) / final_scale_E,
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def _centred(
    x: Float[np.ndarray, "n A"], width: int, rms: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a random linear map, weight and bias, whose outputs on x have mean 0 and the given RMS."""
    mean = x.mean(axis=0)
    weight = generator.standard_normal((x.shape[1], width)) / np.sqrt(x.shape[1])
    spread = float(np.sqrt(np.mean(np.square((x - mean) @ weight))))
    weight *= rms / max(spread, 1e-6)
    return weight, -mean @ weight
