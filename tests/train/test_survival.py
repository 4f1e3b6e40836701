"""A run that the machine ends, by a full disk or a kill at any moment, keeps its last save and goes on."""

import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxslm.errors import InputError
from jaxslm.train import step
from jaxslm.train.loop import training_folder
from jaxslm.train.partition import split_params
from jaxslm.train.ranker import train_ranker
from jaxslm.train.settings import RankerTraining
from jaxslm.train.snapshots import Snapshots
from jaxslm.train.start import load_start
from tests.train.toy import SHORT, one_device, toy_folder, toy_ranker

TRAIN = """
import sys
sys.path.insert(0, {root!r})
import jax
jax.config.update("jax_platforms", "cpu")
from pathlib import Path
from jaxslm.train.ranker import train_ranker
from tests.train.toy import toy_ranker
print("begun", flush=True)
print(train_ranker(toy_ranker(Path({folder!r}), *{overrides!r}), Path({out!r})).to_json())
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data and model of all tests here."""
    return toy_folder(tmp_path_factory.mktemp("toy"))


# TensorStore's other writes, on their way when the first one fails, find their event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("when", ["at once", "while it writes in the background"])
def test_a_full_disk_is_told_and_the_last_save_stays(toy: Path, tmp_path: Path, monkeypatch: Any, when: str) -> None:
    """The background's disk is full by a limit to the size of files, which arrays are above and the log is not."""
    one_device(monkeypatch)
    out = tmp_path / "out"
    save, (soft, hard) = ocp.CheckpointManager.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def failing(self: Any, number: int, *args: Any, **more: Any) -> Any:
        if number == 4:
            if when == "at once":
                raise OSError(28, "No space left on device")
            self.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        return save(self, number, *args, **more)

    said = r"cannot save, earlier saves are intact \((No space left on device|File too large)\)"
    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "save", failing)
        try:
            with pytest.raises(InputError, match=said):
                train_ranker(toy_ranker(toy, *SHORT), out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Snapshots(training_folder(out), step.make_mesh(jax.devices()[:1])) as snapshots:
        assert snapshots.last_step == 3
    assert train_ranker(toy_ranker(toy, *SHORT), out).finished


def test_an_update_that_is_evaluated_again_may_come_out_better(tmp_path: Path) -> None:
    """As after a kill between the save of the best and that of the state, where sums are not the same every time."""
    mesh = step.make_mesh(jax.devices()[:1])
    best = {"w": np.ones(3, np.float32)}
    for metric in (0.5, 0.5, 0.6, 0.4, 0.7):
        with Snapshots(tmp_path / "out.training", mesh) as snapshots:
            snapshots.save_best(20, {"w": jax.device_put(metric * best["w"])}, {"ndcg_at_10": metric, "step": 20.0})
    with Snapshots(tmp_path / "out.training", mesh) as snapshots:
        params, metrics = snapshots.restore_best(best)
    assert metrics == {"ndcg_at_10": 0.7, "step": 20.0}
    np.testing.assert_array_equal(params["w"], np.float32(0.7) * best["w"])
    assert len(list((tmp_path / "out.training" / "best").iterdir())) == 1


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_run_that_goes_on(toy: Path, tmp_path: Path) -> None:
    """Ten kills of a run that saves after every update, every other one within a save; the last save must load."""
    overrides = ("steps=400", "save_every=1", "evaluation.every=400", "layers=1", "remat=false", "tensorboard=false")
    out = tmp_path / "out"
    root = str(Path(__file__).parents[2])
    code = TRAIN.format(root=root, folder=str(toy), overrides=overrides, out=str(out))
    generator = np.random.default_rng(0)
    settings: RankerTraining = toy_ranker(toy, *overrides)
    steps: list[int] = []
    within = 0
    for number in range(10):
        with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.DEVNULL) as process:
            log, known = training_folder(out) / "log.jsonl", steps[-1] if steps else 0
            deadline = time.monotonic() + 120
            while not (log.exists() and log.read_text().count("\n") > known + 1) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(generator.uniform(0, 0.7))
            while number % 2 and not unfinished_saves(out) and time.monotonic() < deadline:
                time.sleep(0.001)
            process.kill()
        within += bool(unfinished_saves(out))
        steps.append(saved_step(settings, out))
        assert log.read_text().count("\n") <= steps[-1] + 3  # no more than what was not yet saved is lost
    assert steps == sorted(steps)
    assert steps[0] > 0
    assert within >= 5


def unfinished_saves(out: Path) -> list[Path]:
    """Returns the folders that Orbax renames when a save is complete."""
    return list(training_folder(out).glob("*/*.orbax-checkpoint-tmp*"))


def saved_step(settings: RankerTraining, out: Path) -> int:
    """Restores the last save as a resumed run would; returns its update."""
    mesh = step.make_mesh(jax.devices()[:1])
    start = load_start(settings, mesh)
    trainable, _ = split_params(start.params, start.config, freeze_embeddings=settings.freeze_embeddings)
    rates = step.learning_rates(settings.optimiser, settings.steps)
    abstract = step.abstract_state(trainable, step.make_optimiser(settings.optimiser, rates))
    with Snapshots(training_folder(out), mesh) as snapshots:
        state, positions = snapshots.restore(abstract)
        assert len(positions) == 1
        assert int(state["step"]) == snapshots.last_step
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"]))
        return int(state["step"])
