"""The Hopper kernel: flash attention whose tiles follow the two key spans of each query.

A block takes up to 64 queries that follow one another, for W query heads that share one key/value head: W warpgroups
compute, one more copies keys and values into a ring of tiles (TMA), which all W read. The queries of a block may belong
to many short items or to a part of one long item; either way the keys they see lie in two intervals, that of the
prefixes and that of the items, and only tiles that overlap these are visited (`schedule`).

Softmax is computed online over all of them in base 2 (Dao et al., 2205.14135; Shah et al., 2407.08608), so the merge of
prefix and item costs nothing extra.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.prefix_item_attention.reference import KeySpans
from pallas_kernels.prefix_item_attention.schedule import ALIGNMENT, Schedule, plan

ROWS = 64
"""Rows of one wgmma: queries that a block reads."""

SHARED_MEMORY_BYTES = 232448 - 1024
"""What a block of a Hopper GPU may use, less room for barriers."""

REGISTERS = {1: None, 2: (232, 40), 3: (160, 32)}
"""Per thread of computing and of copying warpgroups, by the number of the former: at most 512 for all together."""

LOWEST = -1e30
"""Where the running maximum starts: finite, so that a row which has seen no key yet subtracts no infinities."""


@dataclass(frozen=True)
class Tiles:
    """Sizes that may be tuned.

    Attributes:
        keys: keys of a tile: 64, or 128 with `weights_in_registers`; otherwise registers spill.
        stages: tiles of keys, and of values, in flight.
        queries: how many of its ROWS queries a block answers; fewer where neighbours see keys that lie far apart.
        weights_in_registers: 1 feeds the softmax weights to the second product from registers, 0 from shared memory.
            Less traffic, but interpret mode has no such operand.
    """

    keys: int = 64
    stages: int = 2
    queries: int = ROWS
    weights_in_registers: int = 0

    def shared_memory_bytes(self, shape: Mapping[str, int]) -> int:
        """Shared memory of a block, in bfloat16: queries, softmax weights, the ring of keys and values."""
        weights, H = 0 if self.weights_in_registers else self.keys, shape["H"]
        W = heads_per_block(shape["N"] // shape["K"])
        return 2 * (W * ROWS * (H + weights) + 2 * self.stages * self.keys * H)


def tiles_for(tuned: Mapping[str, int], shape: Mapping[str, int]) -> Tiles:
    """Returns the tuned tiles if there are some, else ones that are safe for sizes by axis letter, not measured."""
    if tuned:
        return Tiles(**tuned)
    # A block's queries should see about 256 keys between them, where each stands for M / Q of these.
    queries = max((q for q in (16, 32, ROWS) if q * shape["M"] <= 256 * shape["Q"]), default=8)
    return Tiles(queries=queries)


def heads_per_block(queries_per_kv: int) -> int:
    """Returns W: the most query heads, at most three, that divide a group and so can share its keys in one block."""
    return max(w for w in (1, 2, 3) if queries_per_kv % w == 0)


def unsupported(shape: Mapping[str, int], dtype: DTypeLike, tiles: Mapping[str, int]) -> str | None:
    """Returns why the kernel cannot take such arguments with these tiles on any device; None if it can."""
    chosen = tiles_for(tiles, shape)
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype).name}"
    if shape["H"] not in (64, 128):
        return f"H={shape['H']} is neither 64 nor 128"
    if shape["Q"] == 0 or shape["M"] == 0:
        return "has no tokens"
    needed = chosen.shared_memory_bytes(shape)
    if needed > SHARED_MEMORY_BYTES:
        return f"its tiles take {needed} bytes of the {SHARED_MEMORY_BYTES} of shared memory"
    return None


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))  # traced once for all layers
def attention(
    q_QNH: Float[Array, "Q N H"],
    k_MKH: Float[Array, "M K H"],
    v_MKH: Float[Array, "M K H"],
    spans: KeySpans,
    *,
    tiles: Tiles,
    interpret: Any = None,
) -> Float[Array, "Q N H"]:
    """Returns softmax(q k / sqrt(H)) v over the keys seen. Its gradient raises NotImplementedError.

    Copies are made if Q is no multiple of `tiles.queries`, or these are fewer than ROWS, and if M is no multiple of
    ALIGNMENT or less than a tile.

    Args:
        interpret: None on a GPU, or `pallas_kernels.interpret.interpret_params()`.
    """
    Q, M = q_QNH.shape[0], k_MKH.shape[0]
    blocks = -(-Q // tiles.queries)
    more_keys = max(tiles.keys, M + -M % ALIGNMENT) - M

    def padded(x: Array, count: int) -> Array:
        return jnp.pad(x, ((0, count), *((0, 0) for _ in x.shape[1:]))) if count else x

    owned = KeySpans(*(padded(jnp.asarray(column, jnp.int32), blocks * tiles.queries - Q) for column in spans))
    read = jnp.stack([padded(column, ROWS - tiles.queries) for column in owned])
    out = _kernel_call(
        padded(q_QNH, read.shape[1] - Q),
        padded(k_MKH, more_keys),
        padded(v_MKH, more_keys),
        read,
        plan(owned, tiles.queries, tiles.keys),
        tiles,
        interpret,
    )
    return out[:Q]


class _Shared(NamedTuple):
    """What a block has in shared memory: tiles, and the barriers that say when they are full or free again."""

    spans: Any
    q: Any
    k: Any
    v: Any
    weights: Any
    spans_full: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any


def _shared(tiles: Tiles, W: int, H: int, dtype: DTypeLike) -> _Shared:
    """Returns what to allocate. Without weights in shared memory there is one unused tile of the smallest size."""

    def matrices(count: int, rows: int, columns: int) -> Any:
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((count, rows, columns), dtype, transforms=transforms)

    ring = plgpu.Barrier(num_barriers=tiles.stages)
    ring_free = plgpu.Barrier(num_arrivals=W, num_barriers=tiles.stages)
    return _Shared(
        spans=plgpu.SMEM((4, ROWS), jnp.int32),
        q=matrices(W, ROWS, H),
        k=matrices(tiles.stages, tiles.keys, H),
        v=matrices(tiles.stages, tiles.keys, H),
        weights=matrices(1, 8, 64) if tiles.weights_in_registers else matrices(W, ROWS, tiles.keys),
        spans_full=plgpu.Barrier(),
        q_full=plgpu.Barrier(num_barriers=W),
        k_full=ring,
        v_full=ring,
        k_free=ring_free,
        v_free=ring_free,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _kernel_call(
    q_QNH: Array, k_MKH: Array, v_MKH: Array, spans_4Q: Array, plan_B6: Array, tiles: Tiles, interpret: Any
) -> Array:
    (_, N, H), (M, K, _) = q_QNH.shape, k_MKH.shape
    W = heads_per_block(N // K)

    def body(plan_gmem: Any, spans_gmem: Any, q_gmem: Any, k_gmem: Any, v_gmem: Any, out_gmem: Any, *refs: Any) -> None:
        shared = _Shared(*refs)
        block, heads, warpgroup = lax.axis_index("block"), lax.axis_index("heads"), lax.axis_index("warpgroup")
        schedule = Schedule(tiles.keys, *(plan_gmem[block, i] for i in range(6)))
        first_query = pl.multiple_of(block * tiles.queries, 8)
        registers = REGISTERS[W]

        @pl.when(warpgroup < W)
        def compute() -> None:
            if registers:
                plgpu.set_max_registers(registers[0], action="increase")
            head = heads * W + warpgroup
            q_smem = shared.q.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_gmem.at[pl.ds(first_query, ROWS), head], q_smem, shared.q_full.at[warpgroup])
            plgpu.barrier_wait(shared.spans_full)
            plgpu.barrier_wait(shared.q_full.at[warpgroup])
            out = _attend(shared, schedule, warpgroup, tiles, num_keys=M)
            q_smem[...] = out.astype(q_smem.dtype)  # The last product has read the queries.
            plgpu.commit_smem()
            out_rows = out_gmem.at[pl.ds(first_query, tiles.queries), head]
            plgpu.copy_smem_to_gmem(shared.q.at[warpgroup, pl.ds(0, tiles.queries)], out_rows)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == W)
        def copy() -> None:
            if registers:
                plgpu.set_max_registers(registers[1], action="decrease")
            plgpu.copy_gmem_to_smem(spans_gmem.at[:, pl.ds(first_query, ROWS)], shared.spans, shared.spans_full)
            kv_head = lax.div(heads, jnp.int32(N // K // W))
            _fill_ring(k_gmem, v_gmem, kv_head, shared, schedule, tiles, num_keys=M)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q_QNH.shape, q_QNH.dtype),
        scratch_types=list(_shared(tiles, W, H, q_QNH.dtype)),
        grid=(plan_B6.shape[0], N // W),
        grid_names=("block", "heads"),
        num_threads=W + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="prefix_item_attention",
    )(plan_B6, spans_4Q, q_QNH, k_MKH, v_MKH)


@_kernel_call.defjvp
def _no_gradient(tiles: Tiles, interpret: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    raise NotImplementedError("the kernel of prefix_item_attention has no gradient: name implementation 'xla' to train")


def _fill_ring(
    k_gmem: Any, v_gmem: Any, kv_head: Array, shared: _Shared, schedule: Schedule, tiles: Tiles, *, num_keys: int
) -> None:
    """Copies each tile of keys and of values into the ring as soon as all computing warpgroups have left its slot."""

    @pl.loop(0, schedule.tiles)
    def fill(step: Array) -> None:
        slot = lax.rem(step, jnp.int32(tiles.stages))
        rows = pl.ds(pl.multiple_of(_within(schedule.bounds(step)[0], tiles, num_keys), ALIGNMENT), tiles.keys)
        for gmem, smem, full, free in (
            (k_gmem, shared.k, shared.k_full, shared.k_free),
            (v_gmem, shared.v, shared.v_full, shared.v_free),
        ):

            @pl.when(step >= tiles.stages)
            def wait(free: Any = free) -> None:
                plgpu.barrier_wait(free.at[slot])

            plgpu.copy_gmem_to_smem(gmem.at[rows, kv_head], smem.at[slot], full.at[slot])

    @pl.loop(jnp.maximum(schedule.tiles - tiles.stages, 0), schedule.tiles)
    def drain(step: Array) -> None:
        slot = lax.rem(step, jnp.int32(tiles.stages))
        plgpu.barrier_wait(shared.k_free.at[slot])
        plgpu.barrier_wait(shared.v_free.at[slot])


def _within(start: Array, tiles: Tiles, num_keys: int) -> Array:
    """Returns where to copy a tile from that starts at `start`: earlier, if it would reach over the end."""
    return jnp.minimum(start, num_keys - tiles.keys)


def _attend(shared: _Shared, schedule: Schedule, warpgroup: Array, tiles: Tiles, *, num_keys: int) -> Array:
    """Returns [ROWS, H] float32: the outputs of one head, over all tiles of the schedule."""
    H = shared.q.shape[-1]
    scale = H**-0.5 * math.log2(math.e)
    wgmma, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    spans = KeySpans(*(plgpu.layout_cast(shared.spans[i], row) for i in range(4)))

    def visit(step: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        out, highest, total = carry
        slot = lax.rem(step, jnp.int32(tiles.stages))

        def product(acc: Any) -> Array:
            plgpu.wgmma(acc, shared.q.at[warpgroup], shared.k.at[slot].transpose((1, 0)))
            return acc[...]

        plgpu.barrier_wait(shared.k_full.at[slot])
        logits = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, tiles.keys), jnp.float32))
        plgpu.barrier_arrive(shared.k_free.at[slot])
        if masked:
            start, first, end = schedule.bounds(step)
            key = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=wgmma)
            logits = jnp.where(_seen(spans, key + _within(start, tiles, num_keys), first, end), logits, -jnp.inf)
        new_highest = jnp.maximum(highest, jnp.max(logits, axis=1) * scale)
        weights = jnp.exp2(logits * scale - _columns(new_highest, tiles.keys))
        rescale = jnp.exp2(highest - new_highest)
        total = total * rescale + jnp.sum(weights, axis=1)
        out = out * _columns(rescale, H)
        weights = weights.astype(shared.v.dtype)
        plgpu.barrier_wait(shared.v_full.at[slot])
        out = _add_product(out, weights, shared, slot, warpgroup, tiles)
        plgpu.barrier_arrive(shared.v_free.at[slot])
        return out, new_highest, total

    carry = (
        plgpu.layout_cast(jnp.full((ROWS, H), 0, jnp.float32), wgmma),
        plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), row),
        plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.float32), row),
    )
    carry = lax.fori_loop(0, schedule.whole, functools.partial(visit, masked=False), carry)
    out, _, total = lax.fori_loop(schedule.whole, schedule.tiles, functools.partial(visit, masked=True), carry)
    return out * _columns(1 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny), H)


def _columns(x: Array, width: int) -> Array:
    """[ROWS] -> [ROWS, width]."""
    return lax.broadcast_in_dim(x, (x.shape[0], width), (0,))


def _seen(spans: KeySpans, key: Array, first: Array, end: Array) -> Array:
    """True at the keys [ROWS, keys] of a tile that a query sees, if they are among those from `first` to `end` - 1."""

    def within(start: Array, stop: Array) -> Array:
        start, stop = jnp.maximum(start, first), jnp.minimum(stop, end)
        return (key >= _columns(start, key.shape[1])) & (key < _columns(stop, key.shape[1]))

    return within(spans.prefix_start, spans.prefix_end) | within(spans.item_start, spans.item_end)


def _add_product(out: Array, weights: Array, shared: _Shared, slot: Array, warpgroup: Array, tiles: Tiles) -> Array:
    """Returns out + weights v."""
    if tiles.weights_in_registers:

        def accumulate(acc: Any) -> None:
            plgpu.wgmma(acc, weights, shared.v.at[slot])

        summed: Array = pl.run_state(accumulate)(plgpu.WGMMAAccumulatorRef.init(out))
        return summed

    def product(acc: Any) -> Array:
        plgpu.wgmma(acc, shared.weights.at[warpgroup], shared.v.at[slot])
        return acc[...]

    shared.weights[warpgroup] = weights
    plgpu.commit_smem()
    return out + pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, out.shape[1]), jnp.float32))
