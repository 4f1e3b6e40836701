"""From waiting requests (`jobs`) to forward passes: one thread packs and dispatches, one waits for results.

Requests wait whole, ordered by deadline. A pass takes as many of the first one's items as fit and goes on with the
next request, so that neither a large request blocks small ones nor a small one wastes a pass. A fixed number of batches
is queued ahead, so that the device never waits for the host.
"""

import heapq
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from jaxslm.errors import InputError
from jaxslm.score.forward import Forward, PackRequest, values_per_item
from jaxslm.score.packing import Packer
from jaxslm.serve.jobs import Job, Slice
from jaxslm.serve.metrics import Metrics

QUEUED_AHEAD = 2
"""Batches on the device or queued for it: while one is computed the next is ready."""

STOP_S = 5.0

logger = logging.getLogger(__name__)


class DeadlineError(Exception):
    """A request's time was over before its items were scored."""


class DeviceError(Exception):
    """The device, or the thread that feeds it, raised an error. The log holds it; callers see this alone."""


@runtime_checkable
class Scorer(Protocol):
    """The device, as `jaxslm.score.compiled.CompiledScorer` feeds it."""

    @property
    def packer(self) -> Packer:
        """From requests to passes."""
        ...

    @property
    def devices(self) -> Sequence[Any]:
        """How many passes are computed at once."""
        ...

    def dispatch(self, group: Sequence[Forward]) -> Any:
        """Queues passes of one bucket; returns their result to come."""
        ...

    def collect(self, group: Sequence[Forward], result: Any, logits: np.ndarray) -> None:
        """Waits for a result of `dispatch` and puts its rows into `logits` [n, values_per_item]."""
        ...


@dataclass(frozen=True)
class _Batch:
    """Slices on the device, and the passes that hold them."""

    slices: Sequence[Slice]
    passes: Sequence[tuple[Sequence[Forward], Any]]
    dispatched: float

    @property
    def num_items(self) -> int:
        return sum(len(part.places) for part in self.slices)

    def empty_logits(self) -> Float32[np.ndarray, "n C"]:
        """Room for what its items get."""
        return np.empty((self.num_items, values_per_item([part.job.request for part in self.slices])), np.float32)


class Batcher:
    """The queue in front of a scorer. Safe for threads; `start` before use, `stop` at the end."""

    def __init__(self, scorer: Scorer, metrics: Metrics, max_batch_tokens: int, max_wait_s: float) -> None:
        self.scorer = scorer
        self.metrics = metrics
        self.max_batch_tokens = max_batch_tokens
        self.max_wait_s = max_wait_s
        self.tokens_per_s: float | None = None
        self.error: str | None = None
        self._heaps: dict[int, list[tuple[float, int, Job]]] = {}
        self._numbers = count()
        self._queued_tokens = 0
        self._waiting_since = 0.0
        self._changed = threading.Condition()
        self._stopping = False
        self._slots = threading.Semaphore(QUEUED_AHEAD)
        self._in_flight: SimpleQueue[_Batch | None] = SimpleQueue()
        self._running: deque[_Batch] = deque()
        self._launching_since: float | None = None
        self._last_finished = time.monotonic()
        self._threads = [
            threading.Thread(target=self._schedule, name="scheduler", daemon=True),
            threading.Thread(target=self._collect, name="collector", daemon=True),
        ]

    def start(self) -> None:
        """Starts the two threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Scores what waits, then ends the threads; gives up on a device that takes longer than STOP_S."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(STOP_S)

    def submit(self, request: PackRequest, deadline: float, *, trial: bool = False) -> Job:
        """Queues a request; its `future` gets the logits, or DeadlineError, DeviceError or InputError.

        Args:
            deadline: `time.monotonic()` by which it must be on the device. trial: see `Job`.
        """
        job = Job(request, deadline, trial=trial)
        with self._changed:
            if self._stopping:
                job.fail(DeviceError())
                return job
            if not self._queued_tokens:
                self._waiting_since = job.submitted
            urgency = -math.inf if trial else deadline
            heapq.heappush(self._heaps.setdefault(request.kind, []), (urgency, next(self._numbers), job))
            self._queued_tokens += job.tokens
            self._changed.notify_all()
        return job

    def drop(self, job: Job) -> None:
        """Takes a job's items out of the queue; what is on the device already is computed and forgotten."""
        with self._changed:
            if not job.dropped:
                job.dropped = True
                self._queued_tokens -= job.tokens

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the device."""
        return self._queued_tokens

    @property
    def queued_requests(self) -> int:
        """Clients' requests of which items wait for the device."""
        with self._changed:
            jobs = [job for heap in self._heaps.values() for _, _, job in heap]
            return sum(not (job.dropped or job.trial) for job in jobs)

    @property
    def running_batches(self) -> int:
        """Batches on the device or queued for it."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether both threads are at work; without them nothing is scored any more."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def idle_s(self) -> float:
        """Seconds since the device last finished something; 0 while it has work."""
        busy = self._running or self._queued_tokens or self._launching_since is not None
        return 0.0 if busy else time.monotonic() - self._last_finished

    @property
    def stalled_s(self) -> float:
        """Seconds that the device has been busy with the same batch, or in being given one; 0 if it has none."""
        running = next(iter(self._running.copy()), None)
        since = self._launching_since if running is None else running.dispatched
        return 0.0 if since is None else time.monotonic() - max(since, self._last_finished)

    def wait_s(self, tokens: int) -> float:
        """Returns how long so many more tokens would take to be scored, by the speed of late; 0 before it is known."""
        running = self._running.copy()
        ahead = sum(forward.real_tokens for batch in running for group, _ in batch.passes for forward in group)
        return (ahead + self._queued_tokens + tokens) / self.tokens_per_s if self.tokens_per_s else 0.0

    def _schedule(self) -> None:
        while True:
            self._slots.acquire()
            slices = self._next_slices()
            if slices is None:
                self._in_flight.put(None)
                return
            self._launch(slices)
            self._launching_since = None

    def _launch(self, slices: Sequence[Slice]) -> None:
        """Packs and dispatches a batch, for which a slot is held; jobs of one that cannot be packed go alone."""
        try:
            groups = self.scorer.packer.pack([part.request for part in slices], len(self.scorer.devices))
            passes = [(group, self.scorer.dispatch(group)) for group in groups]
        except InputError as error:
            self._slots.release()
            if len(slices) == 1:
                self._end(slices, error)
            else:
                for part in slices:
                    self._slots.acquire()
                    self._launch([part])
        except Exception as error:  # whatever the device raises must not end this thread
            self._slots.release()
            self._device_failed(slices, error)
        else:
            batch = _Batch(slices, passes, time.monotonic())
            self._running.append(batch)
            self._in_flight.put(batch)

    def _next_slices(self) -> list[Slice] | None:
        """Waits until a batch is full or has waited long enough and returns it; None when stopped and empty."""
        with self._changed:
            while True:
                self._forget_ended()
                heaps = [heap for heap in self._heaps.values() if heap]
                if not heaps:
                    if self._stopping:
                        return None
                    self._changed.wait()
                    continue
                patience = self._waiting_since + self.max_wait_s - time.monotonic()
                if patience <= 0 or self._stopping or self._queued_tokens >= self.max_batch_tokens:
                    # Before the tokens leave the queue: at every moment the work is seen somewhere.
                    self._launching_since = time.monotonic()
                    return self._take(min(heaps, key=lambda heap: heap[0][0]))
                self._changed.wait(patience)

    def _forget_ended(self) -> None:
        """Removes dropped and late jobs from the heads of the heaps."""
        now = time.monotonic()
        for heap in self._heaps.values():
            while heap and (heap[0][2].dropped or heap[0][2].deadline <= now):
                job = heapq.heappop(heap)[2]
                if not job.dropped:
                    self._queued_tokens -= job.tokens
                    job.fail(DeadlineError())

    def _take(self, heap: list[tuple[float, int, Job]]) -> list[Slice]:
        """Removes the next batch from a heap: items of the most urgent requests, as many as fit."""
        slices: list[Slice] = []
        budget = self.max_batch_tokens
        while heap:
            job = heap[0][2]
            if job.dropped:
                heapq.heappop(heap)
                continue
            number = job.fitting(budget)
            if slices and (job.trial or slices[0].job.trial or not job.worthwhile(number)):
                break
            waiting = job.tokens
            slices.append(job.take(max(1, number)))
            self._queued_tokens -= waiting - job.tokens
            if job.tokens:  # more of it than fits: the batch is full
                break
            budget -= waiting
            heapq.heappop(heap)
        return slices

    def _end(self, slices: Sequence[Slice], error: Exception) -> None:
        with self._changed:
            for part in slices:
                self._queued_tokens -= 0 if part.job.dropped else part.job.tokens
                part.job.fail(error)

    def _device_failed(self, slices: Sequence[Slice], error: Exception) -> None:
        logger.error("device failed", exc_info=error)
        self.error = type(error).__name__
        self._end(slices, DeviceError())

    def _collect(self) -> None:
        while (batch := self._in_flight.get()) is not None:
            try:
                logits = batch.empty_logits()
                for group, result in batch.passes:
                    self.scorer.collect(group, result, logits)
            except Exception as error:  # whatever the device raises must not end this thread
                self._device_failed(batch.slices, error)
            else:
                self.error = None
                self._deliver(batch, logits)
            finally:
                self._running.popleft()
                self._slots.release()

    def _deliver(self, batch: _Batch, logits: Float32[np.ndarray, "n C"]) -> None:
        """Hands a batch's logits to its jobs, learns how fast the device is, and counts what the batch cost."""
        now = time.monotonic()
        busy_s = now - max(batch.dispatched, self._last_finished)
        self._last_finished = now
        ends = np.cumsum([len(part.places) for part in batch.slices])
        for part, values in zip(batch.slices, np.split(logits, ends[:-1]), strict=True):
            job = part.job
            job.logits[part.places] = values[:, : job.logits.shape[1]]
            job.left -= len(part.places)
            if not job.left and not job.future.done():
                job.finished = now
                job.future.set_result(job.logits)
        forwards = [forward for group, _ in batch.passes for forward in group]
        real = sum(forward.real_tokens for forward in forwards)
        if busy_s > 0:
            # Follows the speed slowly, as passes differ in shape; a small pass says little about a full one.
            weight = 1.0 if self.tokens_per_s is None else 0.2 * min(1.0, real / self.max_batch_tokens)
            self.tokens_per_s = weight * real / busy_s + (1 - weight) * (self.tokens_per_s or 0.0)
        if not batch.slices[0].job.trial:
            self._count(batch, forwards, busy_s)

    def _count(self, batch: _Batch, forwards: Sequence[Forward], busy_s: float) -> None:
        self.metrics.busy_s.inc(busy_s)
        self.metrics.items.inc(batch.num_items)
        self.metrics.tokens.inc(sum(forward.real_tokens for forward in forwards))
        for forward in forwards:
            bucket = forward.bucket
            self.metrics.places.inc(bucket.tokens)
            self.metrics.padding.observe(1 - forward.real_tokens / bucket.tokens)
            name = f"{bucket.tokens}x{bucket.prefix_tokens}+{bucket.item_tokens}v{bucket.vectors_per_item}"
            self.metrics.passes.labels(name).inc()
