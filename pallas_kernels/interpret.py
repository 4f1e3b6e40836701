"""Running Mosaic GPU kernels on a CPU, with the semantics of barriers, copies and wgmma: slow, for tests.

JAX made these names public in 0.11; before that they are the same ones in a private module.
"""

from typing import Any

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams


def interpret_params() -> Any:
    """Returns the `interpret` argument of `plgpu.kernel`: races are found, and memory that nobody wrote is NaN."""
    return InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


def races_found() -> bool:
    """True if the last interpreted kernel had a race. From JAX 0.12 such a kernel raises instead."""
    return bool(gpu_callbacks.get_races().races_found)


def reset() -> None:
    """Forgets the state of an interpreted kernel that raised; without it the next one fails too."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
