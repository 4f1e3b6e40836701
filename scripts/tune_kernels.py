#!/usr/bin/env python3
"""Times XLA and every choice of tiles of each kernel on this GPU, and writes the table that `dispatch` reads.

    python3 scripts/tune_kernels.py [--op NAME ...] [--repeats N]

Rewrites the rows of this device and these ops in pallas_kernels/tuning.json; rows of other devices stay. A kernel is
the default for a shape only if it was faster than XLA by MARGIN. Takes a few minutes. Exit status: 2 without a GPU that
runs the kernels.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax.numpy as jnp

from jaxslm.bench.kernels import FAILURES, contenders, seconds_per_call
from pallas_kernels import tuning
from pallas_kernels.dispatch import MOSAIC_GPU, XLA, is_hopper, target_device
from pallas_kernels.specs import OPS, Spec, specs

MARGIN = 1.03
"""How many times faster than XLA a kernel must be: less is within the spread of two measurements."""


def tune(spec: Spec, device: str, repeats: int) -> tuning.Row:
    """Returns the row of one spec; a choice of tiles that does not compile is reported and left out."""
    arguments = tuple(map(jnp.asarray, spec.make(0)))
    call, laid_out = dict(contenders(spec))[XLA](arguments)
    xla_s = seconds_per_call(call, laid_out, repeats)
    timed = []
    for tiles in spec.tiles:
        try:
            timed.append((seconds_per_call(partial(spec.run_tiles, tiles=tiles), arguments, repeats), dict(tiles)))
        except FAILURES as error:
            print(f"{spec}, {dict(tiles)}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
    kernel_s, best = min(timed, key=lambda pair: pair[0], default=(float("inf"), {}))
    print(f"{spec}: XLA {xla_s * 1e6:.1f} µs, kernel {kernel_s * 1e6:.1f} µs with {best}", file=sys.stderr)
    fastest = MOSAIC_GPU if kernel_s * MARGIN < xla_s else XLA
    seconds = {XLA: xla_s} | ({MOSAIC_GPU: kernel_s} if timed else {})
    return tuning.Row(spec.op, device, "bfloat16", dict(spec.shape), fastest, best, seconds)


def main() -> int:
    """Tunes and writes; returns the exit status."""
    parser = argparse.ArgumentParser(description="Tunes the kernels on this GPU: see the head of the file.")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = target_device()[1]
    if not is_hopper(device):
        parser.error(f"kernels need a Hopper GPU and this is {device}: nothing to tune")
    rows = [tune(spec, device, args.repeats) for op in args.op for spec in specs(op)]
    others = [row for row in tuning.table() if row.device != device or row.op not in args.op]
    tuning.write([*others, *rows])
    print(f"{len(rows)} rows written to {tuning.PATH}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
