"""The form of a spec: one shape of one op, named once and read by tests, benchmarks and tuning.

Each op has a module `specs` with `SPECS`, the shapes of the real workloads, and `SMALL`, shapes with odd lengths and
edge cases that a CPU interprets in seconds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import jax
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


def worst_row_error(found: np.ndarray, expected: np.ndarray, padding: int = 0) -> float:
    """Returns the largest |found - expected| / |expected| of all rows but the last `padding`; inf if not finite."""
    rows = len(expected) - padding
    found, expected = (array[:rows].astype(np.float64).reshape(rows, -1) for array in (found, expected))
    errors = np.linalg.norm(found - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    return float(np.max(np.where(np.isfinite(errors), errors, np.inf)))


def specs(op: str) -> tuple[Spec, ...]:
    """Returns the workloads' shapes of one of OPS."""
    found: tuple[Spec, ...] = import_module(f"pallas_kernels.{op}.specs").SPECS
    return found
