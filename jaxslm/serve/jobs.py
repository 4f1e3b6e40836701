"""A request on its way through the device: what still waits of it, and the parts that batches took."""

import time
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int

from jaxslm.score.forward import PackRequest, values_per_item


class Job:
    """One request's items on their way through the device.

    Attributes:
        future: becomes the logits of (no, yes), float32 [J, 2], in the order given; the log-probabilities of what the
            request's `label_ids` ask for stand behind them.
        trial: whether the server itself asks: such a job goes first, shares no batch, and metrics leave it out.
        submitted, started, finished: `time.monotonic()` in seconds; the latter two None until then.
    """

    def __init__(self, request: PackRequest, deadline: float, *, trial: bool = False) -> None:
        self.request = request
        self.deadline = deadline
        self.trial = trial
        lengths = np.fromiter(map(len, request.item_ids), np.int64, len(request.item_ids))
        # Longest first, as the packer wants them: the items of a pass are of like length.
        self.order = np.argsort(-lengths, kind="stable")
        self.totals = np.cumsum(lengths[self.order])
        self.taken, self.left = 0, len(lengths)
        self.logits = np.empty((len(lengths), values_per_item([request])), np.float32)
        self.future: Future[Float32[np.ndarray, "J C"]] = Future()
        # From now on cancelling the future from outside has no effect: `Batcher.drop` is the way.
        self.future.set_running_or_notify_cancel()
        self.dropped = False
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.finished: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens that still wait, the prefix once."""
        if self.taken == len(self.order):
            return 0
        return len(self.request.prefix_ids) + int(self.totals[-1]) - self._tokens_taken

    @property
    def _tokens_taken(self) -> int:
        return int(self.totals[self.taken - 1]) if self.taken else 0

    def fitting(self, tokens: int) -> int:
        """Returns how many of the next items fit with their prefix into so many tokens."""
        limit = self._tokens_taken + tokens - len(self.request.prefix_ids)
        return max(0, int(self.totals.searchsorted(limit, side="right")) - self.taken)

    def worthwhile(self, number: int) -> bool:
        """Whether the next items are worth a repetition of the prefix for those after them."""
        last = self.taken + number
        if not number or last == len(self.order):
            return bool(number)
        return int(self.totals[last - 1]) - self._tokens_taken >= len(self.request.prefix_ids)

    def take(self, number: int) -> "Slice":
        """Returns the next items, which no longer wait."""
        # In the order of the request: a request that is taken whole is packed as the ranker packs it, to the last bit.
        part = Slice(self, np.sort(self.order[self.taken : self.taken + number]))
        self.taken += number
        self.started = self.started or time.monotonic()
        return part

    def fail(self, error: Exception) -> None:
        """Ends the job with an error, unless it has ended."""
        self.dropped = True
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(frozen=True)
class Slice:
    """Items of a job that a batch holds: their places among the job's items."""

    job: Job
    places: Int[np.ndarray, " n"]

    @property
    def request(self) -> PackRequest:
        return self.job.request.items_at(self.places)
