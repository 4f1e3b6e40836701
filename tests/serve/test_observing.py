"""Metrics and logs: what they count, under which names, and that every line on stderr is JSON."""

import ast
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import jaxslm.serve
from jaxslm.serve.engine import Engine
from jaxslm.serve.errors import REASONS
from jaxslm.serve.metrics import Metrics
from jaxslm.serve.run import Server
from jaxslm.serve.service import Service
from jaxslm.serve.settings import Keys, ServeSettings
from tests.serve.tiny_server import ADMIN, running

KEYS = Keys(api=frozenset({"the-api-key"}), admin="the-admin-key")
SCORE = {"query": "x", "items": ["y"]}


def samples(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Returns the values of a metric by its labels."""
    families = text_string_to_metric_families(metrics.text().decode())
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return {tuple(sample.labels.values()): sample.value for sample in found}


class Lines(logging.Handler):
    """Fields of the lines of requests, in the order of their answers."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "request":
            self.fields.append(record.fields)  # type: ignore[attr-defined]

    def first(self, number: int) -> list[dict[str, Any]]:
        """Waits for `number` lines: a request is counted, then written, once its answer is out."""
        until = time.monotonic() + 60
        while len(self.fields) < number and time.monotonic() < until:
            time.sleep(0.001)
        assert len(self.fields) == number
        return self.fields


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Lines]:
    logger, lines = logging.getLogger("jaxslm.serve.gate"), Lines()
    logger.addHandler(lines)
    with caplog.at_level(logging.INFO, logger.name):
        yield lines
    logger.removeHandler(lines)


def asked(server: Server, method: str, path: str, **options: Any) -> int:
    return httpx.request(method, f"{server.url}{path}", timeout=60, **options).status_code


@pytest.fixture(scope="module")
def guarded(files: dict[str, Any]) -> Iterator[Server]:
    """A server that wants a key, computes in bfloat16 and has scored nothing yet."""
    with running(ServeSettings(**files, dtype="bfloat16", watchdog_s=0.05), KEYS) as server:
        yield server


def test_what_the_server_itself_asks_is_not_counted(guarded: Server) -> None:
    """It has scored a full batch to warm up, and more to see whether the device is well."""
    metrics, batcher = guarded.service.engine.metrics, guarded.service.engine.model.batcher
    assert batcher.tokens_per_s
    for name in ("items", "prompt_tokens", "token_places", "bucket_passes", "device_busy_seconds"):
        assert sum(samples(metrics, f"jaxslm_{name}_total").values()) == 0, name
    assert asked(guarded, "POST", "/v1/score", json=SCORE, headers=ADMIN) == 200
    assert samples(metrics, "jaxslm_items_total") == {(): 1}


def test_refusals_before_routing_name_their_route_and_reason(guarded: Server, lines: Lines) -> None:
    before = samples(guarded.service.engine.metrics, "jaxslm_num_rejected_requests_total")
    api = {"x-api-key": "the-api-key"}
    refused = [
        ("POST", "/v1/score", {}, 401, "/v1/score", "unauthorized"),
        ("PUT", "/v1/items", api, 403, "/v1/items", "forbidden"),
        ("GET", "/openapi.json", {}, 401, "/openapi.json", "unauthorized"),
        ("GET", "/v1/score", api, 405, "/v1/score", "method_not_allowed"),
        ("GET", "/v1/scores/7", api, 404, "unknown", "not_found"),
        ("GET", "/v1/scores/8", {}, 401, "unknown", "unauthorized"),
    ]
    for method, path, headers, status, _, _ in refused:
        assert asked(guarded, method, path, headers=headers) == status
    expected = [{"route": route, "status": status, "reason": why} for _, _, _, status, route, why in refused]
    assert [{name: line[name] for name in ("route", "status", "reason")} for line in lines.first(6)] == expected
    after = samples(guarded.service.engine.metrics, "jaxslm_num_rejected_requests_total")
    assert after["unauthorized",] - before["unauthorized",] == 3
    assert after["not_found",] - before["not_found",] == 1
    assert asked(guarded, "GET", "/docs", headers=api) == 200
    last = lines.first(7)[-1]
    assert last["route"] == "/docs"
    assert "reason" not in last
    routes = {route for route, _ in samples(guarded.service.engine.metrics, "jaxslm_num_requests_total")}
    assert routes <= {"unknown", *(route.path for route in guarded.config.app.routes)}  # type: ignore[union-attr]


def test_an_error_inside_is_counted_and_logged(server: Server, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("at /secret/path")

    before = samples(server.service.engine.metrics, "jaxslm_num_rejected_requests_total")
    monkeypatch.setattr(Service, "score", broken)
    assert asked(server, "POST", "/v1/score", json=SCORE) == 500
    [line] = lines.first(1)
    assert (line["status"], line["reason"]) == (500, "internal_error")
    after = samples(server.service.engine.metrics, "jaxslm_num_rejected_requests_total")
    assert after["internal_error",] - before["internal_error",] == 1


def test_the_time_of_a_slow_body_is_not_that_of_tokenising(server: Server, lines: Lines) -> None:
    def slow() -> Iterator[bytes]:
        yield b'{"query": "x", '
        time.sleep(0.5)
        yield b'"items": ["y"]}'

    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/score", content=slow(), headers=headers, timeout=60)
    assert answer.status_code == 200
    [line] = lines.first(1)
    assert line["receive_ms"] >= 400  # the first part may have been sent before it was asked for
    assert line["tokenise_ms"] <= line["total_ms"] - line["receive_ms"]
    assert float(answer.headers["x-tokenization-time"]) == pytest.approx(line["tokenise_ms"], abs=0.01)


def test_series_are_there_before_their_first_event() -> None:
    metrics = Metrics()
    assert samples(metrics, "jaxslm_num_rejected_requests_total") == dict.fromkeys([(each,) for each in REASONS], 0.0)
    assert samples(metrics, "jaxslm_score_cache_total") == {("hit",): 0, ("miss",): 0}
    lookups = samples(metrics, "jaxslm_item_lookups_total")
    assert lookups == dict.fromkeys([("found",), ("not_found",), ("stale",), ("corrupt",)], 0.0)


def test_every_reason_is_known() -> None:
    """Metrics start with all of them; those that are put together from a status are checked where they are."""
    used = set()
    for file in Path(jaxslm.serve.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            place = {"ApiError": 1, "refuse_load": 0}.get(name)
            if place is not None and isinstance(node.args[place], ast.Constant):
                used.add(node.args[place].value)  # type: ignore[attr-defined]
    assert {"invalid_request", "queue_full", "deadline"} <= used <= set(REASONS)


def test_the_model_in_service_is_named(guarded: Server) -> None:
    engine: Engine = guarded.service.engine
    [(device, dtype, model)] = samples(engine.metrics, "jaxslm_model_info")
    assert (model, dtype) == (engine.model.name, "bfloat16")
    assert "cores" in device
    assert samples(engine.metrics, "jaxslm_num_requests_waiting") == {(): 0}


def test_whatever_goes_wrong_every_line_on_stderr_is_json() -> None:
    code = """
import threading, warnings
from jaxslm.serve.logs import log_to_stderr
log_to_stderr()
warnings.warn("of a library")
import numpy as np
np.float32(1) / np.float32(0)
thread = threading.Thread(target=lambda: 1 / 0, name="scheduler")
thread.start()
thread.join()
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    lines = [json.loads(line) for line in child.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["warning", "warning", "critical"]
    assert "of a library" in lines[0]["message"]
    assert lines[2]["thread"] == "scheduler"
    assert "ZeroDivisionError" in lines[2]["traceback"]
