"""Whether the server can score, found out by scoring."""

import asyncio
import logging
import time
from typing import Literal

from jaxslm.score.packing import PackRequest
from jaxslm.score.warmup import compilations
from jaxslm.serve.batcher import Batcher, DeadlineError, DeviceError

State = Literal["warming", "ready", "draining", "failed"]
TICK_S = 0.25

logger = logging.getLogger(__name__)


class Health:
    """State of the server. Readiness goes when the device fails or stalls, and comes back when it scores again.

    Attributes:
        batcher: of the model in service.
    """

    def __init__(self, batcher: Batcher, watchdog_s: float, stall_s: float) -> None:
        self.state: State = "warming"
        self.batcher, self._watchdog_s, self._stall_s = batcher, watchdog_s, stall_s
        self._compiled_when_ready: int | None = None

    def ready(self) -> None:
        """Everything is compiled and has run: requests are welcome, unless the server is about to end already."""
        self._compiled_when_ready = compilations()
        if self.state == "warming":
            self.state = "ready"

    @property
    def compilations(self) -> int:
        """Programs compiled since the server was ready: a bug if it is not 0."""
        return 0 if self._compiled_when_ready is None else compilations() - self._compiled_when_ready

    @property
    def status(self) -> str:
        """ "ready", or why not: "warming", "draining", "device_failed", "device_stalled"."""
        if self.state != "ready":
            return self.state
        if self.batcher.stalled_s > self._stall_s:
            return "device_stalled"
        return "device_failed" if self.batcher.error is not None else "ready"

    async def watch(self) -> None:
        """Runs a real forward pass when the device has been idle for a while, or after it failed; never returns."""
        while True:
            await asyncio.sleep(TICK_S)
            failed = self.batcher.error is not None
            if self.state == "ready" and (failed or self.batcher.idle_s > self._watchdog_s):
                await self._probe()

    async def _probe(self) -> None:
        batcher = self.batcher
        job = batcher.submit(PackRequest([1], [[1, 1]]), time.monotonic() + self._stall_s)
        try:
            await asyncio.wait_for(asyncio.wrap_future(job.future), self._stall_s)
        except (DeviceError, DeadlineError, TimeoutError) as error:
            batcher.drop(job)
            logger.warning("watchdog: no forward pass", extra={"fields": {"reason": type(error).__name__}})
