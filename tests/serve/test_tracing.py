"""Spans of requests: they continue the caller's trace, say where the time went, and reach a collector."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra otel")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from jaxslm.errors import InputError
from jaxslm.serve.engine import Engine
from jaxslm.serve.run import Server
from jaxslm.serve.settings import Keys, ServeSettings, TracingSettings
from jaxslm.serve.tracing import Tracer, open_tracer

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARTS = ["receive", "tokenise", "queue", "device", "respond"]


@pytest.fixture
def spans(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What a server that traces makes; its other tests run without."""
    exporter = InMemorySpanExporter()
    tracer = Tracer(SimpleSpanProcessor(exporter))
    with monkeypatch.context() as patch:
        patch.setattr(server.service.engine, "tracer", tracer)
        yield exporter
    tracer.close()


def post(server: Server, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/score", json=body, headers=headers, timeout=120)


def request_span(spans: InMemorySpanExporter, request_id: str) -> ReadableSpan:
    """Returns a request's span once it is made, which is after its answer was sent."""
    for _ in range(1000):
        found = [s for s in spans.get_finished_spans() if s.attributes and request_id in s.attributes.values()]
        if found:
            return found[0]
        threading.Event().wait(0.01)
    raise TimeoutError(request_id)


def test_a_request_continues_its_callers_trace(server: Server, spans: InMemorySpanExporter) -> None:
    body = {"query": "x", "items": ["y", "z"]}
    answer = post(server, body, traceparent=f"00-{TRACE}-{PARENT}-01", **{"x-request-id": "traced-1"})
    assert answer.status_code == 200
    whole = request_span(spans, "traced-1")
    assert (whole.name, whole.kind) == ("POST /v1/score", SpanKind.SERVER)
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert whole.attributes is not None
    assert whole.attributes["http.response.status_code"] == 200
    assert (whole.attributes["jaxslm.items"], whole.attributes["jaxslm.tokens"]) == (
        2,
        int(answer.headers["x-compute-tokens"]),
    )
    parts = [s for s in spans.get_finished_spans() if s.parent and s.parent.span_id == whole.context.span_id]
    assert [part.name for part in parts] == PARTS
    edges = [whole.start_time, *(part.end_time for part in parts)]
    assert [part.start_time for part in parts] == edges[:-1]
    assert edges[-1] == whole.end_time
    assert edges == sorted(edges, key=lambda moment: moment or 0)
    device = next(part for part in parts if part.name == "device")
    spent_ms = ((device.end_time or 0) - (device.start_time or 0)) / 1e6
    assert spent_ms >= float(answer.headers["x-inference-time"]) - 0.01


def test_refusals_have_a_span_of_their_own_trace_and_health_has_none(
    server: Server, spans: InMemorySpanExporter
) -> None:
    httpx.get(f"{server.url}/health/ready", headers={"x-request-id": "health-1"}, timeout=60)
    assert post(server, {"query": "x"}, traceparent="nonsense", **{"x-request-id": "refused-1"}).status_code == 400
    whole = request_span(spans, "refused-1")
    assert whole.parent is None
    assert whole.attributes is not None
    assert whole.attributes["error.type"] == "invalid_request"
    assert whole.status.status_code == StatusCode.UNSET
    assert [s.name for s in spans.get_finished_spans()] == ["POST /v1/score"]


def test_failures_are_marked(server: Server, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service.engine.health, "state", "draining")
    assert post(server, {"query": "x", "items": ["y"]}, **{"x-request-id": "failed-1"}).status_code == 503
    assert request_span(spans, "failed-1").status.status_code == StatusCode.ERROR


def test_spans_reach_a_collector(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        tracer = open_tracer(TracingSettings(endpoint=f"http://127.0.0.1:{collector.server_port}/v1/traces"))
        recorded, record = threading.Event(), tracer.record

        def record_and_tell(*of_the_request: Any) -> None:
            record(*of_the_request)
            recorded.set()

        with monkeypatch.context() as patch:
            patch.setattr(tracer, "record", record_and_tell)
            patch.setattr(server.service.engine, "tracer", tracer)
            post(server, {"query": "x", "items": ["y"]}, traceparent=f"00-{TRACE}-{PARENT}-01")
            assert recorded.wait(60), "spans are made after the answer is sent"
        tracer.close()
        collector.shutdown()
        thread.join()
    resource = received[0].resource_spans[0]
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "jaxslm"
    sent = resource.scope_spans[0].spans
    assert {span.trace_id.hex() for span in sent} == {TRACE}
    assert sorted(span.name for span in sent) == sorted([*PARTS, "POST /v1/score"])


def test_tracing_without_opentelemetry_is_refused(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    settings = ServeSettings(**files, tracing=TracingSettings(endpoint="http://127.0.0.1:4318/v1/traces"))
    with pytest.raises(InputError, match=r"^tracing: .* is not installed; `pip install 'jaxslm\[otel\]'` does$"):
        Engine(settings, Keys())
