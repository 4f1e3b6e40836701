"""What a run tells: a JSON Lines log, TensorBoard events on request, and a progress bar."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import jax
from rich.progress import Progress, TaskID

from jaxslm.errors import InputError
from jaxslm.progress import progress
from jaxslm.train.event_file import EventFile


class RunLog:
    """Appends to `folder/log.jsonl`; each line holds "step" and numbers by name."""

    def __init__(self, folder: Path, first_step: int, *, tensorboard: bool) -> None:
        """Drops the lines after update `first_step`, from which the run goes on, so that the log is one curve.

        Of several hosts only the first writes. Raises InputError as `write`.
        """
        self._writes = jax.process_index() == 0
        self._held = set[str]()
        if not self._writes:
            return
        self._path = folder / "log.jsonl"
        with self._disk_errors():
            self._path.touch()
            lines = self._path.read_bytes().splitlines(keepends=True)
            kept = list(takewhile(lambda line: _step_of(line) <= first_step, lines))
            # Steps ascend, so the end is cut off: that takes no room on the disk, and no kill can empty the log.
            os.truncate(self._path, sum(map(len, kept)))
            self._events = EventFile(folder / "tensorboard") if tensorboard else None
        self._held.update(*(json.loads(line) for line in kept if _step_of(line) == first_step))

    def holds(self, name: str) -> bool:
        """Whether the log had this number of update `first_step` when it was opened; False on hosts without it."""
        return name in self._held

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds one line. Raises InputError when the disk takes no more."""
        if not self._writes:
            return
        with self._disk_errors():
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
            if self._events is not None:
                self._events.write(step, numbers)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self._path}: cannot write, earlier saves are intact ({error.strerror})") from error


class RunBar:
    """The progress bar of a run: loss, nDCG, tokens per second, MFU beside count and remaining time."""

    def __init__(self, bar: Progress, total: int, step: int) -> None:
        self._bar = bar
        self._task: TaskID = bar.add_task("training", total=total, completed=step)
        self._ndcg = ""

    def update(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows an update's numbers: "loss", "tokens_per_s", "mfu"."""
        speed = f"{numbers['tokens_per_s']:,.0f} tokens/s, MFU {numbers['mfu']:.0%}"
        words = f"loss {numbers['loss']:.4f}{self._ndcg}, {speed}"
        self._bar.update(self._task, completed=step, description=words)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Hides the bar while an evaluation shows its own."""
        self._bar.stop()
        yield
        self._bar.start()

    def evaluated(self, ndcg: float) -> None:
        """Shows the latest nDCG@10 from now on."""
        self._ndcg = f", nDCG@10 {ndcg:.4f}"


@contextmanager
def run_bar(total: int, step: int) -> Iterator[RunBar]:
    """Yields the bar of a run that goes on from `step`; silent when stderr is not a terminal."""
    with progress(transient=False) as bar:
        yield RunBar(bar, total, step)


def _step_of(line: bytes) -> float:
    """The line's step; infinity for a line that a kill or a full disk cut short."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
