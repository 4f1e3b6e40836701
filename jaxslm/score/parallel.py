"""Data parallelism with pmap semantics: one replica of the weights per device, a leading device axis on the batch.

`jax.pmap` itself is `jit` of `shard_map` today and copies the weights to every device at each call; here they are put
there once. With one device everything is plain `jit`, without the leading axis.
"""

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxslm.errors import InputError

REPLICAS = "replicas"


def scoring_devices(devices: Sequence[jax.Device] | None = None) -> list[jax.Device]:
    """Returns the devices to score on: those given, else all local accelerators, or the one CPU device of all cores.

    Raises:
        InputError: an empty sequence.
    """
    if devices is None:
        local = jax.local_devices()
        return local[:1] if local[0].platform == "cpu" else local
    if len(devices) == 0:
        raise InputError("devices: at least one is needed; None takes all local accelerators")
    return list(devices)


def device_name() -> str:
    """Returns the name of the accelerator, or the processor's with its number of cores."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{_of_processor('model name') or platform.machine()}, {os.cpu_count()} cores"


def processor_features() -> frozenset[str]:
    """Returns what the host's processor can do, in Linux's words ("avx2", "avx512f"); empty where that is unknown."""
    return frozenset(_of_processor("flags").split())


def _of_processor(name: str) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.array(devices), (REPLICAS,), axis_types=(AxisType.Auto,))


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Returns the tree with a copy of every array on each device; do it once, not per call."""
    if len(devices) == 1:
        return jax.device_put(tree, devices[0])
    return jax.device_put(tree, NamedSharding(_mesh(devices), PartitionSpec()))


def parallelise(score: Callable[..., Any], devices: Sequence[jax.Device]) -> jax.stages.Wrapped:
    """Returns jitted `score(params, *data)`; for n > 1 devices all arrays of data and result have a leading [n]."""
    if len(devices) == 1:
        return jax.jit(score)

    def replica(params: Any, data: tuple[Any, ...]) -> Any:
        result = score(params, *jax.tree.map(lambda array: array[0], data))
        return jax.tree.map(lambda array: array[None], result)

    per_device = PartitionSpec(REPLICAS)
    sharded = jax.shard_map(replica, mesh=_mesh(devices), in_specs=(PartitionSpec(), per_device), out_specs=per_device)
    return jax.jit(lambda params, *data: sharded(params, data))
