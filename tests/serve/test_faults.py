"""Faults, and what a client sees of them: a refusal that says to come back, and the truth about readiness."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from jaxslm.items.store import StoreUnavailable
from jaxslm.score.compiled import CompiledScorer
from jaxslm.score.forward import PackRequest
from jaxslm.serve.batcher import Batcher
from jaxslm.serve.jobs import Job
from jaxslm.serve.run import Server
from tests.serve.tiny_server import ADMIN, log_lines, metric, process

PROBE_TOKENS = 3
BODY = {"query": "x", "items": ["a job", "a ward"]}


def score(url: str, body: dict[str, Any] = BODY, deadline_ms: int = 100_000) -> httpx.Response:
    return httpx.post(f"{url}/v1/score", json=body, headers={"x-deadline-ms": str(deadline_ms)}, timeout=120)


def ready(url: str) -> tuple[int, str]:
    answer = httpx.get(f"{url}/health/ready", timeout=60)
    return answer.status_code, answer.json()["status"]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def well_again(server: Server) -> Iterator[None]:
    """Whatever happened, afterwards the server is ready and scores, and nothing was compiled for it."""
    compiled = metric(server.url, "jaxslm_compilations_after_ready")
    yield
    wait_for(lambda: ready(server.url) == (200, "ready"))
    assert score(server.url).status_code == 200
    assert metric(server.url, "jaxslm_compilations_after_ready") == compiled


def test_a_store_that_goes_away_costs_only_requests_by_id(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    items = {"items": [{"id": "kept", "text": "a job"}], "vectors_per_item": 2}
    assert httpx.put(f"{server.url}/v1/items", json=items, headers=ADMIN, timeout=120).status_code == 200
    by_id = {"query": "x", "item_ids": ["kept"], "items": ["a job"], "on_miss": "text"}
    before = score(server.url, by_id)
    assert before.status_code == 200
    catalogue = server.service.engine.model.catalogue
    assert catalogue is not None

    def gone(*_: object) -> None:
        raise StoreUnavailable("store /secret/path: gone")

    with monkeypatch.context() as patch:
        for method in ("get", "put", "delete"):
            patch.setattr(catalogue._store, method, gone)
        answers = [
            score(server.url, by_id),
            httpx.put(f"{server.url}/v1/items", json=items, headers=ADMIN, timeout=60),
            httpx.request("DELETE", f"{server.url}/v1/items", json={"ids": ["kept"]}, headers=ADMIN, timeout=60),
        ]
        for answer in answers:
            assert (answer.status_code, answer.json()["type"]) == (503, "store_unavailable")
            assert int(answer.headers["retry-after"]) >= 1
            assert "secret" not in answer.text
        assert score(server.url).status_code == 200
        assert ready(server.url) == (200, "ready")
    assert score(server.url, by_id).json() == before.json()


@pytest.mark.parametrize("where", ["dispatch", "collect"])
def test_a_device_error_turns_readiness_off_until_the_watchdog_has_scored(
    server: Server, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA_ERROR at /secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(CompiledScorer, where, broken)
        answer = score(server.url)
        assert (answer.status_code, answer.json()["type"]) == (503, "device_failed")
        assert "CUDA" not in answer.text
        assert ready(server.url) == (503, "device_failed")
        assert score(server.url).headers["retry-after"]
    wait_for(lambda: ready(server.url)[0] == 200)


def test_numbers_that_are_none_are_never_scores(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = CompiledScorer.collect

    def poisoned(self: CompiledScorer, group: Any, result: Any, logits: np.ndarray) -> None:
        collect(self, group, result, logits)
        logits[:1] = np.nan

    with monkeypatch.context() as patch:
        patch.setattr(CompiledScorer, "collect", poisoned)
        assert score(server.url).json()["type"] == "device_failed"
        wait_for(lambda: ready(server.url) == (503, "device_failed"))
        assert score(server.url).status_code == 503
    wait_for(lambda: ready(server.url)[0] == 200)


def test_numbers_that_a_request_itself_spoils_leave_the_server_ready(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends such vectors gets no score; the watchdog's own pass has numbers, and says that all is well."""
    collect, probes = CompiledScorer.collect, []

    def spoiled(self: CompiledScorer, group: Any, result: Any, logits: np.ndarray) -> None:
        collect(self, group, result, logits)
        if group[0].real_tokens == PROBE_TOKENS:
            probes.append(logits.copy())
        else:
            logits[:] = np.nan

    def more_than(number: int) -> bool:
        return len(probes) > number

    with monkeypatch.context() as patch:
        patch.setattr(CompiledScorer, "collect", spoiled)
        for number in range(3):
            assert score(server.url).json()["type"] == "device_failed"
            wait_for(partial(more_than, number))
            assert ready(server.url) == (200, "ready")
    assert np.isfinite(probes).all()


@pytest.mark.parametrize("step", ["dispatch", "collect"])
def test_a_stalled_device_ends_in_504_and_then_in_503(
    server: Server, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It takes no work, or gives no result."""
    whole, released = getattr(CompiledScorer, step), threading.Event()

    def stalled(self: CompiledScorer, *arguments: Any) -> Any:
        assert released.wait(60)
        return whole(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CompiledScorer, step, stalled)
        patch.setattr(server.service.engine.health, "_stall_s", 0.2)
        answer = score(server.url, deadline_ms=300)
        assert (answer.status_code, answer.json()["type"]) == (504, "deadline")
        wait_for(lambda: ready(server.url) == (503, "device_stalled"))
        assert score(server.url).status_code == 503
        released.set()
        wait_for(lambda: ready(server.url)[0] == 200)


def test_a_probe_that_is_not_answered_turns_readiness_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue takes the watchdog's item and nothing comes of it, though no batch is seen to be late."""
    health, submit = server.service.engine.health, Batcher.submit

    def lost(self: Batcher, request: PackRequest, deadline: float, *, trial: bool = False) -> Job:
        return Job(request, deadline) if trial else submit(self, request, deadline)

    with monkeypatch.context() as patch:
        patch.setattr(Batcher, "submit", lost)
        patch.setattr(Batcher, "drop", lambda *_: None)
        patch.setattr(health, "_stall_s", 0.2)
        health.suspect()
        wait_for(lambda: ready(server.url) == (503, "device_stalled"))
    wait_for(lambda: ready(server.url)[0] == 200)


@pytest.mark.parametrize("thread", ["scheduler", "collector"])
def test_without_its_threads_the_server_is_not_ready(
    server: Server, monkeypatch: pytest.MonkeyPatch, thread: str
) -> None:
    batcher = server.service.engine.model.batcher
    threads = [threading.Thread() if each.name == thread else each for each in batcher._threads]
    with monkeypatch.context() as patch:
        patch.setattr(batcher, "_threads", threads)
        assert ready(server.url) == (503, "device_failed")
        assert score(server.url).json()["type"] == "device_failed"


def test_too_much_work_is_refused_at_once_with_when_to_come_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, released = CompiledScorer.collect, threading.Event()

    def slow(self: CompiledScorer, group: Any, result: Any, logits: np.ndarray) -> None:
        assert released.wait(60)
        collect(self, group, result, logits)

    batcher = server.service.engine.model.batcher
    with monkeypatch.context() as patch, ThreadPoolExecutor(8) as threads:
        patch.setattr(CompiledScorer, "collect", slow)
        accepted = []
        for _ in range(2):
            accepted.append(threads.submit(score, server.url))
            wait_for(lambda: batcher.running_batches == len(accepted))
        accepted.append(threads.submit(score, server.url))
        wait_for(lambda: batcher.queued_tokens > 0)
        patch.setattr(batcher, "tokens_per_s", 1.0)
        answer = score(server.url)
        assert (answer.status_code, answer.json()["type"]) == (429, "overloaded")
        assert int(answer.headers["retry-after"]) > 5
        admission = server.service.admission
        patch.setattr(admission, "settings", admission.settings.model_copy(update={"max_queued_requests": 1}))
        assert score(server.url).json()["type"] == "queue_full"
        released.set()
        assert [each.result().status_code for each in accepted] == [200] * 3


def test_a_draining_server_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(server.service.engine.health, "state", "draining")
        assert ready(server.url) == (503, "draining")
        assert httpx.get(f"{server.url}/health/live", timeout=60).status_code == 200
        answer = score(server.url)
        assert (answer.status_code, answer.json()["type"]) == (503, "draining")
        assert answer.headers["retry-after"]


def test_the_watchdog_scores_on_an_idle_device(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        batcher = server.service.engine.model.batcher
        patch.setattr(server.service.engine.health, "_watchdog_s", 0.1)
        finished, counted = batcher._last_finished, metric(server.url, "jaxslm_items_total")
        wait_for(lambda: batcher._last_finished > finished)
        assert metric(server.url, "jaxslm_items_total") == counted


def test_a_wall_clock_that_jumps_ends_no_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    for jump in (86_400.0, -86_400.0):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda jump=jump: real() + jump)
            assert score(server.url, deadline_ms=30_000).status_code == 200
            assert ready(server.url) == (200, "ready")


@pytest.mark.slow
def test_processes_that_share_a_store_are_killed_and_stopped_under_load(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of one of two servers on one LMDB store loses its own answers and nothing else; kill -TERM loses none."""
    settings = files | {"store": str(tmp_path / "store")}
    # The second process loads what the first one has compiled.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    with process(settings, tmp_path / "a.log") as (first, url):
        _put(url, "from-first")
        with process(settings, tmp_path / "b.log") as (second, other_url):
            _put(other_url, "from-second")
            for each in (url, other_url):
                answer = score(each, {"query": "x", "item_ids": ["from-first", "from-second"]})
                assert answer.status_code == 200, answer.text
            with ThreadPoolExecutor(8) as threads:
                load = [threads.submit(_under_load, other_url) for _ in range(24)]
                wait_for(lambda: any(each.done() for each in load))
                second.send_signal(signal.SIGKILL)
                outcomes = [each.result() for each in load]
            assert set(outcomes) <= {"200", "429", "disconnected", "refused"}
            assert {"disconnected", "refused"} & set(outcomes)
        _put(url, "after-the-kill")
        assert score(url, {"query": "x", "item_ids": ["from-second", "after-the-kill"]}).status_code == 200
        with ThreadPoolExecutor(8) as threads:
            load = [threads.submit(_under_load, url) for _ in range(40)]
            wait_for(lambda: any(each.done() for each in load))
            first.send_signal(signal.SIGTERM)
            outcomes = [each.result() for each in load]
        assert "200" in outcomes
        _check_end(first)
        # A connection that was never accepted is refused or reset by the kernel; every one that was has its answer.
        assert set(outcomes) <= {"200", "429", "503", "refused", "disconnected"}
        statuses = {line["status"] for line in log_lines(tmp_path / "a.log") if line["message"] == "request"}
        assert statuses <= {200, 429, 503}


@pytest.mark.slow
def test_a_server_that_is_stopped_while_it_compiles_ends_well(files: dict[str, Any], tmp_path: Path) -> None:
    with process(files, tmp_path / "log", until_ready=False) as (child, url):
        assert httpx.get(f"{url}/health/ready", timeout=60).json() == {"status": "warming"}
        answer = score(url)
        assert (answer.status_code, answer.json()["type"]) == (503, "warming")
        child.send_signal(signal.SIGTERM)
        stdout, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    assert json.loads(stdout.splitlines()[-1])["url"] == url


def _put(url: str, item_id: str) -> None:
    items = {"items": [{"id": item_id, "text": "a job"}], "vectors_per_item": 2}
    assert httpx.put(f"{url}/v1/items", json=items, headers=ADMIN, timeout=120).json()["encoded"] == 1


def _under_load(url: str) -> str:
    """Sends one large request; returns its status, or how it failed."""
    try:
        return str(score(url, {"query": "x", "items": [f"the job {number}" for number in range(200)]}).status_code)
    except httpx.ConnectError:
        return "refused"
    except httpx.TransportError:
        return "disconnected"


def _check_end(child: subprocess.Popen[str]) -> None:
    stdout, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert json.loads(stdout.splitlines()[-1])["requests"] > 0
