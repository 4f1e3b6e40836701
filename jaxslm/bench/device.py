"""What this device can do at best, measured: the ceilings that every result is a share of."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxslm.bench.workloads import Workload
from jaxslm.config import ModelConfig
from jaxslm.model.cost import scoring_bytes, scoring_flops
from jaxslm.score.ceiling import best_seconds, matmul_ceiling
from jaxslm.score.parallel import device_name


@dataclass(frozen=True)
class Ceilings:
    """Measured speed of a large matrix product and of a copy (bytes read plus bytes written)."""

    device: str
    dtype: str
    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Floor:
    """The least time in which a request can be scored, by arithmetic and by traffic, at the measured ceilings."""

    flops: int
    bytes: int
    compute_s: float
    traffic_s: float


def measure_ceilings(dtype: DTypeLike, repeats: int = 5) -> Ceilings:
    """Returns the ceilings of the first local device: of a square product and of a long copy."""
    on_cpu = jax.local_devices()[0].platform == "cpu"
    size, in_turn = (256, 1) if on_cpu else (2048, 8)  # a GPU does several in one program: starting it costs nothing
    numbers = jnp.ones(size * 2**18, jnp.float32)

    @jax.jit
    def copies(x: Array) -> Array:
        for _ in range(in_turn):
            x = jax.lax.optimization_barrier(x + 1)  # else they were one addition
        return x

    return Ceilings(
        device=device_name(),
        dtype=jnp.dtype(dtype).name,
        flops_per_s=matmul_ceiling(dtype, repeats),
        bytes_per_s=2 * numbers.nbytes * in_turn / best_seconds(lambda: copies(numbers), repeats),
    )


def floor(workload: Workload, config: ModelConfig, ceilings: Ceilings, *, shared: bool = True) -> Floor:
    """Returns the floor of one request scored in one forward pass."""
    flops = scoring_flops(config, workload.prefix_tokens, workload.item_tokens, workload.items, shared=shared)
    moved = scoring_bytes(config, workload.tokens, np.dtype(jnp.dtype(ceilings.dtype)).itemsize)
    return Floor(flops, moved, flops / ceilings.flops_per_s, moved / ceilings.bytes_per_s)
