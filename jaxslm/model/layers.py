"""The parts of a decoder layer, as functional Flax modules: RMSNorm, RoPE, attention, gated MLP, layer.

Linear maps act on any leading axes, written `...`; how tokens see one another is the layout's business
(`jaxslm.model.layout`), so one body serves padded rows, packed rows and a prefix shared by many items.
Matrices compute in `dtype` and accumulate in float32; norms, RoPE and softmax are float32.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxslm.config import ModelConfig, RopeScaling
from pallas_kernels.dispatch import XLA
from pallas_kernels.gated_mlp import gated_mlp
from pallas_kernels.gated_mlp.reference import matmul

Attend = Callable[[Array, Array, Array], Array]
"""(queries [..., K, G, H], keys [..., K, H], values [..., K, H]) -> outputs [..., K, G, H]."""

Read = Callable[[Array], Array]
"""Picks the tokens that a layer computes outputs for: [..., D] -> [..., D]."""

initial_matrix = nn.initializers.normal(stddev=0.02)
"""Random values of every matrix: (key, shape, dtype) -> array."""


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32, returned in x's dtype (Zhang and Sennrich, 1910.07467).

    `apart`: 1 / rms(x) is a step of its own, so that XLA's GPU compiler fuses the scaling with what follows.
    Before RoPE it would write the scaled states out in float32: a seventh of a scoring pass's memory traffic.
    """

    eps: float
    apart: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        if self.apart:
            inverse_rms = jax.lax.optimization_barrier(inverse_rms)
        scale = jnp.expand_dims(scale_D.astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (x32 * inverse_rms * scale).astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[Array, " half"]:
    """Returns the angle per position of each of the H/2 rotated pairs, float32 (Su et al., 2104.09864).

    With `scaling`, Llama 3's rule: wavelengths above original / low_freq_factor are stretched by `factor`, those below
    original / high_freq_factor are kept, and those between are blended linearly in 1 / wavelength.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequency
    turns = scaling.original_max_positions * frequency / (2 * jnp.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequency * (keep + (1 - keep) / scaling.factor)


def rotate(x: Float[Array, "*n heads H"], angles: Float[Array, "*n half"]) -> Float[Array, "*n heads H"]:
    """Returns x with pair (i, i + H/2) of each head turned by its angle: RoPE, half-split as in Hugging Face."""
    # Without the barrier XLA's CPU compiler computes cos and sin again for every head: 20 times the work.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with optional q/k norm. Mask: `keep_kv_groups` [K], a KV head with its G query heads."""

    config: ModelConfig
    num_kv_heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "*n D"], x_read: Float[Array, "*m D"], angles: Array, angles_read: Array, attend: Attend
    ) -> Float[Array, "*m D"]:
        config, K = self.config, self.num_kv_heads
        D, G, H = config.width, config.queries_per_kv, config.head_dim
        w_q = self.param("q", initial_matrix, (D, K * G * H)).astype(self.dtype)
        w_k = self.param("k", initial_matrix, (D, K * H)).astype(self.dtype)
        w_v = self.param("v", initial_matrix, (D, K * H)).astype(self.dtype)
        w_o = self.param("o", initial_matrix, (K * G * H, D)).astype(self.dtype)
        q = matmul(x_read, w_q).reshape(*x_read.shape[:-1], K * G, H)
        k = matmul(x, w_k).reshape(*x.shape[:-1], K, H)
        v = matmul(x, w_v).reshape(*x.shape[:-1], K, H)
        if config.qk_norm:
            q = RMSNorm(config.norm_eps, apart=True, name="q_norm")(q)
            k = RMSNorm(config.norm_eps, apart=True, name="k_norm")(k)
        q, k = rotate(q, angles_read), rotate(k, angles)
        out = attend(q.reshape(*q.shape[:-2], K, G, H), k, v)
        if self.has_variable("masks", "keep_kv_groups"):
            keep_K: Array = self.get_variable("masks", "keep_kv_groups").astype(out.dtype)
            out = out * keep_K.reshape((1,) * (out.ndim - 3) + (K, 1, 1))
        self.sow("intermediates", "heads", out)
        return matmul(out.reshape(*x_read.shape[:-1], K * G * H), w_o)


class GatedMLP(nn.Module):
    """SwiGLU: (silu(x gate) * (x up)) down (Shazeer, 2002.05202). Mask: `keep_neurons` [F]."""

    width: int
    mlp_width: int
    dtype: DTypeLike
    implementation: str | None = XLA

    @nn.compact
    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        w_gate_DF = self.param("gate", initial_matrix, (self.width, self.mlp_width)).astype(self.dtype)
        w_up_DF = self.param("up", initial_matrix, (self.width, self.mlp_width)).astype(self.dtype)
        w_down_FD = self.param("down", initial_matrix, (self.mlp_width, self.width)).astype(self.dtype)
        h = gated_mlp(x, w_gate_DF, w_up_DF, implementation=self.implementation)
        if self.has_variable("masks", "keep_neurons"):
            keep_F: Array = self.get_variable("masks", "keep_neurons").astype(h.dtype)
            h = h * jnp.expand_dims(keep_F, tuple(range(h.ndim - 1)))
        self.sow("intermediates", "neurons", h)
        return matmul(h, w_down_FD)


class Layer(nn.Module):
    """One decoder layer, pre-norm: x + attention(norm x), then + mlp(norm .). Mask: `keep_layer`, a scalar."""

    config: ModelConfig
    index: int
    dtype: DTypeLike
    implementation: str | None = XLA

    @nn.compact
    def __call__(
        self, x: Float[Array, "*n D"], positions: Int[Array, "*n"], attend: Attend, read: Read | None = None
    ) -> Float[Array, "*m D"]:
        """Returns the states of the tokens that `read` picks (all without it); keys and values are of all tokens."""
        config = self.config
        angles = positions[..., None].astype(jnp.float32) * jnp.expand_dims(
            rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling), tuple(range(positions.ndim))
        )
        normed = RMSNorm(config.norm_eps, name="attention_norm")(x)
        x_read, normed_read, angles_read = (each if read is None else read(each) for each in (x, normed, angles))
        attention = Attention(config, config.kv_heads_by_layer[self.index], self.dtype, name="attention")
        F = config.mlp_width_by_layer[self.index]
        mlp = GatedMLP(config.width, F, self.dtype, self.implementation, name="mlp")
        keep: Array | float = 1.0
        if self.has_variable("masks", "keep_layer"):
            keep = self.get_variable("masks", "keep_layer").astype(x.dtype)
        h = x_read + keep * attention(normed, normed_read, angles, angles_read, attend)
        return h + keep * mlp(RMSNorm(config.norm_eps, name="mlp_norm")(h))
