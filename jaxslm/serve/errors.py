"""Refusals: every one has the same body, in the words of SGLang's, which Cohere's clients read too."""

import json
import math
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

REASONS = (
    *("invalid_http", "invalid_request", "unauthorized", "forbidden", "not_found", "method_not_allowed"),
    *("item_not_found", "item_stale", "item_corrupt", "body_too_slow", "body_too_large", "head_too_large"),
    *("too_many_items", "unsupported_media_type", "reload_in_progress", "reload_failed"),
    *("queue_full", "overloaded", "too_many_bodies", "warming", "draining", "failed", "device_failed"),
    *("device_stalled", "store_unavailable", "deadline", "internal_error"),
)
"""What `ApiError.kind` may be: metrics count each from the start."""

EXPECTED = "Input should be "
"""What pydantic's messages about types begin with."""


class ApiError(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status. kind: the reason, one of `REASONS`. message: for people; names field and rule.
        param: the field at fault, if one is. retry_after_s: when to come back, if that helps.
    """

    def __init__(
        self, status: int, kind: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.param = status, kind, message, param
        self.retry_after_s = retry_after_s


def invalid(message: str, param: str | None = None) -> ApiError:
    """Returns a refusal of a request that breaks a rule: 400."""
    return ApiError(400, "invalid_request", message, param=param)


def invalid_body(error: ValidationError) -> ApiError:
    """Returns the refusal of a body that is not JSON, 400, or against its schema, 422.

    Where a field takes several types, the attempt that came furthest is what the client meant.
    """
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    if problems[0]["type"] == "json_invalid":
        return invalid(f"body: {problems[0]['msg']}")
    paths = [_path(problem["loc"]) for problem in problems]
    best = max(paths, key=lambda path: (len(path), [part for part in path if isinstance(part, int)]))
    attempts = zip(problems, paths, strict=True)
    said = list(
        dict.fromkeys(problem["msg"].removeprefix("Value error, ") for problem, path in attempts if path == best)
    )
    if all(message.startswith(EXPECTED) for message in said):
        said = [EXPECTED + " or ".join(message.removeprefix(EXPECTED) for message in said)]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in best).removeprefix(".")
    return ApiError(422, "invalid_request", f"{param or 'body'}: {said[0]}", param=param or None)


def _path(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Returns the fields and numbers that lead to a value, without the names of the types that were tried."""
    return tuple(
        part
        for depth, part in enumerate(location)
        if depth == 0 or isinstance(part, int) or (part.isidentifier() and part.islower() and part != "str")
    )


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """Returns the one error body."""
    return {
        "object": "error",
        "message": error.message,
        "type": error.kind,
        "param": error.param,
        "code": error.status,
        "id": request_id,
    }


def error_response(error: ApiError, request_id: str, headers: dict[str, str] | None = None) -> Response:
    """Returns the HTTP response of a refusal."""
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    content = json.dumps(error_body(error, request_id))
    return Response(content, error.status, headers, media_type="application/json")
