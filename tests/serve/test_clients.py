"""Clients that teams have already: the official packages, and request bodies of vLLM, SGLang and Jina unchanged."""

import warnings
from typing import Any

import httpx
import numpy as np
import pytest

from jaxslm.score.scorer import Ranker
from jaxslm.serve.run import Server
from tests.serve.tiny_server import ok, post, refused

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
        fields = client.rerank(
            query=QUERY, documents=[{"text": text, "title": "left out"} for text in DOCUMENTS], rank_fields=["text"]
        )
    for results in (answer.results, fields.results):
        check([(result.index, result.relevance_score) for result in results], expected)
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


def test_jinas_own_client(server: Server, expected: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    jina = importing("jina_cli.api")
    monkeypatch.setattr(jina, "API_BASE", server.url)
    results = jina.rerank(QUERY, DOCUMENTS, api_key="unused-key", top_n=2)
    check([(result["index"], result["relevance_score"]) for result in results], expected, 2)
    assert [result["document"]["text"] for result in results] == [DOCUMENTS[place] for place in expected][:2]


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


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
        # vLLM: limits that nothing here reaches, parts of messages as one document each and in them.
        {
            "documents": DOCUMENTS,
            "mm_processor_kwargs": {},
            "chat_template_kwargs": {},
            "truncate_prompt_tokens": 300,
            "max_tokens_per_query": 30,
            "max_tokens_per_doc": 100,
        },
        {"query": {"content": parts(QUERY)}, "documents": {"content": parts(*DOCUMENTS)}},
        {"documents": [{"content": parts(text)} for text in DOCUMENTS]},
        # SGLang.
        {"documents": DOCUMENTS, "instruct": None, "top_n": None, "return_documents": True},
        {"query": parts(QUERY), "documents": [parts(text) for text in DOCUMENTS], "instruct": "the ranker's own"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_rerank_bodies_of_peers(server: Server, expected: dict[int, float], path: str, body: dict[str, Any]) -> None:
    if "instruct" in body:
        body |= {"instruct": body["instruct"] and server.service.engine.model.ranker.prompt.config.instruction}
    answer = ok(post(server, path, {"query": QUERY} | body))
    results = answer["results"]
    check([(result["index"], result["relevance_score"]) for result in results], expected)
    assert {result["document"]["text"] for result in results if "document" in result} <= set(DOCUMENTS)
    assert answer["usage"]["total_tokens"] > 0


def test_limits_of_a_row_cut_documents_alone(server: Server, ranker: Ranker) -> None:
    documents = ["a job " * 20, "b"]
    (long, short) = ranker.prompt.encode(QUERY, documents).item_ids
    whole = len(ranker.prompt.encode_query(QUERY)) + len(long)
    for tokens, cut in ((whole, False), (whole - 1, True), (whole - len(long) + len(short), True)):
        answer = ok(post(server, "/rerank", {"query": QUERY, "documents": documents, "truncate_prompt_tokens": tokens}))
        assert {result["index"]: result["truncated"] for result in answer["results"]} == {0: cut, 1: False}
    same = ok(post(server, "/rerank", {"query": QUERY, "documents": documents, "max_tokens_per_doc": len(" b")}))
    assert [result["logit"] for result in same["results"]] == [result["logit"] for result in answer["results"]]


DOCUMENT = "Input should be a valid string or an object or a valid array"


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"instruct": "another task"}, 400, "instruct", "trained with"),
        ({"instruction": ""}, 400, "instruction", "trained with"),
        ({"truncate_prompt_tokens": 50}, 400, "truncate_prompt_tokens", "query and prompt alone have"),
        ({"max_tokens_per_query": 1}, 400, "max_tokens_per_query", "never cut"),
        ({"mm_processor_kwargs": {"x": 1}}, 422, "mm_processor_kwargs", "at most 0 items"),
        ({"top_m": 3}, 422, "top_m", "not permitted"),
        ({"rank_fields": ["title"]}, 400, "rank_fields", '["text"]'),
        ({"documents": []}, 400, "documents", "at least one"),
        ({"documents": ["a", " "]}, 400, "documents[1]", "has no text"),
        ({"documents": ["a", {"text": "", "title": "a title"}, {"text": " "}]}, 400, "documents[2]", "has no text"),
        ({"documents": ["a", {"title": "b"}]}, 422, "documents[1].text", "Field required"),
        ({"documents": ["a", 5]}, 422, "documents[1]", DOCUMENT),
        ({"documents": ["a", [{"type": "image_url", "image_url": {}}]]}, 422, "documents[1][0].type", "'text'"),
        ({"query": " "}, 400, "query", "must not be empty"),
        ({"query": None}, 422, "query", DOCUMENT),
    ],
)
def test_fields_that_would_change_scores_are_refused_rather_than_ignored(
    server: Server, fields: dict[str, Any], status: int, param: str, message: str
) -> None:
    answer = post(server, "/rerank", {"query": QUERY, "documents": DOCUMENTS} | fields)
    said = refused(answer, status)
    assert said.startswith(f"{param}: ")
    assert message in said
    assert answer.json()["param"] == param
