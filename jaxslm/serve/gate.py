"""The gate in front of the routes: keys, limits, errors, request ids, metrics, logs."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxslm.serve.auth import Authenticator
from jaxslm.serve.errors import ApiError, error_response
from jaxslm.serve.service import Call, ClientGoneError, Service
from jaxslm.serve.settings import ServeSettings

ADMIN_PATHS = frozenset({"/v1/items", "/v1/reload"})
MAX_HEAD_BYTES = 16 * 1024
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_DEADLINE_DIGITS = re.compile(r"[0-9]{1,9}")

logger = logging.getLogger(__name__)


class Gate:
    """Wraps the routes. Every answer, refusals and failures too, goes out through it."""

    def __init__(self, app: ASGIApp, service: Service, keys: Authenticator, paths: Collection[str]) -> None:
        """Args: paths: those of the routes; all others are "unknown" to metrics and logs."""
        self.app, self.service, self.keys, self.paths = app, service, keys, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = self._call(scope["path"], Headers(scope=scope))
        scope.setdefault("state", {})["call"] = call
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(call, MutableHeaders(scope=message))
            await send(message)

        async def refuse(error: ApiError) -> None:
            call.refusal = error.kind
            if not status:  # otherwise an answer has begun
                await error_response(error, call.request_id)(scope, receive, send_with_headers)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
                raise ApiError(431, "head_too_large", f"headers: at most {MAX_HEAD_BYTES} bytes")
            self.keys.check(scope["path"], Headers(scope=scope), admin=scope["path"] in ADMIN_PATHS)
            await self.app(scope, receive, send_with_headers)
        except ClientGoneError:
            self.service.engine.metrics.cancelled.inc()
            status, call.refusal = 499, "client_gone"
        except ApiError as error:
            await refuse(error)
        except asyncio.CancelledError:  # uvicorn cancels what draining has left, and waits for nothing after it
            await refuse(self.service.admission.not_ready("draining"))
        except Exception:  # the answer must tell nothing of what went wrong inside; the log does
            logger.exception("unexpected error", extra={"fields": {"request_id": call.request_id}})
            await refuse(ApiError(500, "internal_error", "an error inside the server; its log has the request's id"))
        finally:
            self._record(scope, call, status)

    def _call(self, path: str, headers: Headers) -> Call:
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        now = time.monotonic()
        longest = self.service.settings.deadline_ms
        wished = headers.get("x-deadline-ms", "")
        milliseconds = min(float(wished), longest) if MAX_DEADLINE_DIGITS.fullmatch(wished) else longest
        route = path if path in self.paths else "unknown"
        return Call(request_id, route, received=now, deadline=now + milliseconds / 1000)

    def _add_headers(self, call: Call, headers: MutableHeaders) -> None:
        headers["x-request-id"] = call.request_id
        headers["x-content-type-options"] = "nosniff"
        now = time.monotonic()
        if call.scored is not None:
            call.respond_s = now - call.scored
            headers["x-compute-tokens"] = str(call.tokens)
            headers["x-tokenization-time"] = _milliseconds(call.tokenise_s)
            headers["x-queue-time"] = _milliseconds(call.queue_s)
            headers["x-inference-time"] = _milliseconds(call.device_s)
            headers["x-response-time"] = _milliseconds(call.respond_s)
        headers["x-total-time"] = _milliseconds(now - call.received)

    def _record(self, scope: Scope, call: Call, status: int) -> None:
        total_s = time.monotonic() - call.received
        metrics = self.service.engine.metrics
        metrics.requests.labels(call.route, status).inc()
        if call.refusal is not None and status != 499:
            metrics.rejected.labels(call.refusal).inc()
        if call.scored is not None:
            metrics.request_items.observe(call.items)
            metrics.total_s.observe(total_s)
            metrics.tokenise_s.observe(call.tokenise_s)
            metrics.queue_s.observe(call.queue_s)
            metrics.device_s.observe(call.device_s)
            metrics.respond_s.observe(call.respond_s)
        if call.route.startswith("/health") or call.route == "/metrics":
            return
        fields: dict[str, Any] = {
            "request_id": call.request_id,
            "method": scope["method"],
            "route": call.route,
            "status": status,
            **({"reason": call.refusal} if call.refusal else {}),
            "items": call.items,
            "tokens": call.tokens,
            "total_ms": round(1000 * total_s, 2),
            "receive_ms": round(1000 * call.receive_s, 2),
            "tokenise_ms": round(1000 * call.tokenise_s, 2),
            "queue_ms": round(1000 * call.queue_s, 2),
            "device_ms": round(1000 * call.device_s, 2),
        }
        logger.info("request", extra={"fields": fields})
        tracer = self.service.engine.tracer
        if tracer is not None:
            tracer.record(call, scope["method"], status, Headers(scope=scope))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"


async def read_body(request: Request, settings: ServeSettings) -> bytes:
    """Returns a request's body, and notes how long it took; never holds more than `max_body_bytes` of it.

    Raises:
        ApiError: 415 if it is not plain JSON by its head, 413 if it is too large, 408 if it takes too long.
        ClientGoneError: the client left before its end.
    """
    max_bytes, seconds = settings.max_body_bytes, settings.read_timeout_s
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "unsupported_media_type", "content-type: must be application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "unsupported_media_type", "content-encoding: must be absent: no body is unpacked")
    length = request.headers.get("content-length", "")
    too_large = ApiError(413, "body_too_large", f"body: at most {max_bytes} bytes")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    call: Call = request.state.call
                    call.receive_s = time.monotonic() - call.received
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, "body_too_slow", f"body: must arrive within {seconds:g} s") from None
