"""The loop that all kinds of training share: update, log, evaluate, save, stop cleanly, go on where a run stopped.

A run that writes to OUT keeps its state in `OUT.training/` beside it (`jaxslm.train.snapshots`). The same command goes
on from the last save, with the batches that an uninterrupted run would have seen. When the last update is done OUT
appears, made from the best evaluation (from the last update without `evaluation`), and only the log stays behind.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxslm.atomic import cannot_write, new_file, refuse_existing
from jaxslm.checkpoint import Checkpoint, load_manifest, save_checkpoint
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from jaxslm.score.ceiling import matmul_ceiling
from jaxslm.score.scorer import compute_dtype
from jaxslm.train.data_settings import MAY_CHANGE
from jaxslm.train.hosts import from_all_hosts
from jaxslm.train.interrupt import StopWish, stop_signals
from jaxslm.train.log import RunBar, RunLog, run_bar
from jaxslm.train.partition import Frozen, Partition
from jaxslm.train.settings import TrainingSettings
from jaxslm.train.snapshots import METRIC, Snapshots
from jaxslm.train.speed import Work, total
from jaxslm.train.step import (
    LossFn,
    State,
    StepFn,
    abstract_state,
    init_state,
    make_step,
    put_batch,
)

Evaluate = Callable[[Params], dict[str, float]]
Save = Callable[[Path, Params, dict[str, float]], None]


@runtime_checkable
class Batches(Protocol):
    """Batches without end or with one; `jaxslm.train.data.BatchIterator` says what each method does."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...

    def query_id(self, list_id: int) -> str: ...


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        kind: "ranker", "encoder" or "compressor". start: the model before the first update.
        params: all parameters before the first update, `start.params` if None. partition: which of them train.
        optimiser: what updates those. rates: its learning rate by update, as the log tells it.
        work: of one of this host's batches.
        evaluate: whole parameters on one device -> numbers by name, "ndcg_at_10" among them; called when the settings
            have an `evaluation`. evaluation_sha256: of the data that it reads.
        save: (path, whole parameters, metrics): writes the checkpoint.
        teacher: parameters of a teacher, or empty.
    """

    kind: str
    start: Checkpoint
    loss_fn: LossFn
    batches: Batches
    work: Callable[[Mapping[str, np.ndarray]], Work]
    evaluate: Evaluate
    evaluation_sha256: str
    partition: Partition
    optimiser: optax.GradientTransformation
    rates: optax.Schedule
    save: Save
    dtype: jnp.dtype
    mesh: Mesh
    params: Params | None = None
    teacher: Params = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: `finished` is False after Ctrl-C or SIGTERM, and the same command goes on from `step`.

    `interrupted`: the signal came, perhaps too late to keep the run from finishing; what follows it must not begin.
    """

    finished: bool
    step: int
    steps: int
    out: Path
    metrics: dict[str, float]
    interrupted: bool

    def to_json(self) -> dict[str, Any]:
        """Returns the result as the command line prints it."""
        return {
            "finished": self.finished,
            "step": self.step,
            "steps": self.steps,
            "out": str(self.out),
            "metrics": self.metrics,
        }


def dtype_of(settings: TrainingSettings) -> jnp.dtype:
    """Returns the compute dtype of a run on this machine."""
    return compute_dtype() if settings.dtype == "auto" else jnp.dtype(settings.dtype)


def training_folder(out: Path) -> Path:
    """Returns the folder beside `out` that holds the run's state and log."""
    return out.with_name(out.name + ".training")


def run(task: Task, settings: TrainingSettings, out: Path) -> TrainResult:
    """Trains, or goes on, until the last update or a signal; writes the checkpoint `out` in the former case.

    Raises:
        InputError: `out` exists, its training folder belongs to another run or is damaged, the data ended, a loss is
            not finite, or a disk is full. Earlier saves are intact.
    """
    refuse_existing(out)
    folder = training_folder(out)
    _claim(folder, task, settings)
    with Snapshots(folder, task.mesh) as snapshots, stop_signals() as wish:
        loop = _Loop(task, settings, folder, snapshots)
        with run_bar(settings.steps, loop.step) as bar:
            loop.train(bar, wish)
        if loop.step < settings.steps:
            return TrainResult(False, loop.step, settings.steps, out, {}, interrupted=True)
        params, metrics = loop.result()
    if jax.process_index() == 0:
        task.save(out, params, metrics)
        for name in ("last", "best"):
            shutil.rmtree(folder / name)
    return TrainResult(True, loop.step, settings.steps, out, metrics, wish.wished)


@cache
def _ceiling_of(dtype: jnp.dtype) -> float:
    """`matmul_ceiling`, measured once in a process: it takes seconds where other work runs beside."""
    return matmul_ceiling(dtype)


class _Loop:
    """The moving parts of a run: state, data position, log."""

    def __init__(self, task: Task, settings: TrainingSettings, folder: Path, snapshots: Snapshots) -> None:
        self._task, self._settings, self._folder, self._snapshots = task, settings, folder, snapshots
        mesh, optimiser = task.mesh, task.optimiser
        trainable, tables = task.partition.split(task.start.params if task.params is None else task.params)
        self._abstract = abstract_state(trainable, optimiser)
        self._state = self._restore() or init_state(trainable, optimiser, mesh)
        self._frozen: Frozen = {"tables": jax.device_put(tables, NamedSharding(mesh, P())), "teacher": task.teacher}
        self._step_fn: StepFn = make_step(task.loss_fn, optimiser, mesh)
        self.step = int(self._state["step"])
        self._log = RunLog(folder, self.step, tensorboard=settings.tensorboard)
        self._ceiling = _ceiling_of(task.dtype) * mesh.size
        self._clock = time.perf_counter()

    def _restore(self) -> State | None:
        if self._snapshots.last_step is None:
            return None
        state, positions = self._snapshots.restore(self._abstract)
        if len(positions) != jax.process_count():
            raise InputError(f"{self._folder}: saved by {len(positions)} hosts, there are {jax.process_count()}")
        self._task.batches.set_state(positions[jax.process_index()])
        return state

    def train(self, bar: RunBar, wish: StopWish) -> None:
        """Runs updates until the last one or until a signal was caught on any host; saves in both cases."""
        settings = self._settings
        pending: _Update | None = None
        self._evaluate_what_a_stop_left_out(bar)
        while self.step < settings.steps:
            position = self._task.batches.get_state()
            parts = self._next_parts()
            if parts is None:
                self._account(pending, bar)
                self._save(position)  # with more epochs the update begins anew, and none of its parts is lost
                raise InputError(f"data: ended after {self.step} of {settings.steps} updates: raise data.epochs")
            update = self._update(parts)
            # The previous update's numbers are read only now, so that the device never waits for the host.
            self._account(pending, bar)
            pending = update
            stop = any(from_all_hosts(wish.wished))
            evaluate = self._evaluation_is_due()
            if stop or evaluate or self._is_due(settings.save_every):
                self._account(pending, bar)
                pending = None
                self._save(self._task.batches.get_state())  # first: an evaluation that fails loses no update
                # A stopped run evaluates when it goes on, a finished one never does.
                if evaluate and (not stop or self.step == settings.steps):
                    self._evaluate(bar)
                self._clock = time.perf_counter()
            if stop:
                return

    def _evaluate_what_a_stop_left_out(self, bar: RunBar) -> None:
        """The run began at an update whose evaluation is not in the log."""
        if self.step > 0 and self._evaluation_is_due() and not from_all_hosts(self._log.holds(METRIC))[0]:
            self._evaluate(bar)

    def _evaluation_is_due(self) -> bool:
        evaluation = self._settings.evaluation
        return evaluation is not None and self._is_due(evaluation.every)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self._settings.steps

    def _next_parts(self) -> list[dict[str, np.ndarray]] | None:
        """This host's batches of one update; None when the data has ended."""
        count = self._settings.optimiser.accumulate * len(self._task.mesh.local_devices)
        try:
            return [dict(next(self._task.batches)) for _ in range(count)]
        except StopIteration:
            return None

    def _update(self, parts: list[dict[str, np.ndarray]]) -> "_Update":
        list_ids = np.concatenate([part.pop("list_ids").reshape(-1) for part in parts])
        work, rate = total(map(self._task.work, parts)), float(self._task.rates(self.step))
        batch = put_batch(parts, self._settings.optimiser.accumulate, self._task.mesh)
        self._state, metrics = self._step_fn(self._state, self._frozen, batch)
        self.step += 1
        return _Update(self.step, metrics, list_ids, work, rate)

    def _account(self, update: "_Update | None", bar: RunBar) -> None:
        """Waits for an update, stops at a loss that is not finite, logs and shows the rest."""
        if update is None:
            return
        numbers = {name: float(value) for name, value in update.metrics.items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if not all(math.isfinite(numbers[name]) for name in ("loss", "gradient_norm")):
            self._stop_at(update, numbers)
        numbers["learning_rate"] = update.rate
        work, hosts = update.work, jax.process_count()
        numbers["tokens_per_s"] = hosts * work.tokens / seconds
        numbers["padding_fraction"] = 1 - work.tokens / work.places
        numbers["mfu"] = hosts * work.flops / seconds / self._ceiling
        numbers["seconds"] = seconds
        self._log.write(update.step, numbers)
        bar.update(update.step, numbers)

    def _stop_at(self, update: "_Update", numbers: dict[str, float]) -> None:
        ids = [self._task.batches.query_id(int(number)) for number in update.list_ids if number >= 0]
        path = self._folder / "not-finite.json"
        told = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}  # JSON has none
        where = f"the queries of the batch are in {path}"
        try:
            path.write_text(json.dumps({"step": update.step, **told, "query_ids": ids}) + "\n", encoding="utf-8")
        except OSError as error:
            where = str(cannot_write(path, error))
        raise InputError(
            f"update {update.step}: loss {numbers['loss']}, gradient norm {numbers['gradient_norm']}: training stopped,"
            f" {where}, the last save is intact"
        )

    def _evaluate(self, bar: RunBar) -> None:
        with bar.evaluating():
            numbers = self._task.evaluate(self._whole(self._state["params"]))
        self._snapshots.save_best(self.step, self._state["params"], numbers | {"step": float(self.step)})
        self._log.write(self.step, numbers)  # after the save: what the log holds is not evaluated again
        bar.evaluated(numbers[METRIC])

    def _save(self, position: dict[str, Any]) -> None:
        self._snapshots.save(self.step, self._state, from_all_hosts(position))

    def _whole(self, trainable: Params) -> Params:
        """Joined parameters on one local device."""
        mesh = self._task.mesh
        whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(trainable)
        local, tables = jax.tree.map(lambda leaf: leaf.addressable_data(0), (whole, self._frozen["tables"]))
        return self._task.partition.join(local, tables)

    def result(self) -> tuple[Params, dict[str, float]]:
        """Returns the parameters that the run is for, and their numbers."""
        if self._settings.evaluation is None:
            return self._whole(self._state["params"]), {"step": float(self.step)}
        trainable, metrics = self._snapshots.restore_best(self._abstract["params"])
        return self._whole(trainable), metrics


@dataclass(frozen=True)
class _Update:
    """An update on its way: its numbers are still being computed. `work` is this host's."""

    step: int
    metrics: dict[str, Array]
    list_ids: np.ndarray
    work: Work
    rate: float


CHECKPOINTS = ("teacher.checkpoint", "compressor.encoder", "compressor.start")
"""Settings that name what a run reads beside its start; a resumed run must find the same there."""


def _claim(folder: Path, task: Task, settings: TrainingSettings) -> None:
    """Makes the training folder, or checks that it belongs to this run. The first host does it for all."""
    if jax.process_index() > 0:
        return
    named = _flat(settings.model_dump(mode="json"))
    hashes = {f"{name}_sha256": _sha256(Path(named[name])) for name in CHECKPOINTS if named.get(name) is not None}
    hashes["evaluation_sha256"] = task.evaluation_sha256  # the best so far is compared with numbers on the same data
    model = task.start.manifest.params_sha256
    ours = {"kind": task.kind, "model_sha256": model, **hashes, **settings.model_dump(mode="json")}
    path = folder / "settings.json"
    if not path.exists():
        with new_file(path) as staging:
            staging.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")
        return
    former, now = (_flat(tree) for tree in (json.loads(path.read_text(encoding="utf-8")), ours))
    may_change = {"save_every", "tensorboard", *(f"data.{name}" for name in MAY_CHANGE)}
    may_change |= hashes.keys() - former.keys()  # begun by a release that did not write them
    for name in sorted((former.keys() | now.keys()) - may_change):
        if former.get(name) != now.get(name):
            raise InputError(
                f"{folder}: was begun with another {name} ({former.get(name)!r}, now {now.get(name)!r}):"
                " go on with the former settings, name another output, or remove the folder"
            )


def _sha256(checkpoint: Path) -> str:
    """Hash of all that decides what a checkpoint computes; not of where it came from or its metrics."""
    names = ("params_sha256", "tokenizer_sha256", "template_sha256", "ranker", "compressor")
    wanted: dict[str, Any] = {**dict.fromkeys(names, True), "extra": {"__all__": {"sha256"}}}
    # Without defaults: a field that a later release adds leaves the hash as it is.
    what = load_manifest(checkpoint).model_dump_json(include=wanted, exclude_defaults=True)
    return hashlib.sha256(what.encode()).hexdigest()


def _flat(tree: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Settings by dotted name, as `--set` spells them."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{within}{name}.") if isinstance(value, dict) else {within + name: value}
    return flat


def saver(start: Checkpoint, kind: str) -> Save:
    """Returns what writes a trained decoder as a checkpoint whose parent is the model that it started from."""

    def save(out: Path, params: Params, metrics: dict[str, float]) -> None:
        parent = start.manifest
        save_checkpoint(
            out,
            start.config,
            params,
            start.tokenizer_files,
            source=f"jaxslm train {kind} from {parent.source}",
            parent=parent.params_sha256,
            metrics=metrics,
        )

    return save
