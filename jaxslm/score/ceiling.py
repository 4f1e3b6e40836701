"""How fast this device multiplies matrices: the ceiling that rates of training and of scoring are a share of."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def best_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Returns the shortest of `repeats` timings after one call that is not counted."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matmul_ceiling(dtype: DTypeLike, repeats: int = 5) -> float:
    """Returns the FLOP/s of large square products of random numbers on the first local device.

    A GPU does several in one program, so that starting it costs next to nothing.
    """
    on_cpu = jax.local_devices()[0].platform == "cpu"
    size, in_turn = (2048, 1) if on_cpu else (8192, 8)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.float32) for key in keys)
    a, b = a.astype(dtype), (b * size**-0.5).astype(dtype)  # a product has the spread of a

    # A CPU is fastest that way; on a GPU it would write the product in float32 and convert it.
    result = jnp.float32 if on_cpu else dtype

    @jax.jit
    def products(a: Array, b: Array) -> Array:
        for _ in range(in_turn):
            a = jnp.matmul(a, b, preferred_element_type=result).astype(dtype)
        return a

    return 2 * size**3 * in_turn / best_seconds(lambda: products(a, b), repeats)
