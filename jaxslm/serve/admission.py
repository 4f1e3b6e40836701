"""Who is let in: requests are counted while they are worked on, and too many are refused."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from jaxslm.serve.engine import Engine
from jaxslm.serve.errors import ApiError


class Tally:
    """How many there are of what is counted while it is within a `with`. Only on the event loop."""

    number = 0

    def __enter__(self) -> None:
        self.number += 1

    def __exit__(self, *_: object) -> None:
        self.number -= 1


class Admission:
    """Counts requests and refuses what would be too many. Only on the event loop.

    Attributes:
        active: requests whose body is read, or that are worked on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.settings = engine.settings
        self.active, self._reading, self._queued = Tally(), Tally(), Tally()
        text = "Requests being read, prepared, waiting or scored."
        engine.metrics.watch("num_requests_running", text, lambda: self.active.number)

    @asynccontextmanager
    async def accepted(self, read: Callable[[], Awaitable[bytes]], *, queues: bool = True) -> AsyncIterator[bytes]:
        """Reads a request's body and counts the request while it is worked on.

        A client that sends its body slowly keeps nobody else out: its request is not in the queue yet.

        Args:
            read: reads the body. queues: whether the request is one of those that must not be too many.

        Raises:
            ApiError: none are taken now; before anything is read, as far as that is known then.
        """
        status = self._engine.health.status
        if status != "ready":
            raise self.not_ready(status)
        if queues:
            self._check_queue()
        if self._reading.number >= self.settings.max_open_bodies:
            self.refuse_load("too_many_bodies", "too many bodies are being sent")
        with self.active:
            with self._reading:
                body = await read()
            if not queues:
                yield body
                return
            self._check_queue()
            with self._queued:
                yield body

    def not_ready(self, status: str) -> ApiError:
        """Returns the refusal of a request while the server is in this state, or ends in it."""
        return ApiError(503, status, f"not ready: {status}", retry_after_s=self.settings.watchdog_s)

    def _check_queue(self) -> None:
        if self._queued.number >= self.settings.max_queued_requests:
            self.refuse_load("queue_full", "the queue is full")

    def refuse_load(self, reason: str, message: str, tokens: int = 0) -> None:
        """Raises a refusal that says when so many tokens more could be scored."""
        raise ApiError(429, reason, message, retry_after_s=self._engine.model.batcher.wait_s(tokens))
