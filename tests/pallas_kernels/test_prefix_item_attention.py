"""Attention of packed scoring: kernel and XLA against float64, and the tiles that the kernel visits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import interpret
from pallas_kernels.dispatch import INTERPRETED, MOSAIC_GPU, XLA
from pallas_kernels.prefix_item_attention import KeySpans, mosaic_gpu, prefix_item_attention
from pallas_kernels.prefix_item_attention.schedule import ALIGNMENT, Schedule, plan
from pallas_kernels.prefix_item_attention.specs import SMALL, SPECS, packed_spans
from pallas_kernels.specs import Spec

ROUNDING = 2.0**-8
"""Largest relative error of rounding to bfloat16."""

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10 interprets no transposed operand of a product"
)


def assert_close(found: jax.Array, spec: Spec, arguments: tuple[np.ndarray, ...]) -> None:
    """Softmax weights and the result are each rounded once, so that the error is a share of the mean of |v|."""
    q, k, v, *spans = arguments
    error = np.abs(np.asarray(found).astype(np.float64) - spec.exact(*arguments))
    assert np.all(error <= 2.01 * ROUNDING * spec.exact(q, k, np.abs(v), *spans) + 1e-6)


@interpreted
@pytest.mark.parametrize("spec", SMALL, ids=str)
def test_the_kernel_agrees_with_float64(spec: Spec) -> None:
    arguments = spec.make(0)
    found = spec.run(*arguments, implementation=INTERPRETED)
    assert found.dtype == jnp.bfloat16
    assert_close(found, spec, arguments)
    assert not interpret.races_found()


@interpreted
@pytest.mark.parametrize(
    ("spec", "tiles"),
    [
        pytest.param(SMALL[1], mosaic_gpu.Tiles(keys=128, stages=3), id="large tiles, deep ring"),
        pytest.param(SMALL[2], mosaic_gpu.Tiles(keys=64, stages=1, queries=16), id="one stage, few queries"),
    ],
)
def test_other_tiles_give_the_same(spec: Spec, tiles: mosaic_gpu.Tiles) -> None:
    arguments = spec.make(1)
    q, k, v, *spans = map(jnp.asarray, arguments)
    params = interpret.interpret_params()
    found = mosaic_gpu.attention(q, k, v, KeySpans(*spans), tiles=tiles, interpret=params)
    assert_close(found, spec, arguments)
    assert not interpret.races_found()


@pytest.mark.parametrize("spec", SMALL, ids=str)
def test_xla_agrees_with_float64(spec: Spec) -> None:
    arguments = spec.make(2)
    assert_close(jax.jit(partial(spec.run, implementation=XLA))(*arguments), spec, arguments)


def test_a_query_that_sees_no_key_gets_zeros() -> None:
    (spec,) = (spec for spec in SMALL if "some items empty" in spec.name)
    arguments = spec.make(0)
    empty = arguments[5] == arguments[6]
    assert empty.any()
    assert not spec.exact(*arguments)[empty].any()
    assert not np.asarray(jax.jit(partial(spec.run, implementation=XLA))(*arguments))[empty].any()


def test_callers_may_bring_what_xla_computes() -> None:
    q, k, v, *spans = map(jnp.asarray, SMALL[2].make(0))
    own = jnp.ones(q.shape, q.dtype)
    assert prefix_item_attention(q, k, v, KeySpans(*spans), longest=(70, 9), xla=lambda: own) is own


def any_spans(generator: np.random.Generator, queries: int, num_keys: int) -> KeySpans:
    """Any two spans for each query, the prefix before the item, either maybe empty: more than requests have."""
    edges = np.sort(generator.integers(0, num_keys + 1, (4, queries)), axis=0)
    edges[1] = np.where(generator.random(queries) < 0.2, edges[0], edges[1])
    edges[3] = np.where(generator.random(queries) < 0.2, edges[2], edges[3])
    return KeySpans(*edges.astype(np.int32))


def any_requests(generator: np.random.Generator, longest: int) -> KeySpans:
    counts = generator.integers(1, 8, generator.integers(1, 4))
    return packed_spans(
        [(int(generator.integers(0, 60)), generator.integers(1, longest + 1, count).tolist()) for count in counts]
    )


@partial(jax.jit, static_argnums=(1, 2))
def all_bounds(spans: KeySpans, queries: int, keys: int) -> tuple[jax.Array, ...]:
    """Whole tiles and all tiles of each block [B], then the bounds of each [B, steps], of more steps than there are."""
    plan_B6 = plan(spans, queries, keys)
    schedule = Schedule(keys, *plan_B6.T[:, :, None])
    steps = jnp.arange(len(spans.item_end) // keys + 4)[None]
    return schedule.whole[:, 0], schedule.tiles[:, 0], *schedule.bounds(jnp.repeat(steps, len(plan_B6), axis=0))


def visits(spans: KeySpans, queries: int, keys: int, num_queries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each query meets each key that it sees, by the schedule of its block, and whether it sees it: [Q, M].

    Then how many tiles each block visits. Queries are filled up to `num_queries` with such that see nothing.
    """

    more = num_queries - len(spans.item_end)
    spans = KeySpans(*(jnp.pad(column, (0, more)) for column in spans))
    whole, tiles, starts, firsts, ends = map(np.asarray, all_bounds(spans, queries, keys))
    seen = np.asarray(spans.seen(num_queries))
    met = np.zeros(seen.shape, int)
    for block, count in enumerate(tiles):
        rows = slice(block * queries, (block + 1) * queries)
        for step in range(count):
            start, first, end = starts[block, step], firsts[block, step], ends[block, step]
            assert start % ALIGNMENT == 0
            assert start <= first < end
            met[rows, first : min(start + keys, end)] += seen[rows, first : min(start + keys, end)]
            if step < whole[block]:
                assert first == start
                assert start + keys <= num_queries
                assert seen[rows, start : start + keys].all()
    return met, seen, tiles


@pytest.mark.parametrize(("queries", "keys"), [(8, 32), (32, 16), (32, 32), (64, 16)])
def test_every_key_that_a_query_sees_is_visited_once(queries: int, keys: int) -> None:
    generator = np.random.default_rng(queries + keys)
    layouts = [any_spans(generator, 1024, 1000), any_spans(generator, 1024, 40)]
    layouts += [any_requests(generator, longest) for longest in [3, 9, 17, 33] * 4]
    for spans in layouts:
        met, seen, _ = visits(spans, queries, keys, 1024)
        np.testing.assert_array_equal(met, seen)


def test_tiles_that_no_query_sees_are_skipped() -> None:
    """Of items of 9 tokens a block of 64 sees the prefix (60) and at most 64 + 8 keys, however many items there are."""
    _, _, tiles = visits(packed_spans([(60, [9] * 90), (60, [9] * 20)]), 64, 64, 1152)
    assert tiles.max() == 4
    _, _, tiles = visits(packed_spans([(64, [501] * 2)]), 64, 64, 1152)
    causal = 8 * 9 / 2
    assert tiles.sum() == pytest.approx(2 * (causal + 2 * 8), rel=0.15)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_workload_and_every_tile_worth_timing_is_supported(spec: Spec) -> None:
    assert [mosaic_gpu.unsupported(spec.shape, jnp.bfloat16, tiles) for tiles in spec.tiles] == [None] * len(spec.tiles)


@pytest.mark.parametrize(
    ("Q", "H", "dtype", "reason"),
    [
        (4, 64, "float32", "takes bfloat16, not float32"),
        (4, 96, "bfloat16", "H=96 is neither 64 nor 128"),
        (0, 64, "bfloat16", "has no tokens"),
    ],
)
def test_what_the_kernel_cannot_take_is_said(Q: int, H: int, dtype: str, reason: str) -> None:
    x, span = jax.ShapeDtypeStruct((Q, 2, H), dtype), jax.ShapeDtypeStruct((Q,), jnp.int32)

    def shape(implementation: str | None) -> tuple[int, ...]:
        def attend(x: jax.Array, span: jax.Array) -> jax.Array:
            spans = KeySpans(span, span, span, span)
            return prefix_item_attention(x, x, x, spans, longest=(0, 4), implementation=implementation)

        return jax.eval_shape(attend, x, span).shape

    with pytest.raises(ValueError, match=reason):
        shape(INTERPRETED)
    assert shape(None) == x.shape


def test_tiles_that_overflow_shared_memory_are_refused() -> None:
    reason = mosaic_gpu.unsupported(SPECS[0].shape, jnp.bfloat16, {"keys": 128, "stages": 4})
    assert reason is not None
    assert "shared memory" in reason


def test_the_kernel_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        SMALL[0].run(*SMALL[0].make(0), implementation=MOSAIC_GPU)


def test_only_xla_has_a_gradient() -> None:
    q, k, v, *spans = map(jnp.asarray, SMALL[3].make(3))

    def total(q: jax.Array, implementation: str) -> jax.Array:
        return SMALL[3].run(q, k, v, *spans, implementation=implementation).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="has no gradient: name implementation 'xla'"):
        jax.eval_shape(jax.grad(partial(total, implementation=INTERPRETED)), q)
    gradient = jax.jit(jax.grad(partial(total, implementation=XLA)))(q)
    assert np.isfinite(np.asarray(gradient).astype(np.float32)).all()
    assert np.asarray(gradient).any()
