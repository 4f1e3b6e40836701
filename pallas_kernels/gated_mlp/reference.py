"""The gated product as XLA computes it, and in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def matmul(x: Float[Array, "*n A"], w: Float[Array, "A B"]) -> Float[Array, "*n B"]:
    """Returns x w in the dtype of x, accumulated in float32.

    XLA's CPU compiler multiplies bfloat16 natively only if the product is asked for in float32, which is twice as fast.
    """
    if x.dtype == jnp.float32:
        return x @ w
    return jax.lax.platform_dependent(x, w, cpu=_rounded_float32_product, default=jnp.matmul)


def _rounded_float32_product(x: Array, w: Array) -> Array:
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def gated_mlp(
    x: Float[Array, "*n D"], w_gate_DF: Float[Array, "D F"], w_up_DF: Float[Array, "D F"]
) -> Float[Array, "*n F"]:
    """Returns silu(x w_gate) * (x w_up), each step rounded to the dtype of x."""
    return jax.nn.silu(matmul(x, w_gate_DF)) * matmul(x, w_up_DF)


def exact(x_MD: np.ndarray, w_gate_DF: np.ndarray, w_up_DF: np.ndarray) -> np.ndarray:
    """Returns the same in float64."""
    x, gate, up = (array.astype(np.float64) for array in (x_MD, w_gate_DF, w_up_DF))
    gate = x @ gate
    return gate / (1 + np.exp(-gate)) * (x @ up)
