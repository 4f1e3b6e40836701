"""Stages: each says what it does, is skipped if its result is there, and leaves a line in the log of the folder."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from jaxslm.checkpoint import load_manifest
from jaxslm.config import Settings
from jaxslm.data_files import file_sha256
from jaxslm.errors import InputError
from jaxslm.progress import console

LOG = "stages.jsonl"


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        title, words: what it is and what it does, for someone who does not know yet.
        expected_s: on two idle cores with AVX-512, and without; None if nobody measured it.
        run: makes the result; raises KeyboardInterrupt if it was stopped and can go on.
        result: appears when all is done; None if the stage looks for itself what there is to do.
        parent: the checkpoint that `result`, a checkpoint too, is made from.
        measured: the checkpoints that `result`, no checkpoint, tells about.
        made_of: tells what else `result` is made of, such as settings and files, from others; where it is another than
            the log has, the result is removed and made anew.
    """

    title: str
    words: str
    expected_s: tuple[int, int] | None
    run: Callable[[], object]
    result: Path | None = None
    parent: Path | None = None
    measured: Sequence[Path] = ()
    made_of: Callable[[], str] = str


class _Entry(Settings):
    """A line of the log: a stage, how long it took, and `identity` of what it measured, by name of the folder.

    `made_of` is the stage's, if it ended well.
    """

    stage: str
    seconds: float
    measured: dict[str, str] = {}
    made_of: str = ""


def run_stages(stages: Sequence[Stage], out: Path) -> None:
    """Runs what is not done yet, or is made of something else than what is there, in order.

    Raises:
        InputError: what is there was made from another checkpoint than the one that is there.
    """
    for number, stage in enumerate(stages, start=1):
        head = f"[bold]{number}/{len(stages)} {stage.title}.[/bold] "
        made_of = stage.made_of()
        if stage.result is not None and stage.result.exists():
            logged = _logged(out, stage.title)
            _check_parent(stage.result, stage.parent)
            _check_measured(stage.result, stage.measured, logged.measured)
            if logged.made_of == made_of:
                console().print(head + f"Done already: {stage.result}")
                continue
            _remove(stage.result)
        console().print(head + stage.words + _expected(stage.expected_s))
        start, ended_well = time.perf_counter(), False
        try:
            stage.run()
            ended_well = True
        finally:
            seconds = time.perf_counter() - start
            _write_log(out, stage, seconds, made_of if ended_well else "")
        if seconds >= 1:
            console().print(f"    {_duration(seconds)}", style="dim")


def seconds_by_stage(out: Path) -> dict[str, float]:
    """Returns the seconds that each stage took in all, also over runs that were interrupted."""
    seconds: dict[str, float] = {}
    for entry in _read_log(out):
        seconds[entry.stage] = round(seconds.get(entry.stage, 0.0) + entry.seconds, 1)
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


def _check_measured(result: Path, measured: Sequence[Path], known: Mapping[str, str]) -> None:
    for checkpoint in measured:
        if not checkpoint.exists():  # as above
            continue
        now, name = identity(checkpoint), checkpoint.name
        if known.get(name, now) != now:
            raise InputError(f"{result}: of another {name} than the one beside it; remove it to make it anew")


def identity(checkpoint: Path) -> str:
    """Returns what tells a checkpoint from others: the hash of its parameters, and those of its further items."""
    manifest = load_manifest(checkpoint)
    return " ".join([manifest.params_sha256, *(manifest.extra[name].sha256 for name in sorted(manifest.extra))])


def files_sha256(paths: Iterable[Path]) -> str:
    """Returns one hash of files, and of those in folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _remove(result: Path) -> None:
    if result.is_dir():
        shutil.rmtree(result)
    else:
        result.unlink()


def _logged(out: Path, title: str) -> _Entry:
    """Returns the last line about a stage; logs that older versions wrote may lack it, or say less."""
    entries = _read_log(out) if (out / LOG).exists() else []
    nothing = _Entry(stage=title, seconds=0)
    return next((entry for entry in reversed(entries) if entry.stage == title), nothing)


def _read_log(out: Path) -> list[_Entry]:
    try:
        return [_Entry.model_validate_json(line) for line in (out / LOG).read_bytes().splitlines()]
    except ValueError:
        raise InputError(f"{out / LOG}: damaged; remove it") from None


def _write_log(out: Path, stage: Stage, seconds: float, made_of: str) -> None:
    measured = {checkpoint.name: identity(checkpoint) for checkpoint in stage.measured if checkpoint.exists()}
    entry = _Entry(stage=stage.title, seconds=round(seconds, 2), measured=measured, made_of=made_of)
    with (out / LOG).open("a", encoding="utf-8") as log:
        log.write(entry.model_dump_json(exclude_defaults=True) + "\n")


def _expected(seconds: tuple[int, int] | None) -> str:
    if seconds is None or seconds[1] < 10:
        return ""
    low, high = seconds
    if high < 90:
        return f" {low} to {high} seconds on two cores."
    return f" {low / 60:.0f} to {high / 60:.0f} minutes on two cores."


def _duration(seconds: float | int) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes"
