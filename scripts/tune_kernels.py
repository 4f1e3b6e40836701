#!/usr/bin/env python3
"""Times XLA and every choice of tiles of each kernel on this GPU, and writes the table that `dispatch` reads.

    python3 scripts/tune_kernels.py [--op NAME ...] [--repeats N]

A choice of tiles whose result differs from XLA's by more than rounding is reported and never written. Rewrites the rows
of this device and these ops in pallas_kernels/tuning.json; rows of other devices stay. A kernel is the default for a
shape only if it was faster than XLA by MARGIN. Takes a few minutes. Exit status: 2 without a GPU that runs the kernels.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from jaxslm.bench.kernels import FAILURES, contenders, seconds_per_call
from pallas_kernels import tuning
from pallas_kernels.dispatch import MOSAIC_GPU, XLA, is_hopper, target_device
from pallas_kernels.specs import OPS, TOLERANCE, Spec, specs, worst_row_error

MARGIN = 1.03
"""How many times faster than XLA a kernel must be: less is within the spread of two measurements."""


def tune(spec: Spec, device: str, repeats: int) -> tuning.Row:
    """Returns the row of one spec."""
    arguments = tuple(map(jnp.asarray, spec.make(0)))
    call, laid_out = dict(contenders(spec))[XLA](arguments)
    expected = np.asarray(jax.jit(call)(*laid_out))
    xla_s = seconds_per_call(call, laid_out, repeats)
    timed = list(timed_tiles(spec, arguments, expected, repeats))
    kernel_s, best = min(timed, key=lambda pair: pair[0], default=(float("inf"), {}))
    print(f"{spec}: XLA {xla_s * 1e6:.1f} µs, kernel {kernel_s * 1e6:.1f} µs with {best}", file=sys.stderr)
    fastest = MOSAIC_GPU if kernel_s * MARGIN < xla_s else XLA
    seconds = {XLA: xla_s} | ({MOSAIC_GPU: kernel_s} if timed else {})
    return tuning.Row(spec.op, device, "bfloat16", dict(spec.shape), fastest, best, seconds)


def timed_tiles(
    spec: Spec, arguments: tuple[Any, ...], expected: np.ndarray, repeats: int
) -> Iterator[tuple[float, dict[str, int]]]:
    """Yields seconds and tiles; those that do not compile, or compute something else, are reported and left out."""
    for tiles in spec.tiles:
        call = partial(spec.run_tiles, tiles=tiles)
        try:
            error = worst_row_error(np.asarray(jax.jit(call)(*arguments)), expected, spec.padding)
            if error > TOLERANCE:
                raise ValueError(f"differs from XLA's result by {error:.1e} in a row, more than {TOLERANCE:.1e}")
            yield seconds_per_call(call, arguments, repeats), dict(tiles)
        except FAILURES as reason:
            print(f"{spec}, {dict(tiles)}: left out: {' '.join(str(reason).split())[:200]}", file=sys.stderr)


def main() -> int:
    """Tunes and writes; returns the exit status."""
    parser = argparse.ArgumentParser(description="Tunes the kernels on this GPU: see the head of the file.")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = target_device()[1]
    if not is_hopper(device):
        print(f"tune_kernels: kernels need a Hopper GPU and this is {device}: nothing to tune", file=sys.stderr)
        return 2
    others = [row for row in tuning.table() if row.device != device or row.op not in args.op]
    tuning.check_size(len(others) + sum(len(specs(op)) for op in args.op))
    rows = [tune(spec, device, args.repeats) for op in args.op for spec in specs(op)]
    tuning.write([*others, *rows])
    print(f"{len(rows)} rows written to {tuning.PATH}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
