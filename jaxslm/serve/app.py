"""The routes, and the gate in front of them: keys, limits, errors, request ids, metrics, logs."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxslm.serve.auth import Authenticator
from jaxslm.serve.demo import add_page
from jaxslm.serve.engine import Engine
from jaxslm.serve.errors import ApiError, error_response, invalid_body
from jaxslm.serve.schemas import (
    DeleteItemsRequest,
    DeleteItemsResponse,
    ErrorResponse,
    HealthResponse,
    PutItemsRequest,
    PutItemsResponse,
    ReloadRequest,
    ReloadResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
)
from jaxslm.serve.service import Call, ClientGoneError, Disconnected, Service
from jaxslm.serve.settings import ServeSettings

BodyT = TypeVar("BodyT", bound=BaseModel)

ADMIN_PATHS = frozenset({"/v1/items", "/v1/reload"})
MAX_HEAD_BYTES = 16 * 1024
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_DEADLINE_DIGITS = re.compile(r"[0-9]{1,9}")

logger = logging.getLogger(__name__)


class Gate:
    """Wraps the routes. Every answer, refusals and failures too, goes out through it."""

    def __init__(self, app: ASGIApp, service: Service, keys: Authenticator) -> None:
        self.app, self.service, self.keys = app, service, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = self._call(Headers(scope=scope))
        scope.setdefault("state", {})["call"] = call
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(call, MutableHeaders(scope=message))
            await send(message)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
                raise ApiError(431, "head_too_large", f"headers: at most {MAX_HEAD_BYTES} bytes")
            self.keys.check(scope["path"], Headers(scope=scope), admin=scope["path"] in ADMIN_PATHS)
            await self.app(scope, receive, send_with_headers)
        except ClientGoneError:
            self.service.engine.metrics.cancelled.inc()
            status = 499
        except ApiError as error:
            call.refusal = error.kind
            await error_response(error, call.request_id)(scope, receive, send_with_headers)
            self.service.engine.metrics.rejected.labels(error.kind).inc()
        except Exception:  # the answer must tell nothing of what went wrong inside; the log does
            logger.exception("unexpected error", extra={"fields": {"request_id": call.request_id}})
            failure = ApiError(500, "internal_error", "an error inside the server; its log has the request's id")
            call.refusal = failure.kind
            if not status:
                await error_response(failure, call.request_id)(scope, receive, send_with_headers)
        finally:
            self._record(scope, call, status)

    def _call(self, headers: Headers) -> Call:
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        now = time.monotonic()
        longest = self.service.settings.deadline_ms
        wished = headers.get("x-deadline-ms", "")
        milliseconds = min(float(wished), longest) if MAX_DEADLINE_DIGITS.fullmatch(wished) else longest
        return Call(request_id, now, now + milliseconds / 1000)

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
        route = scope.get("route")
        call.route = getattr(route, "path", "unknown")
        total_s = time.monotonic() - call.received
        metrics = self.service.engine.metrics
        metrics.requests.labels(call.route, status).inc()
        if call.scored is not None:
            metrics.request_items.observe(call.items)
            metrics.total_s.observe(total_s)
            metrics.tokenise_s.observe(call.tokenise_s)
            metrics.queue_s.observe(call.queue_s)
            metrics.device_s.observe(call.device_s)
            metrics.respond_s.observe(call.respond_s)
        if call.route.startswith("/health") or call.route == "/metrics":
            return
        fields = {
            "request_id": call.request_id,
            "method": scope["method"],
            "route": call.route,
            "status": status,
            "items": call.items,
            "tokens": call.tokens,
            "total_ms": round(1000 * total_s, 2),
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
    """Returns a request's body; never holds more than `max_body_bytes` of it.

    Raises:
        ApiError: 415 if it is not JSON by its type, 413 if it is too large, 408 if it takes too long.
        ClientGoneError: the client left before its end.
    """
    max_bytes, seconds = settings.max_body_bytes, settings.read_timeout_s
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "unsupported_media_type", "content-type: must be application/json")
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
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, "body_too_slow", f"body: must arrive within {seconds:g} s") from None


def parser(kind: type[BodyT], body: bytes) -> Callable[[], BodyT]:
    """Returns a function that checks a body against its schema; it raises ApiError."""

    def parse() -> BodyT:
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            raise invalid_body(error) from None

    return parse


_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "not JSON, or a rule that the schema cannot say",
        401: "no valid key",
        403: "a key that does not suffice",
        404: "an item id without usable vectors",
        408: "the body took too long",
        409: "another reload is running",
        413: "too many items or bytes",
        415: "not application/json",
        422: "against the schema",
        429: "too much to do: come back after Retry-After seconds",
        503: "not ready, draining, or the device or the store failed",
        504: "not scored by its deadline",
    }.items()
}
_BODIES = (ScoreRequest, RerankRequest, PutItemsRequest, DeleteItemsRequest, ReloadRequest)


def create_app(engine: Engine) -> FastAPI:
    """Returns the server's application; it warms the engine up when it starts and closes it when it ends."""
    service = Service(engine)
    app = FastAPI(
        title="jaxslm",
        summary="Relevance scores from a small language model",
        version=version("jaxslm"),
        lifespan=lambda _: _lifespan(engine, service),
        redirect_slashes=False,
    )
    app.add_middleware(Gate, service=service, keys=Authenticator(engine.keys))
    app.add_exception_handler(HTTPException, _http_error)
    app.state.service = service
    _add_scoring(app, service)
    _add_admin(app, service)
    _add_operations(app, engine)
    add_page(app, engine)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(engine: Engine, service: Service) -> AsyncIterator[None]:
    engine.compile_in_background("warm-up", partial(_warm_up, engine))
    watchdog = asyncio.create_task(engine.health.watch())
    yield
    watchdog.cancel()
    service.close()
    await asyncio.to_thread(engine.close)


def _warm_up(engine: Engine) -> None:
    try:
        engine.warm_up()
    except Exception:  # whatever it is, the process must end and say why
        logger.critical("cannot serve: warm-up failed", exc_info=True)
        engine.health.state = "failed"


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document; bodies are read by hand, off the event loop, so their schemas are added by hand too."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        _, schemas = models_json_schema(
            [(body, "validation") for body in _BODIES], ref_template="#/components/schemas/{model}"
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        app.openapi_schema = document
    return app.openapi_schema


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router in the one error body."""
    assert isinstance(error, HTTPException)
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    refusal = ApiError(error.status_code, kind, str(error.detail))
    return error_response(refusal, request.state.call.request_id, dict(error.headers or {}))


def _answer(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def _add_scoring(app: FastAPI, service: Service) -> None:
    def gone(request: Request) -> Disconnected:
        async def wait() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        return wait

    async def score(request: Request) -> Response:
        """Scores items against a query: SGLang's body, item ids, or embeddings."""
        with service.admitted():
            parse = parser(ScoreRequest, await read_body(request, service.settings))
            return _answer(await service.score(request.state.call, parse, gone(request)))

    _add(app, "POST", "/v1/score", score, ScoreRequest, ScoreResponse)

    def rerank_route(*, return_documents: bool) -> Callable[[Request], Awaitable[Response]]:
        async def rerank(request: Request) -> Response:
            """Orders documents by relevance to a query: bodies of Cohere, Jina, vLLM and SGLang."""
            with service.admitted():
                parse = parser(RerankRequest, await read_body(request, service.settings))
                answer = await service.rerank(
                    request.state.call, parse, gone(request), return_documents=return_documents
                )
                return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

        return rerank

    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        _add(app, "POST", path, rerank_route(return_documents=path != "/v2/rerank"), RerankRequest, RerankResponse)


def _add_admin(app: FastAPI, service: Service) -> None:
    async def put_items(request: Request) -> Response:
        """Encodes and stores items. Needs the admin key."""
        with service.admitted():
            parse = parser(PutItemsRequest, await read_body(request, service.settings))
            return _answer(await service.put_items(request.state.call, parse))

    async def delete_items(request: Request) -> Response:
        """Drops items from the store. Needs the admin key."""
        with service.admitted():
            parse = parser(DeleteItemsRequest, await read_body(request, service.settings))
            return _answer(await service.delete_items(request.state.call, parse))

    async def reload(request: Request) -> Response:
        """Puts another checkpoint into service. Needs the admin key."""
        with service.admitted(queues=False):
            parse = parser(ReloadRequest, await read_body(request, service.settings))
            return _answer(await service.reload(parse))

    _add(app, "POST", "/v1/reload", reload, ReloadRequest, ReloadResponse)
    _add(app, "PUT", "/v1/items", put_items, PutItemsRequest, PutItemsResponse)
    _add(app, "DELETE", "/v1/items", delete_items, DeleteItemsRequest, DeleteItemsResponse)


def _add(
    app: FastAPI,
    method: str,
    path: str,
    endpoint: Callable[..., Awaitable[Response]],
    body: type[BaseModel],
    answer: type[BaseModel],
) -> None:
    """Adds a route whose body is read by hand, with what OpenAPI should say of it."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    app.add_api_route(
        path,
        endpoint,
        methods=[method],
        operation_id=method.lower() + path.replace("/", "_"),
        responses={200: {"model": answer}, **_REFUSALS},
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    )


def _add_operations(app: FastAPI, engine: Engine) -> None:
    @app.get("/health/live", response_model=HealthResponse)
    async def live() -> HealthResponse:
        """The process answers."""
        return HealthResponse(status="live")

    @app.get("/health/ready", response_model=HealthResponse, responses={503: {"model": HealthResponse}})
    async def ready(response: Response) -> HealthResponse:
        """Everything is compiled, the device has scored of late, and the server is not about to end."""
        status = engine.health.status
        response.status_code = 200 if status == "ready" else 503
        return HealthResponse(status=status)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)
