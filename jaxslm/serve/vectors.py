"""Vectors that clients send: checked, and brought to the places of the tokens that they replace."""

import base64
import binascii
import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from jaxslm.serve.errors import invalid
from jaxslm.serve.schemas import EmbeddingArray, ScoreRequest

_DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def decode(array: EmbeddingArray, width: int) -> Float[np.ndarray, "J C D"]:
    """Returns the array that a request holds; raises ApiError if it is not what its shape says, or not finite."""
    dtype = _DTYPES[array.dtype]
    if min(array.shape[:2]) < 1 or array.shape[2] != width:
        raise invalid(
            f"item_embeddings.shape: must be [items, vectors, {width}], is {list(array.shape)}", "item_embeddings"
        )
    try:
        data = base64.b64decode(array.data, validate=True)
    except binascii.Error:
        raise invalid("item_embeddings.data: no valid base64", "item_embeddings") from None
    expected = math.prod(array.shape) * dtype.itemsize
    if len(data) != expected:
        raise invalid(f"item_embeddings.data: {len(data)} bytes, shape and dtype need {expected}", "item_embeddings")
    values = np.frombuffer(data, dtype).reshape(array.shape).astype(np.float32)
    if not np.isfinite(values).all():
        raise invalid("item_embeddings.data: must be finite", "item_embeddings")
    return values


def overrides_of(
    body: ScoreRequest, rows: Sequence[Sequence[int]], width: int, limit: int
) -> tuple[Float[np.ndarray, "J C D"] | None, Int[np.ndarray, "J C"] | None]:
    """Returns the embeddings that fill the places of one token in each row, and these places, -1 behind the last.

    Both None without any. Placeholders may stand anywhere.

    Args:
        rows: query and item end to end. limit: the most embeddings in one row.

    Raises:
        ApiError: not one embedding per placeholder, of another width, or more than the limit.
    """
    token, query = body.embed_override_token_id, body.query_embed_overrides or []
    if token is None:
        if body.query_embed_overrides is not None or body.item_embed_overrides is not None:
            raise invalid("embed_override_token_id: is needed with embedding overrides", "embed_override_token_id")
        return None, None
    items = body.item_embed_overrides or [None] * len(rows)
    if len(items) != len(rows):
        raise invalid(f"item_embed_overrides: {len(items)} for {len(rows)} items", "item_embed_overrides")
    found = [[place for place, each in enumerate(row) if each == token] for row in rows]
    most = max(map(len, found))
    vectors, places = np.zeros((len(rows), most, width), np.float32), np.full((len(rows), most), -1)
    for number, own in enumerate(items):
        given = [*(own or []), *query] if body.item_first else [*query, *(own or [])]
        _check(number, given, len(found[number]), width, limit)
        if given:
            vectors[number, : len(given)], places[number, : len(given)] = given, found[number]
    return (vectors, places) if most else (None, None)


def _check(number: int, given: Sequence[Sequence[float]], occurrences: int, width: int, limit: int) -> None:
    problem = None
    if occurrences != len(given):
        problem = f" contains {occurrences} occurrences of embed_override_token_id but {len(given)} override embeddings"
        problem += " were provided"
    elif any(len(vector) != width for vector in given):
        problem = f": override embeddings must have {width} values"
    elif len(given) > limit:
        problem = f": {len(given)} override embeddings in query and item: this server is compiled for up to {limit}"
    if problem is not None:
        raise invalid(f"items[{number}]{problem}", "item_embed_overrides")
