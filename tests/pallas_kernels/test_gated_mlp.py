"""The gated product: kernel and XLA against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import interpret
from pallas_kernels.dispatch import INTERPRETED, MOSAIC_GPU, XLA
from pallas_kernels.gated_mlp import gated_mlp, mosaic_gpu
from pallas_kernels.gated_mlp.specs import SMALL, SPECS
from pallas_kernels.specs import Spec

BFLOAT16_STEP = 2.0**-7
"""Relative distance of neighbouring bfloat16 numbers at most; rounding errs by half of it."""


@pytest.mark.parametrize("spec", SMALL, ids=str)
def test_the_kernel_rounds_the_exact_result_once(spec: Spec) -> None:
    arguments = spec.make(0)
    found = np.asarray(spec.run(*arguments, implementation=INTERPRETED))
    assert not interpret.races_found()
    assert found.dtype == jnp.bfloat16
    exact = spec.exact(*arguments)
    np.testing.assert_allclose(found.astype(np.float64), exact, rtol=0.51 * BFLOAT16_STEP, atol=1e-5)


@pytest.mark.parametrize("spec", SMALL, ids=str)
def test_xla_rounds_three_times(spec: Spec) -> None:
    arguments = spec.make(1)
    found = np.asarray(spec.run(*arguments, implementation=XLA)).astype(np.float64)
    exact = spec.exact(*arguments)
    assert np.linalg.norm(found - exact) < BFLOAT16_STEP * np.linalg.norm(exact)


def test_leading_axes_stay() -> None:
    x, gate, up = (jnp.asarray(array) for array in SMALL[0].make(2))
    x = x * jnp.arange(1, 7, dtype=x.dtype).reshape(2, 3, 1)
    found = gated_mlp(x, gate, up, implementation=INTERPRETED)
    assert found.shape == (2, 3, gate.shape[1])
    exact = SMALL[0].exact(*(np.asarray(array) for array in (x.reshape(6, -1), gate, up)))
    np.testing.assert_allclose(found.reshape(6, -1).astype(float), exact, rtol=0.51 * BFLOAT16_STEP, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_workload_and_every_tile_worth_timing_is_supported(spec: Spec) -> None:
    assert [mosaic_gpu.unsupported(spec.shape, jnp.bfloat16, tiles) for tiles in ({}, *spec.tiles)].count(None) > 1
    assert mosaic_gpu.unsupported(spec.shape, jnp.bfloat16, {}) is None


@pytest.mark.parametrize(
    ("M", "D", "F", "dtype", "reason"),
    [
        (4, 64, 128, "float32", "takes bfloat16, not float32"),
        (4, 96, 128, "bfloat16", "D=96 is not a multiple of its tile of 64"),
        (4, 64, 48, "bfloat16", "F=48 is not a multiple of its tile of 128"),
        (0, 64, 128, "bfloat16", "has no rows"),
    ],
)
def test_what_the_kernel_cannot_take_is_said(M: int, D: int, F: int, dtype: str, reason: str) -> None:
    x, w = jax.ShapeDtypeStruct((M, D), dtype), jax.ShapeDtypeStruct((D, F), dtype)
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(lambda x, w: gated_mlp(x, w, w, implementation=INTERPRETED), x, w)
    assert jax.eval_shape(lambda x, w: gated_mlp(x, w, w), x, w).shape == (M, F)


def test_weights_of_another_dtype_are_said() -> None:
    x, gate, up = map(jnp.asarray, SMALL[0].make(0))
    with pytest.raises(ValueError, match="takes bfloat16, not float32"):
        gated_mlp(x, gate.astype(jnp.float32), up, implementation=INTERPRETED)
    with pytest.raises(ValueError, match="takes bfloat16, not float32"):
        gated_mlp(x, gate, up.astype(jnp.float32), implementation=INTERPRETED)
    assert gated_mlp(x, gate, up.astype(jnp.float32)).shape == (1, gate.shape[1])


def test_tiles_that_overflow_shared_memory_are_refused() -> None:
    reason = mosaic_gpu.unsupported(SPECS[0].shape, jnp.bfloat16, {"stages": 5})
    assert reason is not None
    assert "shared memory" in reason


def test_the_kernel_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        SMALL[0].run(*SMALL[0].make(0), implementation=MOSAIC_GPU)


def test_xla_has_a_gradient() -> None:
    x, gate, up = (jnp.asarray(array, jnp.float32) for array in SMALL[0].make(3))

    def total(x: jax.Array) -> jax.Array:
        return gated_mlp(x, gate, up).sum()

    step = 1e-2 * jax.random.normal(jax.random.key(0), x.shape)
    predicted = jnp.vdot(jax.grad(total)(x), step)
    np.testing.assert_allclose(total(x + step / 2) - total(x - step / 2), predicted, rtol=1e-2)
