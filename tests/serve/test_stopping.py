"""How a server ends while it is busy: soon, with an answer for whoever waits, with code 0, and with what was stored."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from jaxslm.compress.encoder import VectorEncoder
from jaxslm.items.store import open_store
from jaxslm.score.scorer import Ranker
from jaxslm.serve.engine import Engine
from jaxslm.serve.run import Server
from jaxslm.serve.served import ServedModel
from jaxslm.serve.settings import ServeSettings
from tests.serve.tiny_server import ADMIN, KEYS, log_lines, running, wait_until_ready

NEVER_ENDING = """
import sys, threading
from jaxslm.serve import run
from jaxslm.serve.catalogue import Catalogue
from jaxslm.serve.served import ServedModel
from jaxslm.serve.settings import ServeSettings

def put(*_):
    print("encoding", flush=True)
    threading.Event().wait()

Catalogue.put = put
ServedModel.warm_up = lambda self, **_: self.batcher.start()
print(run.serve(ServeSettings.model_validate_json(sys.argv[1]))["requests"])
"""
"""A server that compiles nothing before it is ready, says that it encodes, and never comes to the end of it."""


def put(url: str, items: int = 1) -> httpx.Response:
    body = {"items": [{"id": f"item-{number}", "text": "a job"} for number in range(items)]}
    return httpx.put(f"{url}/v1/items", json=body, headers=ADMIN, timeout=120)


def check_refusal(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.json()["type"]) == (503, "draining")
    assert answer.headers["retry-after"]


@pytest.fixture
def never_ending(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[subprocess.Popen[str]]:
    monkeypatch.setenv("JAXSLM_ADMIN_KEY", "the-admin-key")
    settings = ServeSettings(**files, store=str(tmp_path / "store"), drain_s=600.0).model_dump_json()
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", NEVER_ENDING, settings], stdout=subprocess.PIPE, stderr=log, text=True
        )
    yield child
    child.kill()
    child.communicate()


def test_a_second_signal_ends_a_server_that_encodes(never_ending: subprocess.Popen[str], tmp_path: Path) -> None:
    """The pass on the device is not waited for, neither by the server nor by the interpreter's exit."""
    until = time.monotonic() + 120
    while not (listening := [line for line in log_lines(tmp_path / "log") if line["message"] == "listening"]):
        assert time.monotonic() < until
        time.sleep(0.05)
    url = listening[0]["url"]
    wait_until_ready(url)
    assert never_ending.stdout is not None
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(put, url) for _ in range(2)]
        assert never_ending.stdout.readline() == "encoding\n"
        never_ending.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/health/ready", timeout=60).json()["status"] != "draining":
            time.sleep(0.02)
        never_ending.send_signal(signal.SIGTERM)
        for each in waiting:
            check_refusal(each.result())
    assert never_ending.wait(30) == 0
    assert int(never_ending.stdout.readline()) > 2
    lines = [line for line in log_lines(tmp_path / "log") if line["message"] == "request"]
    assert [(line["status"], line["reason"]) for line in lines] == [(503, "draining")] * 2


def test_an_encode_that_outlasts_draining_stops_between_passes(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client is told to come back, and what was stored stays."""
    encoded: list[int] = []
    many = threading.Event()

    def slow(self: VectorEncoder, items: Sequence[Any]) -> dict[int, np.ndarray]:
        encoded.append(len(items))
        if sum(encoded) > 300:
            many.set()
            time.sleep(0.5)
        return {k: np.zeros((len(items), k, self.config.width), np.float32) for k in self.ks}

    monkeypatch.setattr(VectorEncoder, "encode_all", slow)
    monkeypatch.setattr(ServedModel, "warm_up", lambda self, **_: self.batcher.start())
    settings = ServeSettings(**files, store=str(tmp_path / "store"), drain_s=0.1)
    with ThreadPoolExecutor(1) as threads:
        with running(settings) as server:
            waiting = threads.submit(put, server.url, 1000)
            assert many.wait(60)
        check_refusal(waiting.result())
    assert not server.service.engine.at_work
    with open_store(settings.store or "", read_only=True) as store:
        assert 256 <= store.count() <= sum(encoded) < 1000


def test_a_server_that_is_stopped_as_warm_up_ends_has_not_failed(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its queue takes no more work by then, so that the last step of warm-up cannot succeed."""
    server = Server(Engine(ServeSettings(**files), KEYS))
    engine, stopped = server.service.engine, threading.Event()
    stop = engine.close

    def close() -> None:
        stop()
        stopped.set()

    def last_moments(*_: object) -> None:
        server.handle_exit(signal.SIGTERM, None)
        assert stopped.wait(60)

    monkeypatch.setattr(engine, "close", close)
    monkeypatch.setattr(Ranker, "warm_up", last_moments)
    server.serve_until_signal()
    until = time.monotonic() + 60
    while engine.at_work:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert engine.health.state == "draining"
