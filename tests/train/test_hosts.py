"""Several hosts train as one: two real processes of one device each against one process of two devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxslm.checkpoint import load_checkpoint
from jaxslm.errors import InputError
from jaxslm.train import step
from jaxslm.train.hosts import join_hosts
from jaxslm.train.loop import training_folder
from jaxslm.train.ranker import train_ranker
from tests.train.toy import toy_folder, toy_ranker

ROOT = Path(__file__).parents[2]
# One list per batch, so that host 0 of 2 gets the lists that device 0 of 2 gets.
SETTINGS: tuple[str, ...] = (
    "steps=6",
    "save_every=6",
    "evaluation.every=6",
    "layers=1",
    "remat=false",
    "tensorboard=false",
)
SETTINGS += ("data.lists_per_batch=1", "optimiser.accumulate=1")

TRAIN = """
import sys
sys.path.insert(0, {root!r})
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
from pathlib import Path
from jaxslm.train.hosts import from_all_hosts
from jaxslm.train.ranker import train_ranker
from tests.train.toy import toy_ranker
result = train_ranker(toy_ranker(Path({folder!r}), *{overrides!r}), Path({out!r}))
assert (jax.process_count(), jax.device_count(), result.finished) == (2, 2, True), (jax.devices(), result)
own = list(range(jax.process_index() * 20_000))  # as long as the data position of large batches
assert from_all_hosts(own) == [[], list(range(20_000))]
"""


def losses_of(out: Path) -> list[float]:
    lines = (training_folder(out) / "log.jsonl").read_text().splitlines()
    return [number["loss"] for number in map(json.loads, lines) if "loss" in number]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_two_processes_train_as_two_devices_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = toy_folder(tmp_path / "toy")
    code = TRAIN.format(root=str(ROOT), folder=str(folder), overrides=SETTINGS, out=str(tmp_path / "two"))
    hosts = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | hosts | {"JAX_PROCESS_ID": str(number)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    monkeypatch.setattr("jaxslm.train.ranker.make_mesh", lambda: step.make_mesh(jax.devices()[:2]))
    train_ranker(toy_ranker(folder, *SETTINGS), tmp_path / "one")
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=1e-5)
    two, one = (load_checkpoint(tmp_path / name).params for name in ("two", "one"))
    jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, rtol=0, atol=1e-5), two, one)


def test_which_process_this_is_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES 'two': must be a number"):
        join_hosts()
