"""The routes, and what OpenAPI says of them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxslm.serve.auth import OPEN_PATHS, Authenticator
from jaxslm.serve.demo import add_page
from jaxslm.serve.engine import Engine
from jaxslm.serve.errors import ApiError, error_response, invalid_body
from jaxslm.serve.gate import Gate, read_body
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
from jaxslm.serve.service import Disconnected, Service

BodyT = TypeVar("BodyT", bound=BaseModel)

logger = logging.getLogger(__name__)


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
        redoc_url=None,
    )
    app.add_exception_handler(HTTPException, _http_error)
    app.state.service = service
    _add_scoring(app, service)
    _add_admin(app, service)
    _add_operations(app, engine)
    add_page(app, engine)
    paths = {route.path for route in app.routes if isinstance(route, Route)}
    app.add_middleware(Gate, service=service, keys=Authenticator(engine.keys), paths=paths)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(engine: Engine, service: Service) -> AsyncIterator[None]:
    engine.in_background("warm-up", partial(_warm_up, engine))
    watchdog = asyncio.create_task(engine.health.watch())
    yield
    watchdog.cancel()
    service.close()
    await asyncio.to_thread(engine.close)


def _warm_up(engine: Engine) -> None:
    try:
        engine.warm_up()
    except Exception:  # whatever it is, the process must end and say why
        if engine.health.state == "warming":  # otherwise it ends already, and its queue with it
            logger.critical("cannot serve: warm-up failed", exc_info=True)
            engine.health.state = "failed"


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document; bodies are read by hand, off the event loop, so their schemas are added by hand too."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        _, schemas = models_json_schema(
            [(body, "validation") for body in _BODIES], ref_template="#/components/schemas/{model}"
        )
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(schemas["$defs"])
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["security"] = [{}] if path in OPEN_PATHS else [{"bearer": []}, {"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router in the one error body."""
    assert isinstance(error, HTTPException)
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    refusal, call = ApiError(error.status_code, kind, str(error.detail)), request.state.call
    call.refusal, headers = kind, {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 405:
        # The router names the methods of the first route with this path alone.
        routes = [route for route in request.app.routes if isinstance(route, Route) and route.path == call.route]
        headers["allow"] = ", ".join(sorted({method for route in routes for method in route.methods or ()}))
    return error_response(refusal, call.request_id, headers)


def _accepted(service: Service, request: Request, *, queues: bool = True) -> AbstractAsyncContextManager[bytes]:
    """See `Admission.accepted`."""
    return service.admission.accepted(partial(read_body, request, service.settings), queues=queues)


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
        async with _accepted(service, request) as body:
            parse = parser(ScoreRequest, body)
            return _answer(await service.score(request.state.call, parse, gone(request)))

    _add(app, "POST", "/v1/score", score, ScoreRequest, ScoreResponse)

    def rerank_route(*, return_documents: bool) -> Callable[[Request], Awaitable[Response]]:
        async def rerank(request: Request) -> Response:
            """Orders documents by relevance to a query: bodies of Cohere, Jina, vLLM and SGLang."""
            async with _accepted(service, request) as body:
                parse = parser(RerankRequest, body)
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
        async with _accepted(service, request) as body:
            return _answer(await service.put_items(request.state.call, parser(PutItemsRequest, body)))

    async def delete_items(request: Request) -> Response:
        """Drops items from the store. Needs the admin key."""
        async with _accepted(service, request) as body:
            return _answer(await service.delete_items(request.state.call, parser(DeleteItemsRequest, body)))

    async def reload(request: Request) -> Response:
        """Puts another checkpoint into service. Needs the admin key."""
        async with _accepted(service, request, queues=False) as body:
            return _answer(await service.reload(parser(ReloadRequest, body)))

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
    # Load balancers ask with HEAD too.
    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live", response_model=HealthResponse)
    async def live() -> HealthResponse:
        """The process answers."""
        return HealthResponse(status="live")

    @app.head("/health/ready", include_in_schema=False)
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
