"""What the command line prints: progress bars and human text on stderr, one JSON object on stdout."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def console() -> Console:
    """The console for human text: stderr, looked up at each call so that tests may redirect it."""
    return Console(stderr=True, highlight=False)


def answer(result: dict[str, Any]) -> None:
    """Prints a verb's result, the last line of its stdout."""
    print(json.dumps(result), flush=True)


@contextmanager
def progress(*, transient: bool = True) -> Iterator[Progress]:
    """Yields a rich Progress with count, elapsed and remaining time; silent when stderr is not a terminal."""
    screen = console()
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=transient, disable=not screen.is_terminal) as bar:
        yield bar
