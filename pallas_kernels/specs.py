"""The form of a spec: one shape of one op, named once and read by tests, benchmarks and tuning.

Each op has a module `specs` with `SPECS`, the shapes of the real workloads, and `SMALL`, shapes with odd lengths and
edge cases that a CPU interprets in seconds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import jax
import numpy as np

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

    def __str__(self) -> str:
        return f"{self.op}, {self.name}"


def specs(op: str) -> tuple[Spec, ...]:
    """Returns the workloads' shapes of one of OPS."""
    found: tuple[Spec, ...] = import_module(f"pallas_kernels.{op}.specs").SPECS
    return found
