"""Clients that teams have already: the official packages, and request bodies of vLLM, SGLang and Jina unchanged."""

import warnings
from typing import Any

import httpx
import numpy as np
import pytest

from jaxslm.serve.run import Server

DOCUMENTS = ["a python developer", "the night nurse", "an engineer on a ward"]
QUERY = "python job"


@pytest.fixture
def expected(server: Server) -> dict[int, float]:
    """P(yes) of each document, best first."""
    scores = server.service.engine.model.ranker.score(QUERY, DOCUMENTS)
    return {place: float(scores[place]) for place in np.argsort(-scores).tolist()}


def check(results: list[tuple[int, float]], expected: dict[int, float], top_n: int = 3) -> None:
    assert [index for index, _ in results] == list(expected)[:top_n]
    for index, score in results:
        assert score == pytest.approx(expected[index], abs=1e-5)


def importing(name: str) -> Any:
    """Imports a client whose own imports warn, or skips."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is a client that only this test needs")


def test_cohere_v2(server: Server, expected: dict[int, float]) -> None:
    cohere = importing("cohere")
    with httpx.Client() as session:
        client = cohere.ClientV2(api_key="unused-key", base_url=server.url, httpx_client=session)
        answer = client.rerank(model="jaxslm", query=QUERY, documents=DOCUMENTS, top_n=2, max_tokens_per_doc=4096)
    check([(result.index, result.relevance_score) for result in answer.results], expected, 2)
    assert answer.meta.billed_units.search_units == 1


def test_cohere_v1(server: Server, expected: dict[int, float]) -> None:
    cohere = importing("cohere")
    with httpx.Client() as session:
        client = cohere.Client(api_key="unused-key", base_url=server.url, httpx_client=session)
        answer = client.rerank(model="jaxslm", query=QUERY, documents=DOCUMENTS, return_documents=True)
    check([(result.index, result.relevance_score) for result in answer.results], expected)
    assert [result.document.text for result in answer.results] == [DOCUMENTS[place] for place in expected]


def test_cohere_reads_our_refusals(server: Server) -> None:
    cohere = importing("cohere")
    with httpx.Client() as session:
        client = cohere.ClientV2(api_key="unused-key", base_url=server.url, httpx_client=session)
        with pytest.raises(cohere.BadRequestError) as refusal:
            client.rerank(model="jaxslm", query=" ", documents=DOCUMENTS)
    assert refusal.value.body["message"] == "query: must not be empty"


def test_langchain_cohere_compressor(server: Server, expected: dict[int, float]) -> None:
    langchain_cohere = importing("langchain_cohere")
    documents = importing("langchain_core.documents")
    cohere = importing("cohere")
    with httpx.Client() as session:
        client = cohere.ClientV2(api_key="unused-key", base_url=server.url, httpx_client=session)
        compressor = langchain_cohere.CohereRerank(client=client, model="jaxslm", top_n=3)
        found = compressor.compress_documents([documents.Document(page_content=text) for text in DOCUMENTS], QUERY)
    results = [(DOCUMENTS.index(each.page_content), each.metadata["relevance_score"]) for each in found]
    check(results, expected)


def test_langchain_jina_compressor(server: Server, expected: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    jina = importing("langchain_community.document_compressors.jina_rerank")
    documents = importing("langchain_core.documents")
    monkeypatch.setattr(jina, "JINA_API_URL", f"{server.url}/v1/rerank")
    compressor = jina.JinaRerank(jina_api_key="unused-key", top_n=3)
    found = compressor.compress_documents([documents.Document(page_content=text) for text in DOCUMENTS], QUERY)
    compressor.session.close()
    results = [(DOCUMENTS.index(each.page_content), each.metadata["relevance_score"]) for each in found]
    check(results, expected)


@pytest.mark.parametrize(
    "body",
    [
        # Jina's documentation, with texts as objects too.
        {"model": "jina-reranker-v2", "documents": DOCUMENTS, "top_n": 3, "return_documents": False},
        {"model": "m", "documents": [{"text": text} for text in DOCUMENTS], "return_documents": True},
        # vLLM: every field that its protocol has, at its default.
        {
            "model": None,
            "user": None,
            "documents": DOCUMENTS,
            "top_n": 0,
            "truncate_prompt_tokens": None,
            "truncation_side": None,
            "request_id": "r-1",
            "priority": 0,
            "mm_processor_kwargs": None,
            "cache_salt": None,
            "use_activation": None,
            "max_tokens_per_query": 0,
            "max_tokens_per_doc": 0,
            "instruction": None,
            "chat_template_kwargs": None,
        },
        # SGLang.
        {"documents": DOCUMENTS, "instruct": None, "top_n": None, "return_documents": True},
    ],
)
@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_rerank_bodies_of_peers(server: Server, expected: dict[int, float], path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{server.url}{path}", json={"query": QUERY} | body, timeout=60)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    check([(result["index"], result["relevance_score"]) for result in results], expected)
    assert answer.json()["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("field", [{"instruct": "another task"}, {"truncate_prompt_tokens": 100}, {"top_m": 3}])
def test_fields_that_would_change_scores_are_refused_rather_than_ignored(server: Server, field: dict[str, Any]) -> None:
    answer = httpx.post(f"{server.url}/rerank", json={"query": QUERY, "documents": DOCUMENTS} | field, timeout=60)
    assert answer.status_code == 422
    assert next(iter(field)) in answer.json()["message"]
