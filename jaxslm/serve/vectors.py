"""Vectors that clients send: checked, and brought to the places of the tokens that they replace."""

import base64
import binascii
import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int

from jaxslm.serve.errors import invalid
from jaxslm.serve.schemas import EmbeddingArray, ScoreRequest

_DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

LARGEST_VALUE = 1e16
"""Beyond any embedding; squares of it can still be added in float32, so that the device returns numbers."""


def decode(array: EmbeddingArray, width: int) -> Float[np.ndarray, "J C D"]:
    """Returns the array that a request holds; raises ApiError if it is not what its shape says, or too large."""
    dtype = _DTYPES[array.dtype]
    if array.shape[2] != width:
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
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = np.frombuffer(data, dtype).reshape(array.shape).astype(np.float32)
    _check_values(values, "item_embeddings")
    return values


def overrides_of(
    body: ScoreRequest, rows: Sequence[Sequence[int]], width: int, limit: int
) -> tuple[Float[np.ndarray, "J C D"] | None, Int[np.ndarray, "J C"] | None]:
    """Returns the embeddings that fill the places of one token in each row, and these places, -1 behind the last.

    Both None without any. Placeholders may stand anywhere.

    Args:
        rows: query and item end to end. limit: the most embeddings in one row.

    Raises:
        ApiError: not one embedding per placeholder, of another width, too large a value, or more than the limit.
    """
    token = body.embed_override_token_id
    if token is None:
        if body.query_embed_overrides is not None or body.item_embed_overrides is not None:
            raise invalid("embed_override_token_id: is needed with embedding overrides", "embed_override_token_id")
        return None, None
    items = body.item_embed_overrides or [None] * len(rows)
    if len(items) != len(rows):
        raise invalid(f"item_embed_overrides: {len(items)} for {len(rows)} items", "item_embed_overrides")
    shared = _array(body.query_embed_overrides, width, "query_embed_overrides")
    found = [[place for place, each in enumerate(row) if each == token] for row in rows]
    given = []
    for number, (mine, where) in enumerate(zip(items, found, strict=True)):
        own = _array(mine, width, f"item_embed_overrides[{number}]")
        given.append(np.concatenate([own, shared] if body.item_first else [shared, own]))
        _check_count(number, len(where), len(given[-1]), limit)
    most = max(map(len, found))
    if not most:
        return None, None
    vectors, places = np.zeros((len(rows), most, width), np.float32), np.full((len(rows), most), -1)
    for number, where in enumerate(found):
        vectors[number, : len(where)], places[number, : len(where)] = given[number], where
    return vectors, places


def _check_count(number: int, occurrences: int, given: int, limit: int) -> None:
    problem = None
    if occurrences != given:
        problem = f" contains {occurrences} occurrences of embed_override_token_id but {given} override embeddings"
        problem += " were provided"
    elif given > limit:
        problem = f": {given} override embeddings in query and item: this server is compiled for up to {limit}"
    if problem is not None:
        raise invalid(f"items[{number}]{problem}", "item_embed_overrides")


def _array(vectors: Sequence[Sequence[float]] | None, width: int, name: str) -> Float32[np.ndarray, "n D"]:
    """Returns vectors of a JSON body; raises ApiError if one has another width, or a value is too large."""
    if any(len(vector) != width for vector in vectors or ()):
        raise invalid(f"{name}: override embeddings must have {width} values", name.partition("[")[0])
    values = np.array(vectors or [], np.float64).reshape(-1, width)
    _check_values(values, name)
    return values.astype(np.float32)


def _check_values(values: Float[np.ndarray, "*n"], name: str) -> None:
    if not (np.abs(values) <= LARGEST_VALUE).all():
        raise invalid(f"{name}: must be finite, and no value beyond {LARGEST_VALUE:g}", name.partition("[")[0])
