"""The load on a server: what is sent, what is measured, when it stops. The server is a small one of our own."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from jaxslm.bench import server
from jaxslm.bench.client import Answer, StoredTraffic, Target, TextTraffic, poisson_arrivals, run_client
from jaxslm.bench.server import LoadOptions, Traffic, _measured, bench_serve, find_capacity, text_traffic
from jaxslm.bench.workloads import Workload
from jaxslm.errors import InputError
from jaxslm.evaluate.results import read_results
from jaxslm.serve.metrics import Metrics

KEY = "the-key-of-the-bench"
PREFIX, SUFFIX = 12, 3  # tokens that the stand-in's prompt adds to query and item


class Stand:
    """Answers `/v1/score` in the server's words, one request after the other, each after `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.bodies: list[dict[str, Any]] = []
        self.lock = asyncio.Lock()
        self.metrics = Metrics()
        self.metrics.serves("stand-in", "float32", 'a "big" one, 2 cores')

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["path"] == "/metrics":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": self.metrics.text()})
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body", False)
        request = json.loads(body)
        self.bodies.append(request)
        allowed = (b"authorization", f"Bearer {KEY}".encode()) in scope["headers"]
        async with self.lock:
            await asyncio.sleep(self.seconds)
        tokens = PREFIX + 2 * len(request["query"].split())
        tokens += sum(SUFFIX + 2 * len(item.split()) for item in request.get("items", []))
        headers = [(b"x-compute-tokens", str(tokens).encode())]
        await send({"type": "http.response.start", "status": 200 if allowed else 401, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"model": "stand-in"}).encode()})


@contextmanager
def running(stand: Stand) -> Iterator[Target]:
    listener = socket.create_server(("127.0.0.1", 0))
    stand_in = uvicorn.Server(uvicorn.Config(stand, log_config=None, lifespan="off"))
    thread = threading.Thread(target=stand_in.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not stand_in.started:
            time.sleep(0.01)
        yield Target(f"http://127.0.0.1:{listener.getsockname()[1]}", KEY)
    finally:
        stand_in.should_exit = True
        thread.join()
        listener.close()


def test_requests_leave_when_they_are_due_though_none_is_answered() -> None:
    stand = Stand(0.2)  # five a second, offered twenty
    with running(stand) as target:
        answers = run_client(target, TextTraffic(2, 3, 4), 20.0, 1.0, seed=0, start_at=time.time() + 0.1)
    assert len(answers) > 10
    assert {answer.status for answer in answers} == {200}
    dues = [answer.due_s for answer in answers]
    assert dues == sorted(dues)
    # Each waits for all before it, and its latency says so.
    assert answers[-1].latency_s > 0.2 * len(answers) - dues[-1] - 0.05
    assert all(answer.latency_s >= answer.late_s for answer in answers)


def test_arrivals_are_poisson_and_the_seed_decides() -> None:
    first, again, other = (poisson_arrivals(300.0, 10.0, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert first == sorted(first)
    assert 0 < first[0] < first[-1] < 10
    gaps = np.diff(first)
    assert gaps.mean() == pytest.approx(1 / 300, rel=0.1)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # of an exponential distribution


def test_text_has_the_tokens_of_the_workload() -> None:
    stand = Stand()
    workload = Workload("w", prefix_tokens=120, item_tokens=183, items=10)
    with running(stand) as target:
        traffic = text_traffic(target, workload)
    assert traffic.tokens == pytest.approx(workload.tokens, abs=12)  # a word has two tokens
    bodies = stand.bodies[-5:]
    assert all(len(body["items"]) == 10 for body in bodies)
    assert len({json.dumps(body) for body in bodies}) == 5


def test_stored_requests_name_items_of_the_store_once_each() -> None:
    ids = [f"i{number}" for number in range(20)]
    generator = np.random.default_rng(0)
    first, second = (StoredTraffic(tuple(ids), 8).body(generator) for _ in range(2))
    assert len(set(first["item_ids"])) == 8
    assert set(first["item_ids"]) <= set(ids)
    assert first != second


def answers_of(*latencies_ms: float, status: int = 200) -> list[Answer]:
    return [Answer(status, 0.0, value / 1000, 0.0, 10) for value in latencies_ms]


@pytest.mark.parametrize(
    ("answers", "passed"),
    [
        (answers_of(*[10.0] * 99, 2000.0), True),
        (answers_of(*[10.0] * 98, 2000.0, 2000.0), False),
        (answers_of(*[10.0] * 99) + answers_of(1.0, status=429), True),
        (answers_of(*[10.0] * 98) + answers_of(1.0, 1.0, status=429), False),
        (answers_of(*[1.0] * 5, status=503), False),
        ([], False),
    ],
)
def test_a_request_that_is_late_or_refused_has_missed_the_target(answers: list[Answer], passed: bool) -> None:
    traffic = Traffic("w", TextTraffic(1, 1, 2), 2, 10.0, 0.01)
    step, met = _measured(traffic, 5.0, LoadOptions(seconds=20.0), answers)
    assert met is passed
    assert step["items_per_s"] == pytest.approx(2 * sum(a.status == 200 for a in answers) / 20)
    assert sum(step["errors"].values()) == sum(a.status != 200 for a in answers)
    if any(answer.status == 200 for answer in answers):
        assert step["p50_ms"] <= step["p95_ms"] <= step["p99_ms"]


def test_the_rate_rises_until_the_target_is_missed_and_is_then_narrowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(pool: Any, target: Any, traffic: Any, rate: float, options: Any, seed: int) -> list[Answer]:
        """A server that keeps up with twenty requests a second."""
        return answers_of(*[40.0 if rate <= 20 else 900.0] * 200)

    monkeypatch.setattr(server, "_load", load)
    traffic = Traffic("w", TextTraffic(1, 1, 50), 50, 10.0, alone_s=0.05)
    pool = ProcessPoolExecutor(1)  # starts no process before it has work
    row, steps = find_capacity(pool, Target("http://localhost"), traffic, LoadOptions(seconds=10.0))
    rates = [step["requests_per_s"] for step in steps]
    assert rates[:5] == pytest.approx([4, 6, 9, 13.5, 20.25])  # from a fifth of what one after the other gives
    assert rates[5:] == pytest.approx([(13.5 * 20.25) ** 0.5, (16.534 * 20.25) ** 0.5], rel=1e-3)
    assert row["requests_per_s"] == rates[-1] <= 20
    assert row["p99_ms"] == 40
    assert row["items_per_s"] == 50 * 200 / 10
    row, steps = find_capacity(pool, Target("http://localhost"), traffic, LoadOptions(start_rate=90.0))
    rates = [step["requests_per_s"] for step in steps]
    assert rates[:4] == [90.0, 45.0, 22.5, 11.25]  # too many: halved until it is few enough
    assert 11.25 < row["requests_per_s"] <= 20
    row, _ = find_capacity(pool, Target("http://localhost"), traffic, LoadOptions(start_rate=30.0, target_ms=1000.0))
    assert row["requests_per_s"] > 30


def test_a_server_that_is_never_fast_enough_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_load", lambda *_, **__: answers_of(*[900.0] * 200))
    traffic = Traffic("w", TextTraffic(1, 1, 50), 50, 10.0, alone_s=0.9)
    options = LoadOptions(seconds=10.0, start_rate=4.0)
    row, steps = find_capacity(ProcessPoolExecutor(1), Target("http://localhost"), traffic, options)
    assert [step["requests_per_s"] for step in steps] == [4.0, 2.0, 1.0, 0.5]  # five requests, and no fewer
    assert "items_per_s" not in row


def test_client_processes_load_a_server_and_the_report_can_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps({"id": f"i{n}", "text": "t"}) + "\n" for n in range(60)))
    monkeypatch.setattr(server, "REFINEMENTS", 0)
    stand = Stand(0.05)  # twenty a second
    with running(stand) as target:
        result = bench_serve(target, ["stored"], items, LoadOptions(clients=2, seconds=1.0, start_rate=40.0))
    probed = 1 + server.PROBES
    assert sum(step["requests"] for step in result["load"]) == len(stand.bodies) - probed
    assert {len(set(body["item_ids"])) for body in stand.bodies if "item_ids" in body} == {50}
    assert all(step["errors"] == {} for step in result["load"])
    assert result["conditions"]["model"] == result["model"] == "stand-in"
    assert (result["dtype"], result["device"]) == ("float32", 'a "big" one, 2 cores')
    assert result["items_per_s"] == result["rows"][0].get("items_per_s")
    saved = tmp_path / "serve.json"
    saved.write_text(json.dumps(result))
    [section] = read_results([saved])
    assert [step.offered_items_per_s for step in section.load] == [
        step["offered_items_per_s"] for step in result["load"]
    ]


def test_what_cannot_be_measured_is_told_at_once(tmp_path: Path) -> None:
    with running(Stand()) as target:
        with pytest.raises(InputError, match="answered 401"):
            text_traffic(Target(target.url, "a-wrong-key"), Workload("w", 1, 1, 1))
        with pytest.raises(InputError, match="must be one of full_text, text_300, summary, stored"):
            bench_serve(target, ["latent_8"], None)
        with pytest.raises(InputError, match="needs --items"):
            bench_serve(target, ["stored"], None)
    with pytest.raises(InputError, match="does not answer"):
        text_traffic(target, Workload("w", 1, 1, 1))


def test_a_broken_address_is_one_line() -> None:
    with pytest.raises(InputError, match="does not answer") as error:
        text_traffic(Target("nonsense"), Workload("w", 1, 1, 1))
    assert len(str(error.value).splitlines()) == 1
