"""The batcher with a device made of numpy: each item gets its own score in any mix; nothing is lost or stuck."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from jaxslm.config import Bucket, BucketConfig
from jaxslm.errors import InputError
from jaxslm.score.forward import Forward, PackRequest
from jaxslm.score.packing import Packer
from jaxslm.serve.batcher import Batcher, DeadlineError, DeviceError
from jaxslm.serve.metrics import Metrics

BUCKETS = BucketConfig(
    buckets=(
        Bucket(tokens=64, rows=8, prefix_tokens=16, items_per_row=2, item_tokens=8),
        Bucket(tokens=64, rows=4, prefix_tokens=16, items_per_row=1, item_tokens=40),
        Bucket(tokens=64, rows=8, prefix_tokens=16, items_per_row=2, item_tokens=8, vectors_per_item=2),
    )
)
SOON = 30.0


class NumpyDevice:
    """Scores an item as (first prefix token, sum of its tokens); counts passes, waits or fails when told to."""

    def __init__(self) -> None:
        self.packer = Packer(BUCKETS)
        self.devices = (None,)
        self.open, self.takes = threading.Event(), threading.Event()
        self.open.set()
        self.takes.set()
        self.fail_dispatch = self.fail_collect = False
        self.passes: list[Forward] = []

    def dispatch(self, group: Sequence[Forward]) -> Forward:
        assert self.takes.wait(SOON)
        if self.fail_dispatch:
            raise RuntimeError("out of memory")
        self.passes.append(group[0])
        return group[0]

    def collect(self, group: Sequence[Forward], result: Forward, logits: np.ndarray) -> None:
        assert self.open.wait(SOON)
        if self.fail_collect:
            raise RuntimeError("device lost")
        tokens = np.append(result.tokens, 0)
        items = tokens[result.items].sum(axis=-1)
        if result.vectors is not None:
            items = items + result.vectors[..., 0].sum(axis=-1).astype(items.dtype)
        prefix = np.broadcast_to(tokens[result.prefix[:, :1]], items.shape)
        scores = np.stack([prefix, items], axis=-1).reshape(-1, 2)
        logits[result.indices] = scores[result.places]


def expected(request: PackRequest) -> np.ndarray:
    sums = [sum(ids) for ids in request.item_ids]
    if request.vectors is not None:
        sums = [total + int(vectors[:, 0].sum()) for total, vectors in zip(sums, request.vectors, strict=True)]
    return np.array([(request.prefix_ids[0], total) for total in sums], np.float32)


def random_request(generator: np.random.Generator, longest: int = 40) -> PackRequest:
    prefix = generator.integers(1, 100, generator.integers(1, 16)).tolist()
    vectors = bool(generator.random() < 0.3)
    lengths = generator.integers(3, (8 if vectors else longest) + 1, generator.integers(1, 20))
    items = [generator.integers(1, 100, length).tolist() for length in lengths]
    return PackRequest(prefix, items, generator.integers(0, 9, (len(items), 2, 4)).astype(float) if vectors else None)


@contextmanager
def batching(device: NumpyDevice, max_wait_s: float = 0.0, max_batch_tokens: int = 64) -> Iterator[Batcher]:
    batcher = Batcher(device, Metrics(), max_batch_tokens, max_wait_s)
    batcher.start()
    try:
        yield batcher
    finally:
        device.open.set()
        batcher.stop()


@pytest.fixture
def device() -> NumpyDevice:
    return NumpyDevice()


def soon() -> float:
    return time.monotonic() + SOON


@pytest.mark.parametrize("seed", range(5))
def test_every_item_gets_its_own_score_in_any_mix(device: NumpyDevice, seed: int) -> None:
    generator = np.random.default_rng(seed)
    requests = [random_request(generator) for _ in range(60)]
    with batching(device, max_wait_s=0.001) as batcher:
        jobs = [batcher.submit(request, soon() + generator.random()) for request in requests]
        for request, job in zip(requests, jobs, strict=True):
            np.testing.assert_array_equal(job.future.result(SOON), expected(request))
        assert batcher.queued_tokens == 0
        assert batcher.running_batches == 0
    assert all(forward.real_tokens <= forward.bucket.tokens for forward in device.passes)


@pytest.mark.parametrize("seed", range(5))
def test_a_request_alone_makes_the_passes_that_the_packer_makes_of_it(device: NumpyDevice, seed: int) -> None:
    """In the same slots too: in others XLA adds in another order, and its score would not be bit-equal."""
    request = random_request(np.random.default_rng(seed))
    with batching(device, max_batch_tokens=1000) as batcher:
        batcher.submit(request, soon()).future.result(SOON)
    expected_passes = [forward for group in Packer(BUCKETS).pack([request]) for forward in group]
    assert len(device.passes) == len(expected_passes)
    for got, wanted in zip(device.passes, expected_passes, strict=True):
        assert got.bucket == wanted.bucket
        for name, array in wanted.batch.items():
            np.testing.assert_array_equal(got.batch[name], array)


def test_waiting_requests_share_a_pass(device: NumpyDevice) -> None:
    with batching(device, max_wait_s=0.2) as batcher:
        jobs = [batcher.submit(PackRequest([number], [[5, 5]]), soon()) for number in range(1, 7)]
        for job in jobs:
            job.future.result(SOON)
    assert len(device.passes) == 1


def test_an_urgent_request_overtakes_the_rest_of_a_large_one(device: NumpyDevice) -> None:
    device.open.clear()
    with batching(device) as batcher:
        large = batcher.submit(PackRequest([1], [[2] * 40] * 12), soon() + 10)
        while batcher.running_batches < 2:
            time.sleep(0.001)
        urgent = batcher.submit(PackRequest([7], [[3, 3]]), soon())
        device.open.set()
        urgent.future.result(SOON)
        large.future.result(SOON)
    assert urgent.finished is not None
    assert large.finished is not None
    assert urgent.finished < large.finished


def test_dropped_requests_leave_the_queue(device: NumpyDevice) -> None:
    device.open.clear()
    with batching(device) as batcher:
        running = [batcher.submit(PackRequest([1], [[2] * 40]), soon()) for _ in range(2)]
        while batcher.running_batches < 2:
            time.sleep(0.001)
        dropped = [batcher.submit(PackRequest([9], [[9] * 40] * 3), soon()) for _ in range(4)]
        assert batcher.queued_requests == 4
        for job in dropped:
            batcher.drop(job)
            batcher.drop(job)
        assert batcher.queued_requests == batcher.queued_tokens == 0
        device.open.set()
        last = batcher.submit(PackRequest([4], [[5]]), soon())
        for job in (*running, last):
            job.future.result(SOON)
    assert not any(job.future.done() for job in dropped)
    assert not any((forward.tokens == 9).any() for forward in device.passes)


def test_a_late_request_is_told_so_and_never_computed(device: NumpyDevice) -> None:
    with batching(device) as batcher:
        job = batcher.submit(PackRequest([1], [[2]]), time.monotonic() - 1)
        with pytest.raises(DeadlineError):
            job.future.result(SOON)
        assert batcher.queued_tokens == 0
    assert not device.passes


@pytest.mark.parametrize("where", ["fail_dispatch", "fail_collect"])
def test_a_device_error_fails_what_was_on_the_device_and_nothing_after(device: NumpyDevice, where: str) -> None:
    with batching(device) as batcher:
        setattr(device, where, True)
        job = batcher.submit(PackRequest([1], [[2] * 40] * 5), soon())
        with pytest.raises(DeviceError):
            job.future.result(SOON)
        while batcher.running_batches:
            time.sleep(0.001)
        assert batcher.error == "RuntimeError"
        assert batcher.queued_tokens == 0
        setattr(device, where, False)
        np.testing.assert_array_equal(batcher.submit(PackRequest([1], [[2]]), soon()).future.result(SOON), [[1, 2]])
        assert batcher.error is None


def test_a_request_that_no_bucket_holds_fails_alone(device: NumpyDevice) -> None:
    with batching(device, max_wait_s=0.2, max_batch_tokens=500) as batcher:
        good = [batcher.submit(PackRequest([1], [[2, number]]), soon()) for number in range(3)]
        bad = batcher.submit(PackRequest([1], [[2] * 100]), soon())
        with pytest.raises(InputError):
            bad.future.result(SOON)
        for number, job in enumerate(good):
            np.testing.assert_array_equal(job.future.result(SOON), [[1, 2 + number]])
        assert batcher.queued_tokens == 0


def test_stopping_scores_what_waits_and_refuses_the_rest(device: NumpyDevice) -> None:
    with batching(device, max_wait_s=SOON) as batcher:
        job = batcher.submit(PackRequest([1], [[2]]), soon())
        batcher.stop()
        np.testing.assert_array_equal(job.future.result(0), [[1, 2]])
        with pytest.raises(DeviceError):
            batcher.submit(PackRequest([1], [[2]]), soon()).future.result(0)


def test_a_stall_is_seen_while_it_lasts(device: NumpyDevice) -> None:
    device.open.clear()
    with batching(device) as batcher:
        job = batcher.submit(PackRequest([1], [[2]]), soon())
        time.sleep(0.05)
        assert 0.01 < batcher.stalled_s < SOON
        assert batcher.idle_s == 0
        device.open.set()
        job.future.result(SOON)
        while batcher.running_batches:
            time.sleep(0.001)
        assert batcher.stalled_s == 0


def test_a_device_that_takes_no_work_is_seen_as_stalled(device: NumpyDevice) -> None:
    device.takes.clear()
    with batching(device) as batcher:
        job = batcher.submit(PackRequest([1], [[2]]), soon())
        time.sleep(0.05)
        assert (batcher.queued_tokens, batcher.running_batches) == (0, 0)
        assert 0.01 < batcher.stalled_s < SOON
        assert batcher.idle_s == 0
        device.takes.set()
        job.future.result(SOON)
        while batcher.running_batches:
            time.sleep(0.001)
        assert batcher.stalled_s == 0


def test_the_servers_own_passes_go_first_alone_and_are_not_counted(device: NumpyDevice) -> None:
    device.open.clear()
    with batching(device, max_batch_tokens=500) as batcher:
        blockers = []
        for _ in range(2):
            blockers.append(batcher.submit(PackRequest([1], [[2] * 40]), soon()))
            while batcher.running_batches < len(blockers):
                time.sleep(0.001)
        others = [batcher.submit(PackRequest([3], [[4, 5]]), soon()) for _ in range(2)]
        trial = batcher.submit(PackRequest([9], [[9, 9]]), soon() + SOON, trial=True)
        assert batcher.queued_requests == len(others)
        device.open.set()
        for job in (*blockers, *others, trial):
            job.future.result(SOON)
        while batcher.running_batches:
            time.sleep(0.001)
        counted = [
            batcher.metrics.registry.get_sample_value(f"jaxslm_{name}_total") for name in ("items", "prompt_tokens")
        ]
    holding = [forward for forward in device.passes if (forward.tokens == 9).any()]
    assert device.passes.index(holding[0]) <= 2
    assert [forward.real_tokens for forward in holding] == [3]
    assert counted == [4, 2 * 41 + 2 * 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_has_died_is_seen(device: NumpyDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> None:
        raise RuntimeError

    with batching(device) as batcher:
        assert batcher.alive
        monkeypatch.setattr(batcher, "_forget_ended", die)
        batcher.submit(PackRequest([1], [[2]]), soon())
        until = time.monotonic() + SOON
        while batcher.alive and time.monotonic() < until:
            time.sleep(0.001)
        assert not batcher.alive


def test_a_clock_that_jumps_changes_nothing(device: NumpyDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    day, real = 86_400.0, time.time
    with batching(device, max_wait_s=0.01) as batcher:
        for jump in (day, -day, 0.0):
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            np.testing.assert_array_equal(batcher.submit(PackRequest([1], [[2]]), soon()).future.result(SOON), [[1, 2]])
            assert batcher.idle_s < SOON


def test_the_prefix_is_repeated_only_for_items_that_are_worth_it(device: NumpyDevice) -> None:
    device.open.clear()
    with batching(device) as batcher:
        blockers = [batcher.submit(PackRequest([1], [[2] * 40]), soon()) for _ in range(2)]
        while batcher.running_batches < 2:
            time.sleep(0.001)
        # 60 of 64 places are taken: a prefix of two and one item of two would fit, but the item brings no more than it.
        jobs = [batcher.submit(PackRequest([3] * 8, [[4] * 7] * 6), soon())]
        jobs.append(batcher.submit(PackRequest([5] * 8, [[6] * 4] * 12), soon() + 1))
        device.open.set()
        for job in (*blockers, *jobs):
            job.future.result(SOON)
    repeated = [int((forward.tokens == 5).sum()) for forward in device.passes if (forward.tokens == 5).any()]
    assert repeated == [8]
