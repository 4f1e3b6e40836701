"""The gated half of a SwiGLU MLP (Shazeer, 2002.05202): gate and up projections and their product."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dispatch import INTERPRETED, XLA, choose, target_device
from pallas_kernels.gated_mlp import reference


def gated_mlp(
    x: Float[Array, "*n D"],
    w_gate_DF: Float[Array, "D F"],
    w_up_DF: Float[Array, "D F"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*n F"]:
    """Returns silu(x w_gate) * (x w_up), the neurons that the down projection reads, in the dtype of x.

    Cost: 4 D F FLOP per row. The kernel reads each tile of x once for both products and writes only the result; XLA
    writes and reads both products. Only XLA's has a gradient.

    Args:
        implementation: a name of `pallas_kernels.dispatch.IMPLEMENTATIONS`, or None for the fastest one measured here.

    Raises:
        ValueError: the named implementation cannot run on this device or these arguments.
    """
    (*leading, D), F = x.shape, w_gate_DF.shape[1]
    shape = {"M": math.prod(leading), "D": D, "F": F}
    # The kernel multiplies operands of one dtype; XLA promotes them.
    dtype = jnp.result_type(x, w_gate_DF, w_up_DF)
    choice = choose("gated_mlp", shape, dtype, _unsupported, implementation)
    if choice.implementation == XLA:
        return reference.gated_mlp(x, w_gate_DF, w_up_DF)
    from pallas_kernels.gated_mlp import mosaic_gpu
    from pallas_kernels.interpret import interpret_params

    h_MF = mosaic_gpu.gated_mlp(
        x.reshape(-1, D),
        w_gate_DF,
        w_up_DF,
        tiles=mosaic_gpu.Tiles(**choice.tiles),
        blocks=target_device()[2],
        interpret=interpret_params() if choice.implementation == INTERPRETED else None,
    )
    return jnp.reshape(h_MF, (*leading, F))


def _unsupported(shape: Mapping[str, int], dtype: DTypeLike, tiles: Mapping[str, int]) -> str | None:
    from pallas_kernels.gated_mlp import mosaic_gpu  # Pallas takes over a second to import

    return mosaic_gpu.unsupported(shape, dtype, tiles)
