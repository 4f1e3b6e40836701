"""The form of a spec: one shape of one op, named once and read by tests, benchmarks and tuning.

Each op has a module `specs` with `SPECS`, the shapes of the real workloads, and `SMALL`, shapes with odd lengths and
edge cases that a CPU interprets in seconds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

TOLERANCE = 2.0**-6
"""Largest error of a row of a bfloat16 result, relative by norm, to float64 or to another implementation: about three
times what rounding makes of it. One key too many or too few, or a tile written twice, errs by more."""

OPS = ("gated_mlp", "prefix_item_attention")


@dataclass(frozen=True)
class Spec:
    """One shape of one op.

    Attributes:
        op: name of the op's package. name: what the shape stands for.
        shape: sizes by axis letter, the key of the table of measurements.
        make: seed -> the arguments, random and never zero, as numpy arrays.
        run: (*arguments, implementation=name) -> result.
        exact: (*arguments) -> result in float64, by numpy.
        flops, bytes: least work and traffic of one call.
        tiles: choices of tile sizes worth timing, the default first.
        run_tiles: (*arguments, tiles=one of them) -> result of the kernel with these tiles.
        padding: rows at the end of the result that nobody reads, so that implementations need not agree on them.
    """

    op: str
    name: str
    shape: Mapping[str, int]
    make: Callable[[int], tuple[np.ndarray, ...]]
    run: Callable[..., jax.Array]
    exact: Callable[..., np.ndarray]
    flops: int
    bytes: int
    tiles: Sequence[Mapping[str, int]]
    run_tiles: Callable[..., jax.Array]
    padding: int = 0

    def __str__(self) -> str:
        return f"{self.op}, {self.name}"


def worst_row_error(found: jax.typing.ArrayLike, expected: jax.typing.ArrayLike, padding: int = 0) -> float:
    """Returns the largest |found - expected| / |expected| of all rows but the last `padding`; inf if not finite.

    In float32 on the device, where the results of large shapes are: a thousand times finer than `TOLERANCE`.
    """
    errors = _row_errors(found, expected)
    errors = errors[: len(errors) - padding]
    return float(jnp.max(jnp.where(jnp.isfinite(errors), errors, jnp.inf)))


@jax.jit
def _row_errors(found: jax.typing.ArrayLike, expected: jax.typing.ArrayLike) -> jax.Array:
    a, b = (jnp.asarray(each, jnp.float32).reshape(jnp.shape(each)[0], -1) for each in (found, expected))
    return jnp.linalg.norm(a - b, axis=1) / jnp.maximum(jnp.linalg.norm(b, axis=1), 1e-30)


def specs(op: str) -> tuple[Spec, ...]:
    """Returns the workloads' shapes of one of OPS."""
    found: tuple[Spec, ...] = import_module(f"pallas_kernels.{op}.specs").SPECS
    return found
