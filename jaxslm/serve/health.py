"""Whether the server can score, found out by scoring."""

import asyncio
import logging
import time
from typing import Literal

import numpy as np

from jaxslm.score.forward import PackRequest
from jaxslm.score.warmup import compilations
from jaxslm.serve.batcher import Batcher, DeadlineError, DeviceError

State = Literal["warming", "ready", "draining", "failed"]
Trouble = Literal["device_stalled", "device_failed"]
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
        self._trouble: Trouble | None = None
        self._suspected = False

    def ready(self) -> None:
        """Everything is compiled and has run: requests are welcome, unless the server is about to end already."""
        self._compiled_when_ready = compilations()
        if self.state == "warming":
            self.state = "ready"

    def replace(self, batcher: Batcher) -> None:
        """Another model is in service, which has scored a full batch: what was found of the one before is forgotten."""
        self.batcher, self._trouble, self._suspected = batcher, None, False

    def suspect(self) -> None:
        """Has the device tried soon, however busy it is: a request got no numbers, which may be its own fault."""
        self._suspected = True

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
        if self.batcher.error is not None or not self.batcher.alive:
            return "device_failed"
        return self._trouble or "ready"

    async def watch(self) -> None:
        """Runs a real forward pass when the device has been idle for a while, or is in doubt; never returns."""
        while True:
            await asyncio.sleep(TICK_S)
            doubtful = self._suspected or self._trouble is not None or self.batcher.error is not None
            if self.state == "ready" and (doubtful or self.batcher.idle_s > self._watchdog_s):
                await self._probe()

    async def _probe(self) -> None:
        """Scores an item and notes what came of it.

        No numbers of a client can be at fault: the item is in a pass of its own, and the passes of clients tell
        nothing here.
        """
        batcher = self.batcher
        self._suspected = False
        job = batcher.submit(PackRequest([1], [[1, 1]]), time.monotonic() + self._stall_s, trial=True)
        trouble: Trouble | None = None
        try:
            logits = await asyncio.wait_for(asyncio.wrap_future(job.future), self._stall_s)
            if not np.isfinite(logits).all():
                trouble = "device_failed"
        except DeviceError:
            return  # the batcher has noted it, and forgets it with the next pass that is computed
        except (DeadlineError, TimeoutError):
            batcher.drop(job)
            trouble = "device_stalled"
        if batcher is self.batcher:
            self._note(trouble)

    def _note(self, trouble: Trouble | None) -> None:
        if trouble != self._trouble:
            level, found = (logging.INFO, "well again") if trouble is None else (logging.ERROR, trouble)
            logger.log(level, "watchdog", extra={"fields": {"found": found}})
        self._trouble = trouble
