"""Ctrl-C and SIGTERM as a wish that the loop reads between two updates."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopWish:
    """`wished` becomes True with the first signal; the second one acts as it would without us."""

    def __init__(self) -> None:
        self.wished = False


@contextmanager
def stop_signals() -> Iterator[StopWish]:
    """Yields the wish; restores the former handlers at the end. Outside the main thread no signal is caught."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        wish.wished = True
        signal.signal(number, former[signal.Signals(number)])

    for number in former:
        signal.signal(number, ask)
    try:
        yield wish
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
