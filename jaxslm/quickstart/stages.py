"""Stages: each says what it does, is skipped if its result is there, and leaves a line in the log of the folder."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from jaxslm.checkpoint import load_manifest
from jaxslm.errors import InputError
from jaxslm.progress import console

LOG = "stages.jsonl"


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        title, words: what it is and what it does, for someone who does not know yet. expected_s: on two idle cores.
        run: makes the result; raises KeyboardInterrupt if it was stopped and can go on.
        result: appears when all is done; None if the stage looks for itself what there is to do.
        parent: the checkpoint that `result`, a checkpoint too, is made from.
    """

    title: str
    words: str
    expected_s: int
    run: Callable[[], object]
    result: Path | None = None
    parent: Path | None = None


def run_stages(stages: Sequence[Stage], out: Path) -> None:
    """Runs what is not done yet, in order.

    Raises:
        InputError: a checkpoint that is there was made from another one than the stage before it made.
    """
    for number, stage in enumerate(stages, start=1):
        head = f"[bold]{number}/{len(stages)} {stage.title}.[/bold] "
        if stage.result is not None and stage.result.exists():
            _check_parent(stage.result, stage.parent)
            console().print(head + f"Done already: {stage.result}")
            continue
        about = f" About {_duration(stage.expected_s)} on two cores." if stage.expected_s >= 10 else ""
        console().print(head + stage.words + about)
        start = time.perf_counter()
        try:
            stage.run()
        finally:
            seconds = time.perf_counter() - start
            _write_log(out, stage.title, seconds)
        if seconds >= 1:
            console().print(f"    {_duration(seconds)}", style="dim")


def seconds_by_stage(out: Path) -> dict[str, float]:
    """Returns the seconds that each stage took in all, also over runs that were interrupted."""
    seconds: dict[str, float] = {}
    for line in (out / LOG).read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            seconds[entry["stage"]] = round(seconds.get(entry["stage"], 0.0) + entry["seconds"], 1)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{out / LOG}: damaged ({error!r}); remove it") from None
    return seconds


def waiting(words: str) -> AbstractContextManager[object]:
    """Shows that something goes on, on a terminal."""
    screen = console()
    return screen.status(words) if screen.is_terminal else nullcontext()


def _check_parent(result: Path, parent: Path | None) -> None:
    if parent is None or not parent.exists():  # what is not needed any more may be removed
        return
    if load_manifest(result).parent != load_manifest(parent).params_sha256:
        raise InputError(f"{result}: made from another {parent.name} than the one beside it; remove it to make it anew")


def _write_log(out: Path, title: str, seconds: float) -> None:
    with (out / LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps({"stage": title, "seconds": round(seconds, 2)}) + "\n")


def _duration(seconds: float | int) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes"
