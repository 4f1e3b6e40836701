"""Embeddings in place of tokens: anywhere in query and items, as SGLang's clients send them."""

import base64
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxslm.config import CompressorConfig
from jaxslm.score.forward import PackRequest
from jaxslm.score.packing import Packer
from jaxslm.score.scorer import Ranker
from jaxslm.serve.buckets import OVERRIDES_PER_ITEM, serving_buckets
from jaxslm.serve.run import Server
from tests.compress.tiny_compressor import compressor_config
from tests.serve.tiny_server import metric, ok, post, refused

X = 300  # the token that overrides replace
OVERRIDES = ("embed_override_token_id", "query_embed_overrides", "item_embed_overrides")


@pytest.mark.parametrize("item_first", [False, True])
@pytest.mark.parametrize(
    ("query", "items"),
    [
        ([9, 8], [[X, 5, 6], [4, X, 6], [4, 5, X]]),
        ([9, 8], [[X, 5, 6, 7, 8, 9, 10, 11, 12], [1]]),
        ([9, 8], [[X] * 5 + [6], [X] * 5]),
        ([9, 8], [[X, *range(10), X, 3]]),
        ([9, X, 8, 7, 6], [[5, 4, 3, X, 2], [X], [1, 2, 3]]),
        ([X], [[X, X], [1]]),
        (list(range(200)), [[7] * 100 + [X], [X] + [7] * 100]),
    ],
)
def test_embedding_overrides_replace_the_placeholders(
    server: Server, ranker: Ranker, query: list[int], items: list[list[int]], item_first: bool
) -> None:
    """A placeholder that is overridden by the embedding of a token scores as that token, wherever it stands."""
    table, real = np.asarray(ranker.params["embedding"]), iter(range(11, 100))

    def filled(ids: list[int]) -> list[int]:
        return [next(real) if each == X else each for each in ids]

    def embeddings(ids: list[int], whole: list[int]) -> Any:
        return [table[new].tolist() for old, new in zip(ids, whole, strict=True) if old == X] or None

    whole_query, whole_items = filled(query), [filled(item) for item in items]
    body = {
        "query": query,
        "items": items,
        "item_first": item_first,
        "label_token_ids": list(ranker.label_token_ids),
        "embed_override_token_id": X,
        "query_embed_overrides": embeddings(query, whole_query),
        "item_embed_overrides": [embeddings(*pair) for pair in zip(items, whole_items, strict=True)],
    }
    before = metric(server.url, "jaxslm_compilations_after_ready")
    answer = ok(post(server, "/v1/score", body))
    assert metric(server.url, "jaxslm_compilations_after_ready") == before
    plain = ok(
        post(server, "/v1/score", {**body, "items": whole_items, "query": whole_query} | dict.fromkeys(OVERRIDES))
    )
    np.testing.assert_allclose(answer["logits"], plain["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(answer["scores"], plain["scores"], rtol=1e-5)
    assert answer["status"] == ["embedding" if X in [*query, *item] else "text" for item in items]
    assert plain["status"] == ["text"] * len(items)


def test_overrides_that_do_not_fit_are_refused(server: Server) -> None:
    body = {"query": [9], "items": [[X, 5], [4, 5]], "embed_override_token_id": X}
    zeros = [[0.0] * 32]
    for overrides, message in (
        ([None, zeros], "items[0] contains 1 occurrences of embed_override_token_id but 0 override embeddings"),
        ([zeros, zeros], "items[1] contains 0 occurrences of embed_override_token_id but 1 override embeddings"),
        ([[[0.0] * 31], None], "item_embed_overrides[0]: override embeddings must have 32 values"),
        ([zeros], "item_embed_overrides: 1 for 2 items"),
    ):
        assert message in refused(post(server, "/v1/score", body | {"item_embed_overrides": overrides}), 400)
    many = {"items": [[X] * 7], "item_embed_overrides": [zeros * 7]}
    assert "compiled for up to 6" in refused(post(server, "/v1/score", body | many), 400)
    crowd = {"items": [[X] * 200_000, *[[1]] * 199], "item_embed_overrides": None}
    assert "items[0] contains 200000" in refused(post(server, "/v1/score", body | crowd), 400)
    long = {"items": [[X, *[4] * 330]], "item_embed_overrides": [zeros]}
    assert "may have 320 tokens" in refused(post(server, "/v1/score", body | long), 400)


@pytest.mark.parametrize("value", [1e300, -1e39, 3.4e38, 1e17])
def test_values_that_no_device_can_add_up_are_the_clients_fault(server: Server, value: float) -> None:
    body = {"query": [X, 9], "items": [[X, 5], [4, 5]], "embed_override_token_id": X}
    large, small = [[value] + [0.0] * 31], [[1e16] * 32]
    for query, item, param in ((large, small, "query_embed_overrides"), (small, large, "item_embed_overrides")):
        overrides = {"query_embed_overrides": query, "item_embed_overrides": [item, None]}
        response = post(server, "/v1/score", body | overrides)
        assert "finite" in refused(response, 400)
        assert response.json()["param"] == param
    ok(post(server, "/v1/score", body | {"query_embed_overrides": small, "item_embed_overrides": [small, None]}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_of_values_that_no_device_can_add_up_are_refused(server: Server, dtype: str) -> None:
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    for value, status in ((np.nan, 400), (np.inf, 400), (3e38, 400), (9e15, 200)):
        data = base64.b64encode(np.full((1, 2, 32), value, kind).tobytes()).decode()
        array = {"data": data, "dtype": dtype, "shape": [1, 2, 32]}
        response = post(server, "/v1/score", {"query": "x", "item_embeddings": array})
        if status == 200:
            ok(response)
        else:
            assert "finite" in refused(response, status)
            assert response.json()["param"] == "item_embeddings"


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("compressor", [None, compressor_config()])
def test_default_buckets_hold_overrides(ranker: Ranker, platform: str, compressor: CompressorConfig | None) -> None:
    packer = Packer(serving_buckets(ranker.config, platform, compressor))
    longest = ranker.config.prompt.max_tokens
    for prefix, item in ((0, 1), (1, 128), (1024, 1), (0, longest), (1025, longest - 1025)):
        vectors, places = np.zeros((1, OVERRIDES_PER_ITEM, 4), np.float32), np.zeros((1, OVERRIDES_PER_ITEM), int)
        assert list(packer.pack([PackRequest([1] * prefix, [[2] * item], vectors, places)]))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("longest", [600, 8192, 16384])
def test_default_buckets_hold_every_row_of_the_prompt(ranker: Ranker, platform: str, longest: int) -> None:
    prompt = ranker.config.prompt.model_copy(update={"max_tokens": longest})
    packer = Packer(serving_buckets(ranker.config.model_copy(update={"prompt": prompt}), platform, None))
    for prefix, item in ((0, 1), (0, longest), (100, longest - 100), (longest - 1, 1)):
        assert list(packer.pack([PackRequest([1] * prefix, [[2] * item])]))
