"""Which implementation of an op runs: the one that is named, or the fastest measured one that supports the arguments.

Nothing is chosen in silence: `explain` lists every choice of the process with its reason, and the first time that an op
falls back to XLA for one reason is logged.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
from jax.typing import DTypeLike

from pallas_kernels import tuning

XLA = tuning.XLA
MOSAIC_GPU = tuning.MOSAIC_GPU
INTERPRETED = "mosaic_gpu_interpreted"
"""The kernel on a CPU, slow: memory starts as NaN, and reads and writes that race are found."""

IMPLEMENTATIONS = (XLA, MOSAIC_GPU, INTERPRETED)

CLEARLY = 1.5
"""How many times faster than XLA a kernel must have been on a GPU of the same kind to run on one that has no rows."""

Unsupported = Callable[[Mapping[str, int], DTypeLike, Mapping[str, int]], str | None]
"""(shape, dtype, tiles) -> why a kernel cannot take such arguments on any device, or None if it can."""


class CannotRunError(ValueError):
    """A named implementation does not take the arguments, or not on this device; says why."""


_logger = logging.getLogger("pallas_kernels")


@dataclass(frozen=True)
class Choice:
    """What runs one op on arguments of one shape, and why.

    Attributes:
        shape: the op's sizes by axis letter. tiles: sizes of the kernel's tiles where they were tuned, else empty.
    """

    op: str
    shape: Mapping[str, int]
    dtype: str
    device: str
    implementation: str
    reason: str
    tiles: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = " ".join(f"{axis}={size}" for axis, size in self.shape.items())
        return f"{self.op} [{sizes}] {self.dtype} on {self.device}: {self.implementation}, {self.reason}"


_choices: dict[str, Choice] = {}
"""By their text. Choices are made while JAX traces, so there are as many as compiled shapes."""


def explain() -> list[Choice]:
    """Returns every choice that this process has made, each once, in order."""
    return list(_choices.values())


def target_device() -> tuple[str, str, int]:
    """Returns platform ("cpu", "gpu", "tpu"), name and multiprocessors of the device that is being compiled for.

    That is the device of the mesh in scope, so that it is right when a program is compiled for a device that is absent;
    without a mesh it is JAX's default device. A CPU counts as two multiprocessors, so that tests use a second one.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.platform, abstract.device_kind, abstract.num_cores or 2
    device = jax.devices()[0]
    return device.platform, device.device_kind, device.core_count if device.platform == "gpu" else 2


def is_hopper(device: str) -> bool:
    """True for the names of GPUs with wgmma and TMA: compute capability 9.0."""
    return any(name in device for name in ("H100", "H200", "H800", "GH200"))


def choose(
    op: str, shape: Mapping[str, int], dtype: DTypeLike, unsupported: Unsupported, implementation: str | None
) -> Choice:
    """Returns which implementation of `op` runs on arguments of this shape and dtype.

    Args:
        shape: sizes by axis letter.
        implementation: one of IMPLEMENTATIONS, or None for the fastest of those measured on this device that takes the
            arguments, or on another Hopper GPU if it was clearly faster there. Without a measurement that is XLA.

    Raises:
        ValueError: an unknown name; CannotRunError for a named kernel that cannot run here.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation {implementation!r}: must be None or one of {', '.join(IMPLEMENTATIONS)}")
    _, device, _ = target_device()
    dtype_name = jax.numpy.dtype(dtype).name
    rows = tuning.nearest(op, device, dtype_name, shape) or _of_relatives(op, device, dtype_name, shape)
    fitting = [row for row in rows if unsupported(shape, dtype, row.tiles) is None]
    # Tiles of a row may not divide this shape, where the next row's do. Where XLA won tiles do not matter.
    row = next((row for row in rows if row.fastest == XLA or row in fitting), rows[0] if rows else None)
    if implementation is not None:
        row = fitting[0] if fitting else None
    tiles = row.tiles if row else {}

    def chosen(name: str, reason: str) -> Choice:
        return Choice(op, shape, dtype_name, device, name, reason, {} if name == XLA else tiles)

    if implementation is not None:
        name, reason = implementation, "asked for by name"
    elif row is not None and (row.device == device or row.seconds[XLA] >= CLEARLY * row.seconds[row.fastest]):
        name, reason = row.fastest, "measured fastest" + (f" on {row.device}" if row.device != device else "")
    else:
        return _record(chosen(XLA, "no kernel is measured"), fell_back=is_hopper(device))
    if name == XLA:
        return _record(chosen(name, reason))
    why_not = unsupported(shape, dtype, tiles)
    if why_not is None and name != INTERPRETED and not is_hopper(device):
        why_not = "needs a Hopper GPU"
    if why_not is None:
        return _record(chosen(name, reason))
    if implementation is not None:
        raise CannotRunError(f"{chosen(name, reason)}: {why_not}")
    return _record(chosen(XLA, why_not), fell_back=True)


def _of_relatives(op: str, device: str, dtype: str, shape: Mapping[str, int]) -> list[tuning.Row]:
    """Returns the rows of other Hopper GPUs, which have the same cores and other memory; none for another device."""
    return [row for row in tuning.nearest(op, None, dtype, shape) if is_hopper(row.device) and is_hopper(device)]


def _record(choice: Choice, *, fell_back: bool = False) -> Choice:
    # A list, as other threads trace too.
    first = all(
        (choice.op, choice.device, choice.reason) != (c.op, c.device, c.reason) for c in list(_choices.values())
    )
    if fell_back and first:
        _logger.warning("%s", choice)
    return _choices.setdefault(str(choice), choice)
