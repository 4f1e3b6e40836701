"""Compiles programs for an H200 on a machine without a GPU, and reads the compiler's report.

Needs the packages jax-cuda13-plugin and jax-cuda13-pjrt (extra `aot`), no driver and no CUDA toolkit. `h200.txtpb`
describes the device in XLA's text form (GpuTargetConfigProto): what a
real one reports, with the public data of the chip.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the GPU compiler of the extra `aot`",
)


@dataclass(frozen=True)
class Kernel:
    """The compiler's report on one Mosaic GPU kernel; bytes of registers that spill, and of shared memory, a block."""

    name: str
    registers: int
    spilled_bytes: int
    shared_memory_bytes: int


@cache
def _mesh() -> Mesh:
    target = Path(__file__).with_name("h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=target)
    return Mesh(np.array(topology.devices), ("x",), axis_types=(AxisType.Auto,))


@contextmanager
def _without_cache() -> Iterator[None]:
    """A program from JAX's cache on disk comes without a report."""
    before = cast(Any, jax.config).jax_enable_compilation_cache  # its type differs between versions of JAX
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
"""What a GPU runs, though the tests compile with less (JAX_DISABLE_MOST_OPTIMIZATIONS)."""


def compile_for_h200(function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """Returns the program; arguments are pytrees of arrays or of their shapes."""
    with jax.set_mesh(_mesh()), _without_cache():
        placed = NamedSharding(_mesh(), PartitionSpec())
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), arguments)
        return jax.jit(function).lower(*shapes).compile(OPTIMISED)


def compiled_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], *arguments: Any
) -> list[Kernel]:
    """Compiles as `compile_for_h200` and returns the reports on its kernels, written to the empty `folder`."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
    compile_for_h200(function, *arguments)
    return [_report(path) for path in sorted(folder.glob("*.ptxas"))]


def _report(path: Path) -> Kernel:
    report, resources = path.read_text(), path.with_suffix(".resources.txt").read_text()

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        assert found, f"{path}: no {pattern!r} in {text!r}"
        return int(found[1])

    return Kernel(
        name=path.stem,
        registers=number(r"Used (\d+) registers", report),
        spilled_bytes=number(r"(\d+) bytes spill stores", report) + number(r"(\d+) bytes spill loads", report),
        shared_memory_bytes=number(r"smem_scratch_bytes=(\d+)", resources),
    )
