#!/usr/bin/env python3
"""Times XLA and every choice of tiles of each kernel on this GPU, and writes the table that `dispatch` reads.

    python3 scripts/tune_kernels.py [--op NAME ...] [--repeats N]

A choice of tiles whose result differs from XLA's by more than rounding is reported and never written. Rewrites the rows
of this device and these ops in pallas_kernels/tuning.json, each as soon as it is measured; rows of other devices stay.
A kernel is the default for a shape only if it was faster than XLA by MARGIN. Takes a few minutes. Needs the packages
that scripts/bench_gpu names. Exit status: 2 without a GPU that runs the kernels.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from jaxslm.bench.in_turn import InTurn
from jaxslm.bench.kernels import FAILURES, contenders
from jaxslm.score.warmup import keep_compiled_programs
from pallas_kernels import tuning
from pallas_kernels.dispatch import MOSAIC_GPU, XLA, is_hopper, target_device
from pallas_kernels.specs import OPS, TOLERANCE, Spec, specs, worst_row_error

MARGIN = 1.03
"""How many times faster than XLA a kernel must be: less is within the spread of two measurements."""


class Trial:
    """XLA and all tiles of one spec; their programs are compiled in the background from now on."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        arguments = tuple(map(jnp.asarray, spec.make(0)))
        self._xla = InTurn(*dict(contenders(spec))[XLA](arguments))
        self._tiles = [(dict(tiles), InTurn(partial(spec.run_tiles, tiles=tiles), arguments)) for tiles in spec.tiles]

    def tune(self, device: str, repeats: int) -> tuning.Row:
        """Returns the row of the spec."""
        spec = self.spec
        expected, xla_s = self._xla.run(repeats)
        timed = list(self._timed_tiles(expected, repeats))
        kernel_s, best = min(timed, key=lambda pair: pair[0], default=(float("inf"), {}))
        print(f"{spec}: XLA {xla_s * 1e6:.1f} µs, kernel {kernel_s * 1e6:.1f} µs with {best}", file=sys.stderr)
        fastest = MOSAIC_GPU if kernel_s * MARGIN < xla_s else XLA
        seconds = {XLA: xla_s} | ({MOSAIC_GPU: kernel_s} if timed else {})
        return tuning.Row(spec.op, device, "bfloat16", dict(spec.shape), fastest, best, seconds)

    def _timed_tiles(self, expected: jax.Array, repeats: int) -> Iterator[tuple[float, dict[str, int]]]:
        """Yields seconds and tiles; those that do not compile, or compute something else, are told and left out."""
        for tiles, program in self._tiles:
            try:
                result, seconds = program.run(repeats)
                error = worst_row_error(result, expected, self.spec.padding)
                if error > TOLERANCE:
                    raise ValueError(f"differs from XLA's result by {error:.1e} in a row, more than {TOLERANCE:.1e}")
                yield seconds, tiles
            except FAILURES as reason:
                print(f"{self.spec}, {tiles}: left out: {' '.join(str(reason).split())[:200]}", file=sys.stderr)


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
    former = [row for row in tuning.table() if row not in others]
    chosen = [spec for op in args.op for spec in specs(op)]
    tuning.check_size(len(others) + len(chosen))
    keep_compiled_programs()  # a run that was stopped compiles nothing twice
    trials = [Trial(spec) for spec in chosen]
    rows: list[tuning.Row] = []
    for trial in trials:
        rows.append(trial.tune(device, args.repeats))
        # What is measured is kept if the run is stopped, and beside it what the rest was before.
        measured = [(row.op, row.shape) for row in rows]
        left = [row for row in former if (row.op, row.shape) not in measured] if len(rows) < len(trials) else []
        tuning.write([*others, *rows, *left][: tuning.MAX_ROWS])
    print(f"{len(trials)} rows written to {tuning.PATH}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
