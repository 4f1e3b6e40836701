"""OpenTelemetry, for those who ask for it: a span per request, and one for each of its parts."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxslm.errors import InputError
from jaxslm.serve.settings import TracingSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

    from jaxslm.serve.service import Call


class Tracer:
    """Makes spans of requests that have ended: their times are known then, and nothing is asked of them before."""

    def __init__(self, processor: "SpanProcessor") -> None:
        """Args: processor: where spans go. Sampling and further attributes are the OTEL_* environment variables'."""
        from opentelemetry import trace
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        resource = Resource.create({SERVICE_NAME: "jaxslm"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("jaxslm.serve")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, call: "Call", method: str, status: int, headers: Mapping[str, str]) -> None:
        """Makes the spans of a request that ends now: the whole, and its parts if it scored.

        Args:
            status: of the answer; 499 if the client had gone. headers: in lower case; `traceparent` is continued.
        """
        trace, now = self._trace, time.monotonic()
        # One reading of the wall clock for all spans of a request: they stay in order when that clock is set.
        wall_ns = time.time_ns()

        def at(moment: float) -> int:
            return wall_ns - round((now - moment) * 1e9)

        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": call.route,
            "http.response.status_code": status,
            "jaxslm.request_id": call.request_id,
            "jaxslm.items": call.items,
            "jaxslm.tokens": call.tokens,
        }
        if call.refusal:
            attributes["error.type"] = call.refusal
        span = self._tracer.start_span(
            f"{method} {call.route}",
            self._propagator.extract(headers),
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=at(call.received),
        )
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        if call.scored is not None:
            within = trace.set_span_in_context(span)
            body_read = call.received + call.receive_s
            tokenised = body_read + call.tokenise_s
            dispatched = min(tokenised + call.queue_s, call.scored)
            moments = (call.received, body_read, tokenised, dispatched, call.scored, now)
            names = ("receive", "tokenise", "queue", "device", "respond")
            for name, start, end in zip(names, moments, moments[1:], strict=False):
                self._tracer.start_span(name, within, start_time=at(start)).end(at(end))
        span.end(wall_ns)

    def close(self) -> None:
        """Sends the spans that wait."""
        self._provider.shutdown()


def open_tracer(settings: TracingSettings) -> Tracer:
    """Returns a tracer that sends spans by OTLP over HTTP, in batches, from a thread of its own.

    Raises:
        InputError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InputError(f"tracing: {error.name} is not installed; `pip install 'jaxslm[otel]'` does") from None
    return Tracer(BatchSpanProcessor(OTLPSpanExporter(settings.endpoint)))
