"""Requests made up from the OpenAPI document, valid and not: never an error of the server's, always the one body."""

import warnings
from collections import Counter
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from jaxslm.serve.run import Server
from jaxslm.serve.served import ServedModel
from tests.serve.tiny_server import ADMIN, metric, ok, post

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis makes the requests of this test")

ERROR_FIELDS = {"object", "message", "type", "param", "code", "id"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # the server's threads do, in this process
@pytest.mark.parametrize("examples", [4, pytest.param(170, marks=pytest.mark.slow)])
def test_no_request_breaks_the_server(server: Server, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    """170 examples are 2,380 requests or more: seven operations have bodies, which are made valid and invalid.

    A body that asks for the checkpoint in service to be loaded again is answered without doing so: it takes seconds.
    """
    engine, load = server.service.engine, server.service.engine.reload

    async def reload(path: str | None) -> ServedModel:
        return engine.model if path is None else await load(path)

    monkeypatch.setattr(engine, "reload", reload)
    compiled = metric(server.url, "jaxslm_compilations_after_ready")  # other tests use the ranker by themselves
    document = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    schema = schemathesis.openapi.from_dict(document)
    statuses: Counter[int] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        modes = list(schemathesis.GenerationMode) if operation.body else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:
            number = examples if operation.body else min(examples, 10)

            @settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def attempt(case: Any) -> None:
                answer = case.call(base_url=server.url, headers=ADMIN, timeout=60)
                statuses[answer.status_code] += 1
                assert answer.status_code < 500, answer.text
                if answer.status_code >= 400:
                    assert set(answer.json()) == ERROR_FIELDS
                    assert answer.status_code in (400, 404, 405, 413, 415, 422)

            attempt()
    assert statuses[200] > 0
    assert statuses[422] + statuses[400] > 0
    assert metric(server.url, "jaxslm_compilations_after_ready") == compiled
    print(dict(statuses))


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("ScoreRequest", {"query": "x"}),
        ("ScoreRequest", {"query": "x", "items": None, "item_ids": None}),
        ("ScoreRequest", {"query": None, "items": ["y"]}),
        ("ScoreRequest", {"query": "x", "items": ["y"], "label_token_ids": []}),
        ("ScoreRequest", {"query": "x", "item_embeddings": {"data": "", "dtype": "float32", "shape": [1, 0, 32]}}),
        ("RerankRequest", {"query": " ", "documents": ["y"]}),
        ("RerankRequest", {"query": "x", "documents": []}),
        ("RerankRequest", {"query": "x", "documents": ["y", ""]}),
        ("RerankRequest", {"query": "x", "documents": ["y"], "rank_fields": ["title"]}),
    ],
)
def test_the_openapi_document_says_what_is_refused(server: Server, name: str, body: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema_rs", reason="schemathesis brings it")
    document = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    path = {"ScoreRequest": "/v1/score", "RerankRequest": "/rerank"}[name]
    assert post(server, path, body).status_code in (400, 422)
    assert not jsonschema.Draft202012Validator(schema).is_valid(body)
    good = {"ScoreRequest": {"query": "x", "items": ["y"]}, "RerankRequest": {"query": "x", "documents": ["y"]}}[name]
    jsonschema.Draft202012Validator(schema).validate(good)
    ok(post(server, path, good))
