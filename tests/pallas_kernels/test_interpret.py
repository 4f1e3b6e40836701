"""What the tests of kernels rely on: interpretation finds races and memory that nobody wrote."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import interpret


def copy_through_shared_memory(x: jax.Array, *, wait: bool) -> jax.Array:
    """Copies x by TMA; without `wait` the copy out does not wait for the copy in."""

    def kernel(x_ref: Any, out_ref: Any, smem: Any, loaded: Any) -> None:
        plgpu.copy_gmem_to_smem(x_ref, smem, loaded)
        if wait:
            plgpu.barrier_wait(loaded)
        out_ref[...] = smem[...]
        if not wait:
            plgpu.barrier_wait(loaded)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        interpret=interpret.interpret_params(),
    )
    result: jax.Array = call(x)
    return result.block_until_ready()


def test_a_kernel_that_does_not_wait_for_its_copy_is_caught() -> None:
    x = jnp.arange(1.0, 129.0)
    np.testing.assert_array_equal(copy_through_shared_memory(x, wait=True), x)
    assert not interpret.races_found()
    try:
        copy_through_shared_memory(x, wait=False)
        caught = interpret.races_found()
    except jax.errors.JaxRuntimeError as error:  # as of JAX 0.12
        caught = "RACE DETECTED" in str(error)
        interpret.reset()
    assert caught


def test_memory_that_nobody_wrote_is_nan() -> None:
    call = plgpu.kernel(
        lambda out_ref: None,
        out_type=jax.ShapeDtypeStruct((8,), jnp.float32),
        interpret=interpret.interpret_params(),
    )
    assert np.isnan(call()).all()
