"""The shapes at which the gated product is tested, measured and tuned."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import target_device
from pallas_kernels.gated_mlp import gated_mlp, mosaic_gpu, reference
from pallas_kernels.specs import Spec

TILES = tuple(
    {"f": f, "d": d, "stages": stages}
    for f, d, stages in ((128, 64, 4), (128, 64, 3), (128, 128, 2), (64, 64, 6), (64, 64, 4), (64, 128, 3))
)
"""First the default."""


def _run_tiles(x: jax.Array, w_gate: jax.Array, w_up: jax.Array, *, tiles: Mapping[str, int]) -> jax.Array:
    blocks = target_device()[2]
    return mosaic_gpu.gated_mlp(x, w_gate, w_up, tiles=mosaic_gpu.Tiles(**tiles), blocks=blocks)


def _spec(name: str, M: int, D: int, F: int) -> Spec:
    def make(seed: int) -> tuple[np.ndarray, ...]:
        generator = np.random.default_rng(seed)

        def draw(*shape: int, spread: float) -> np.ndarray:
            return (spread * generator.standard_normal(shape, np.float32)).astype(jnp.bfloat16)

        return draw(M, D, spread=1.0), draw(D, F, spread=D**-0.5), draw(D, F, spread=D**-0.5)

    return Spec(
        op="gated_mlp",
        name=name,
        shape={"M": M, "D": D, "F": F},
        make=make,
        run=gated_mlp,
        exact=reference.exact,
        flops=4 * M * D * F,
        bytes=2 * (M * D + 2 * D * F + M * F),
        tiles=TILES,
        run_tiles=_run_tiles,
    )


# Rows: a large pass (all tokens), one request of `latent_8` (60 + 50 * 9 tokens), and the answer tokens of eight
# requests, which are all that the last layer's MLP reads.
SPECS = (
    _spec("qwen3-0.6b, large pass", 16384, 1024, 3072),
    _spec("qwen3-0.6b-pruned, large pass", 16384, 1024, 1536),
    _spec("qwen3-0.6b-pruned, one request of latent_8", 510, 1024, 1536),
    _spec("qwen3-0.6b-pruned, last layer", 400, 1024, 1536),
    _spec("smollm2-135m, large pass", 16384, 576, 1536),
    _spec("smollm2-135m-pruned, large pass", 16384, 576, 1024),
)

SMALL = (
    _spec("one row", 1, 64, 128),
    _spec("odd rows, two tiles each way", 131, 128, 256),
    _spec("depth longer than the ring", 128, 576, 128),
    _spec("more tiles than blocks", 259, 64, 384),
)
