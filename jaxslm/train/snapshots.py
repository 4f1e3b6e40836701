"""The run's state on disk: the last two saves to go on from, and the best parameters. Written aside, then renamed.

OUT.training/settings.json   the run these files belong to
OUT.training/log.jsonl       one JSON object per logged update or evaluation
OUT.training/last/STEP/      trainable parameters, optimiser state, position in the data
OUT.training/best/           trainable parameters of the best evaluation
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from jaxslm.atomic import disk_reason
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from jaxslm.train.step import State, shardings_of

METRIC = "ndcg_at_10"

_FAILURES = (OSError, ValueError, RuntimeError)
"""What Orbax and TensorStore raise when a disk is full or damaged."""


class Snapshots:
    """Saves and restores one run. Use as a context manager: leaving it waits for saves in flight.

    Saves are asynchronous: a failed one is reported by the next call. A state restores onto any number of devices.
    """

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        """Opens `folder` (made if missing) and removes what a killed save has left."""
        self._folder, self._mesh = folder, mesh
        with self._disk_errors():
            self._last = _manager(folder / "last", max_to_keep=2)
            self._best = _manager(
                folder / "best", max_to_keep=1, best_fn=lambda metrics: metrics[METRIC], best_mode="max"
            )

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            for manager in (self._last, self._best):
                with suppress(*_FAILURES):  # a save that failed is told again: by now it is, or what ended the run is
                    manager.close()

    @property
    def last_step(self) -> int | None:
        """The last update that was saved, None if there is none."""
        return self._last.latest_step()

    @property
    def best_step(self) -> int | None:
        """The number of the best save, None if there is none: its update, or one above a save that it replaces."""
        return self._best.best_step()

    def save(self, step: int, state: State, position: list[Any]) -> None:
        """Saves the state after `step` updates with the data position of every host; returns before it is written.

        Raises:
            InputError: this or the previous save failed, for example on a full disk.
        """
        if step == self.last_step:
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(_copy(state)), data=ocp.args.JsonSave(position))
        with self._disk_errors():
            self._last.save(step, args=args, force=True)

    def save_best(self, step: int, params: Params, metrics: Mapping[str, float]) -> None:
        """Saves the trainable parameters if `metrics` beat the best so far. Raises as `save`."""
        known = self._best.metrics(self.best_step) if self.best_step is not None else None
        if known is not None and metrics[METRIC] <= known[METRIC]:
            return
        # After a kill an update may be evaluated again. Orbax overwrites nothing, and removes the old save last.
        number = max(step, 1 + (self._best.latest_step() or 0))
        with self._disk_errors():
            args = ocp.args.Composite(params=ocp.args.StandardSave(_copy(params)))
            self._best.save(number, args=args, metrics=dict(metrics), force=True)
            self._best.wait_until_finished()

    def restore(self, abstract: State) -> tuple[State, list[Any]]:
        """Returns the last state, sharded over this mesh, and the data positions.

        Raises:
            InputError: it is damaged, or has other shapes than `abstract`.
        """
        args = ocp.args.Composite(state=self._target(abstract), data=ocp.args.JsonRestore())
        restored = self._restore(self._last, self.last_step, args)
        return restored["state"], restored["data"]

    def restore_best(self, abstract: Params) -> tuple[Params, dict[str, float]]:
        """Returns the best trainable parameters and their metrics. Raises as `restore`."""
        restored = self._restore(self._best, self.best_step, ocp.args.Composite(params=self._target(abstract)))
        return restored["params"], dict(self._best.metrics(self.best_step))

    def wait(self) -> None:
        """Returns when everything is on disk. Raises as `save`."""
        with self._disk_errors():
            self._last.wait_until_finished()

    def _target(self, abstract: Any) -> ocp.args.StandardRestore:
        place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
        return ocp.args.StandardRestore(jax.tree.map(place, abstract, shardings_of(abstract, self._mesh)))

    def _restore(self, manager: ocp.CheckpointManager, step: int | None, args: ocp.args.Composite) -> Any:
        try:
            return manager.restore(step, args=args)
        except (ValueError, OSError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise InputError(f"{manager.directory}/{step}: damaged or of another run ({reason})") from error

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            raise InputError(f"{self._folder}: cannot save, earlier saves are intact ({disk_reason(error)})") from error


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    # What it logs, tracebacks of its threads included, is raised as well.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True, **options)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _copy(tree: Any) -> Any:
    """The next update reuses the state's memory while the save is still writing: give the save its own."""
    return jax.tree.map(jnp.copy, tree)
