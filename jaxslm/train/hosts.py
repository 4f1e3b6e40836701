"""Several hosts: joining them, and what they tell one another. On one host everything here is trivial."""

import json
import os
from typing import Any

import jax
import numpy as np

from jaxslm.errors import InputError


def join_hosts() -> None:
    """Joins the hosts of a run when JAX_COORDINATOR_ADDRESS (host:port) is set, before anything touches a device.

    JAX_NUM_PROCESSES and JAX_PROCESS_ID say how many there are and which this is; without them JAX asks the cluster
    (Slurm, Kubernetes, TPU pods). Raises InputError if they are no numbers.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not jax.distributed.is_initialized():
        jax.distributed.initialize(
            num_processes=_number_from("JAX_NUM_PROCESSES"), process_id=_number_from("JAX_PROCESS_ID")
        )


def _number_from(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdecimal():
        raise InputError(f"{variable} {text!r}: must be a number")
    return None if text is None else int(text)


def from_all_hosts(value: Any) -> list[Any]:
    """Returns the JSON-able value of every host, in host order."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    size = 1 << (longest - 1).bit_length()  # every size is a program of its own: powers of two are few
    padded = np.frombuffer(text.ljust(size), np.uint8)
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]
