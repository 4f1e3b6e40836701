"""silu(x w_gate) * (x w_up) on Hopper in one kernel: the products share each tile of x, and only the result is written.

A persistent kernel: each multiprocessor walks over output tiles. One warpgroup loads by TMA into a ring of stages and
runs ahead, so it already fills the ring for the next tile while the two that multiply (wgmma) apply the gate and store.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

ROWS = 64
"""Rows of one wgmma instruction, and so of a compute warpgroup's part of a tile."""

WARPGROUPS = 2
"""That multiply; one more loads."""

SWIZZLE_BYTES = 128

SHARED_MEMORY_BYTES = 232448 - 1024
"""What a block of a Hopper GPU may use, less room for barriers."""


@dataclass(frozen=True)
class Tiles:
    """f: output columns of a tile. d: depth of one product. stages: how many of them the ring holds."""

    f: int = 128
    d: int = 64
    stages: int = 4

    @property
    def m(self) -> int:
        """Rows of a tile."""
        return ROWS * WARPGROUPS

    def shared_memory_bytes(self) -> int:
        """Shared memory of a block: the ring and the output tile, in bfloat16."""
        return 2 * (self.stages * self.d * (self.m + 2 * self.f) + self.m * self.f)


def _kernel(x_MD: Any, w_gate_DF: Any, w_up_DF: Any, h_MF: Any, *, tiles: Tiles) -> None:
    M, D = x_MD.shape
    F = h_MF.shape[1]
    m, f, d, stages = tiles.m, tiles.f, tiles.d, tiles.stages
    steps = D // d
    dtype = h_MF.dtype
    swizzled = (plgpu.TilingTransform((8, SWIZZLE_BYTES // 2)), plgpu.SwizzleTransform(SWIZZLE_BYTES))

    columns_of_tiles = F // f
    tiles_in_all = (M // m) * columns_of_tiles

    @functools.partial(
        pl.run_scoped,
        x_smem=plgpu.SMEM((stages, m, d), dtype, transforms=swizzled),
        gate_smem=plgpu.SMEM((stages, d, f), dtype, transforms=swizzled),
        up_smem=plgpu.SMEM((stages, d, f), dtype, transforms=swizzled),
        h_smem=plgpu.SMEM((m, f), dtype, transforms=swizzled),
        loaded=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        consumed=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        collective_axes="warpgroup",
    )
    def scope(x_smem: Any, gate_smem: Any, up_smem: Any, h_smem: Any, loaded: Any, consumed: Any) -> None:
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        tiles_here = lax.div(tiles_in_all - 1 - block, lax.axis_size("block")) + 1

        def tile_start(turn: Any) -> tuple[Any, Any]:
            """First row and column of this block's tile number `turn`; tiles in flight lie side by side in rows."""
            tile = block + turn * lax.axis_size("block")
            return lax.div(tile, columns_of_tiles) * m, lax.rem(tile, columns_of_tiles) * f

        @pl.when(warpgroup == WARPGROUPS)
        def load() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, tiles_here * steps)
            def step(number: Any) -> None:
                slot = lax.rem(number, stages)

                @pl.when(number >= stages)
                def wait() -> None:
                    plgpu.barrier_wait(consumed.at[slot])

                row, column = tile_start(lax.div(number, steps))
                depth = pl.ds(lax.rem(number, steps) * d, d)
                plgpu.copy_gmem_to_smem(x_MD.at[pl.ds(row, m), depth], x_smem.at[slot], loaded.at[slot])
                plgpu.copy_gmem_to_smem(w_gate_DF.at[depth, pl.ds(column, f)], gate_smem.at[slot], loaded.at[slot])
                plgpu.copy_gmem_to_smem(w_up_DF.at[depth, pl.ds(column, f)], up_smem.at[slot], loaded.at[slot])

            @pl.loop(lax.max(tiles_here * steps - stages, 0), tiles_here * steps)
            def drain(number: Any) -> None:
                plgpu.barrier_wait(consumed.at[lax.rem(number, stages)])

        @pl.when(warpgroup < WARPGROUPS)
        def compute() -> None:
            plgpu.set_max_registers(232, action="increase")
            part = pl.ds(warpgroup * ROWS, ROWS)

            @pl.loop(0, tiles_here)
            def tile(turn: Any) -> None:
                def products(gate: Any, up: Any) -> tuple[Array, Array]:
                    @pl.loop(turn * steps, (turn + 1) * steps)
                    def step(number: Any) -> None:
                        slot = lax.rem(number, stages)
                        plgpu.barrier_wait(loaded.at[slot])
                        plgpu.wgmma(gate, x_smem.at[slot, part], gate_smem.at[slot])
                        plgpu.wgmma(up, x_smem.at[slot, part], up_smem.at[slot])
                        # These two may still run; those before them are done, so their slot can be filled anew.
                        plgpu.wgmma_wait(2)

                        @pl.when(number > turn * steps)
                        def release() -> None:
                            plgpu.barrier_arrive(consumed.at[lax.rem(number - 1, stages)])

                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(consumed.at[lax.rem((turn + 1) * steps - 1, stages)])
                    return gate[...], up[...]

                accumulator = plgpu.WGMMAAccumulatorRef((ROWS, f), jnp.float32)
                gate, up = pl.run_scoped(products, accumulator, accumulator)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                h_smem[part] = (gate * up / (1 + jnp.exp(-gate))).astype(dtype)
                plgpu.commit_smem()
                row, column = tile_start(turn)
                out = h_MF.at[pl.ds(row + warpgroup * ROWS, ROWS), pl.ds(column, f)]
                plgpu.copy_smem_to_gmem(h_smem.at[part], out)

            plgpu.wait_smem_to_gmem(0)


def unsupported(shape: Mapping[str, int], dtype: DTypeLike, tiles: Mapping[str, int]) -> str | None:
    """Returns why the kernel cannot take such arguments with these tiles on any device; None if it can."""
    chosen = Tiles(**tiles)
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype).name}"
    for axis, size in (("D", chosen.d), ("F", chosen.f)):
        if shape[axis] % size:
            return f"{axis}={shape[axis]} is not a multiple of its tile of {size}"
    if shape["M"] == 0:
        return "has no rows"
    if chosen.shared_memory_bytes() > SHARED_MEMORY_BYTES:
        return f"its tiles take {chosen.shared_memory_bytes()} bytes of the {SHARED_MEMORY_BYTES} of shared memory"
    return None


@functools.partial(jax.jit, static_argnames=("tiles", "blocks", "interpret"))  # traced once for all layers
def gated_mlp(
    x_MD: Float[Array, "M D"],
    w_gate_DF: Float[Array, "D F"],
    w_up_DF: Float[Array, "D F"],
    *,
    tiles: Tiles,
    blocks: int,
    interpret: Any = None,
) -> Float[Array, "M F"]:
    """Returns silu(x w_gate) * (x w_up) in bfloat16: products, gate and their product in float32, rounded once.

    Rows that fill no whole tile cost a copy of x and of the result. There is no gradient.

    Args:
        blocks: multiprocessors to occupy.
        interpret: None on a GPU, or `pallas_kernels.interpret.interpret_params()`.
    """
    M, F = x_MD.shape[0], w_gate_DF.shape[1]
    padded = -(-M // tiles.m) * tiles.m
    call = plgpu.kernel(
        functools.partial(_kernel, tiles=tiles),
        out_type=jax.ShapeDtypeStruct((padded, F), x_MD.dtype),
        grid=(min(blocks, (padded // tiles.m) * (F // tiles.f)),),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="gated_mlp",
    )
    h: Array = call(jnp.pad(x_MD, ((0, padded - M), (0, 0))), w_gate_DF, w_up_DF)
    return h[:M]
