"""Scores over HTTP are the ranker's own, whatever else is asked at the same time; and what may be asked."""

import base64
import itertools
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxslm.config import Calibration
from jaxslm.errors import InputError
from jaxslm.items.record import Record, pack_record
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.head import vocab_logits
from jaxslm.model.layout import Rows
from jaxslm.score.forward import PackRequest
from jaxslm.score.scorer import Ranker, load
from jaxslm.serve.engine import Engine
from jaxslm.serve.errors import ApiError
from jaxslm.serve.metrics import Metrics
from jaxslm.serve.prepare import Preparer
from jaxslm.serve.run import Server
from jaxslm.serve.schemas import ScoreRequest
from jaxslm.serve.settings import Keys, ServeSettings
from tests.compress.tiny_compressor import compressor_checkpoint
from tests.serve.tiny_server import ADMIN, BUCKETS, metric, ok, post, refused

TOLERANCE = 1e-6
"""XLA adds up differently in passes of different shape or content: the same item in another pass differs in its last
bits, by up to about 6e-7 in its logit. The same request alone is bit-equal."""
WORDS = ["python", "developer", "nurse", "engineer", "job", "the", "ward", "é", "12", "night shift"]
LOREM = [" ".join(words) for words in itertools.permutations(WORDS, 3)]


@pytest.fixture(scope="module")
def stored(server: Server) -> dict[str, np.ndarray]:
    """Items that are in the store, with their vectors."""
    texts = {f"item-{number}": LOREM[7 * number] for number in range(12)}
    items = [{"id": item_id, "text": text} for item_id, text in texts.items()]
    answer = ok(
        httpx.put(f"{server.url}/v1/items", json={"items": items, "vectors_per_item": 2}, headers=ADMIN, timeout=120)
    )
    assert answer == {"encoded": 12, "unchanged": 0, "failed": [], "vectors_per_item": 2}
    catalogue = server.service.engine.model.catalogue
    assert catalogue is not None
    lookup = catalogue.lookup(list(texts))
    return {item_id: vectors for item_id, vectors in zip(texts, lookup.vectors, strict=True) if vectors is not None}


def test_scores_are_the_rankers_in_any_mix_of_concurrent_requests(
    server: Server, ranker: Ranker, stored: dict[str, np.ndarray]
) -> None:
    generator = np.random.default_rng(0)
    bodies: list[dict[str, Any]] = []
    expected = []
    for number in range(40):
        query = LOREM[number]
        if number % 4 == 0:
            ids = generator.choice(list(stored), generator.integers(1, 12)).tolist()
            bodies.append({"query": query, "item_ids": ids})
            expected.append(ranker.score_vectors(query, [stored[item_id] for item_id in ids]))
        else:
            items = generator.choice(LOREM, generator.integers(1, 15)).tolist()
            bodies.append({"query": query, "items": items})
            expected.append(ranker.score_request(query, items))
    before = metric(server.url, "jaxslm_compilations_after_ready")  # the ranker of this test compiles here too
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda body: ok(post(server, "/v1/score", body)), bodies))
    for answer, scores in zip(answers, expected, strict=True):
        np.testing.assert_allclose([yes for _, yes in answer["scores"]], scores.probabilities, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(answer["logits"], scores.log_odds, rtol=0, atol=4 * TOLERANCE)
        clear = np.abs(scores.log_odds[:, None] - scores.log_odds) > 8 * TOLERANCE
        logits = np.array(answer["logits"])
        assert ((logits[:, None] < logits) == (scores.log_odds[:, None] < scores.log_odds))[clear].all()
    assert metric(server.url, "jaxslm_compilations_after_ready") == before


def test_a_request_alone_is_bit_equal_to_the_ranker(server: Server, ranker: Ranker) -> None:
    """In logits and probabilities, on every route, with as many items as one batch takes."""
    generator = np.random.default_rng(1)
    for _ in range(24):
        query, items = LOREM[generator.integers(len(LOREM))], _items(generator, int(generator.integers(1, 8)))
        expected = ranker.score_request(query, items)
        yes = ranker.score(query, items).tolist()
        assert expected.probabilities.tolist() == yes
        answer = ok(post(server, "/v1/score", {"query": query, "items": items}))
        assert answer["usage"]["total_tokens"] <= server.service.engine.model.batcher.max_batch_tokens
        assert answer["logits"] == expected.log_odds.tolist()
        assert answer["scores"] == [[1 - p, p] for p in yes]
        results = ok(post(server, "/v1/rerank", {"query": query, "documents": items}))["results"]
        assert {each["index"]: each["relevance_score"] for each in results} == dict(enumerate(yes))


def _items(generator: np.random.Generator, number: int) -> list[str]:
    """Items of many lengths."""
    return [" ".join(generator.choice(WORDS, generator.integers(1, 15))) for _ in range(number)]


def test_an_sglang_body_of_token_ids_is_answered_in_its_shape(server: Server, ranker: Ranker) -> None:
    no, yes = ranker.label_token_ids
    rows = [[5, 17, 9], [3, 4]]
    body = {
        "query": [7, 8],
        "items": rows,
        "label_token_ids": [yes, no],
        "apply_softmax": True,
        "item_first": False,
        "model": "default",
    }
    answer = ok(post(server, "/v1/score", body))
    logits = ranker.label_logits([[7, 8, *row] for row in rows])
    expected = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    np.testing.assert_allclose(answer["scores"], np.stack([expected, 1 - expected], 1), rtol=0, atol=TOLERANCE)
    assert answer["object"] == "scoring"
    assert answer["pooled_hidden_states"] is None
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 7
    first = ok(post(server, "/v1/score", body | {"item_first": True}))
    logits = ranker.label_logits([[*row, 7, 8] for row in rows])
    np.testing.assert_allclose(first["logits"], logits[:, 1] - logits[:, 0], rtol=0, atol=4 * TOLERANCE)


def test_an_sglang_body_of_text_brings_its_own_prompt(server: Server, ranker: Ranker) -> None:
    query, items = "<|im_start|>Is this a job? ", ["nurse<|im_end|>", "banana", ""]
    labels = list(ranker.label_token_ids)
    body = {"query": query, "items": items, "label_token_ids": labels, "apply_softmax": True}
    logits = ranker.label_logits(ranker.prompt.raw_ids([query + item for item in items]))
    answer = ok(post(server, "/v1/score", body))
    np.testing.assert_allclose(answer["logits"], logits[:, 1] - logits[:, 0], rtol=0, atol=4 * TOLERANCE)
    assert answer["label_token_ids"] == labels


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_embeddings_as_base64_score_as_the_rankers_own(
    server: Server, ranker: Ranker, stored: dict[str, np.ndarray], dtype: str
) -> None:
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    vectors = np.stack(list(stored.values())[:3]).astype(kind)
    array = {"data": base64.b64encode(vectors.tobytes()).decode(), "dtype": dtype, "shape": list(vectors.shape)}
    answer = ok(post(server, "/v1/score", {"query": "python", "item_embeddings": array}))
    expected = ranker.score_vectors("python", vectors.astype(np.float32)).log_odds
    np.testing.assert_allclose(answer["logits"], expected, rtol=0, atol=4 * TOLERANCE)
    for change in ({"data": array["data"][:-8]}, {"shape": [3, 2, 31]}, {"shape": [10**9, 2, 32]}, {"data": "!"}):
        assert post(server, "/v1/score", {"query": "x", "item_embeddings": array | change}).status_code in (400, 413)
    broken = base64.b64encode(np.full((1, 2, 32), np.nan, "<f4").tobytes()).decode()
    array = {"data": broken, "dtype": "float32", "shape": [1, 2, 32]}
    assert "finite" in refused(post(server, "/v1/score", {"query": "x", "item_embeddings": array}), 400)


def test_misses_are_never_silently_scored(server: Server, ranker: Ranker, stored: dict[str, np.ndarray]) -> None:
    body = {"query": "python", "item_ids": ["item-1", "unknown", None], "items": ["x", "a nurse", "a ward"]}
    message = refused(post(server, "/v1/score", body), 404)
    assert "1 of 3" in message
    answer = ok(post(server, "/v1/score", body | {"on_miss": "text"}))
    assert answer["status"] == ["embedding", "not_found", "text"]
    np.testing.assert_allclose(
        answer["logits"][1:], ranker.score_request("python", ["a nurse", "a ward"]).log_odds, rtol=0, atol=1e-5
    )
    answer = ok(post(server, "/v1/score", body | {"on_miss": "skip"}))
    assert answer["status"] == ["embedding", "not_found", "text"]
    assert [score is None for score in answer["scores"]] == [False, True, False]
    assert answer["logits"][1] is None
    assert refused(post(server, "/v1/score", {"query": "x", "item_ids": ["no"], "on_miss": "text"}), 404)


def test_text_beside_vectors_is_never_the_text_of_a_miss(tmp_path: Path) -> None:
    path = compressor_checkpoint(tmp_path / "ckpt", text_fields=("title",), max_text_tokens=4)
    preparer = Preparer(load(path), Metrics(), 10)
    body = {"query": "python", "item_ids": ["item-1"], "items": ["a nurse"], "on_miss": "text"}
    with pytest.raises(ApiError, match=r"on_miss: must be .* read beside its vectors") as caught:
        preparer.score(ScoreRequest.model_validate(body))
    assert (caught.value.status, caught.value.param) == (400, "on_miss")


def test_stale_and_corrupt_records_are_named(server: Server, stored: dict[str, np.ndarray]) -> None:
    catalogue = server.service.engine.model.catalogue
    assert catalogue is not None
    store = catalogue._store
    (record,) = store.get(["item-2"])
    assert record is not None
    other_encoder = bytearray(record)
    other_encoder[20] ^= 1
    other_encoder[-4:] = zlib.crc32(other_encoder[:-4]).to_bytes(4, "little")
    store.put({"stale": bytes(other_encoder), "corrupt": record[:-9] + b"\0" + record[-8:]})
    body = {"query": "python", "item_ids": ["stale", "corrupt", "item-2"], "on_miss": "skip"}
    assert ok(post(server, "/v1/score", body))["status"] == ["stale", "corrupt", "embedding"]
    deleted = httpx.request("DELETE", f"{server.url}/v1/items", json={"ids": ["stale", "corrupt"]}, headers=ADMIN)
    assert deleted.json() == {"deleted": 2}


def test_an_item_that_cannot_be_scored_is_named_by_its_number_in_the_request(server: Server) -> None:
    """Though the items found in the store are prepared apart from the others."""
    catalogue = server.service.engine.model.catalogue
    assert catalogue is not None
    odd = Record(catalogue.encoder.identity, np.zeros((3, 32), np.float32), "0" * 64)
    catalogue._store.put({"odd": pack_record(odd, "float32")})
    body = {"query": "python", "item_ids": [None, "odd"], "items": ["x", "y"]}
    assert refused(post(server, "/v1/score", body), 400).startswith("item 1: 3 vectors")
    catalogue.delete(["odd"])


def test_items_get_as_many_vectors_as_the_shapes_take(server: Server, ranker: Ranker) -> None:
    """The compressor makes 1, 2 or 4; the compiled shapes take 2, and only what they take can be scored."""
    item = {"id": "by-default", "text": "a job"}
    answer = ok(httpx.put(f"{server.url}/v1/items", json={"items": [item]}, headers=ADMIN, timeout=120))
    assert (answer["encoded"], answer["vectors_per_item"]) == (1, 2)
    assert ok(post(server, "/v1/score", {"query": "python", "item_ids": ["by-default"]}))["status"] == ["embedding"]
    body = {"items": [item], "vectors_per_item": 4}
    message = refused(httpx.put(f"{server.url}/v1/items", json=body, headers=ADMIN, timeout=120), 400)
    assert message == "vectors_per_item: must be one of [2]"


def test_a_store_needs_shapes_that_take_its_vectors(files: dict[str, Any], tmp_path: Path) -> None:
    buckets = tmp_path / "buckets.toml"
    buckets.write_text(BUCKETS.replace("vectors_per_item = 2", "vectors_per_item = 3"))
    settings = ServeSettings(**files | {"buckets": str(buckets)}, store=str(tmp_path / "store"))
    with pytest.raises(InputError, match=r"^buckets: none takes vectors of this compressor \(k = 1, 2, 4\)"):
        Engine(settings, Keys(admin="the-admin-key"))


def test_buckets_without_one_for_text_are_refused(files: dict[str, Any], tmp_path: Path) -> None:
    """Before the server listens: what tries the device is text, as most bodies are."""
    buckets = tmp_path / "buckets.toml"
    buckets.write_text(re.sub(r"(item_tokens = \d+)}", r"\1, vectors_per_item = 2}", BUCKETS))
    with pytest.raises(InputError, match=r"^buckets: none takes text, [^\n]*$"):
        Engine(ServeSettings(**files | {"buckets": str(buckets)}), Keys())


def test_items_that_fail_or_have_not_changed_are_counted(server: Server, stored: dict[str, np.ndarray]) -> None:
    items = [{"id": "item-1", "text": LOREM[7]}, {"id": "empty", "text": "  "}, {"id": "new", "text": "a job"}]
    answer = httpx.put(f"{server.url}/v1/items", json={"items": items, "vectors_per_item": 2}, headers=ADMIN)
    body = ok(answer)
    assert (body["encoded"], body["unchanged"]) == (1, 1)
    assert [each["first_id"] for each in body["failed"]] == ["empty"]


def test_rerank_orders_documents(server: Server, ranker: Ranker) -> None:
    documents = LOREM[:9]
    answer = ok(post(server, "/v1/rerank", {"query": "night nurse", "documents": documents, "top_n": 4}))
    log_odds = ranker.score_request("night nurse", documents).log_odds
    best = np.argsort(-log_odds, kind="stable")[:4]
    assert [result["index"] for result in answer["results"]] == best.tolist()
    assert [result["document"]["text"] for result in answer["results"]] == [documents[place] for place in best]
    np.testing.assert_allclose([result["logit"] for result in answer["results"]], log_odds[best], rtol=0, atol=1e-5)
    raw = ok(post(server, "/rerank", {"query": "night nurse", "documents": documents, "use_activation": False}))
    assert [result["relevance_score"] for result in raw["results"]] == [each["logit"] for each in raw["results"]]
    cut = ok(post(server, "/v2/rerank", {"query": "x", "documents": ["a job " * 20, "b"], "max_tokens_per_doc": 5}))
    assert {result["index"]: result["truncated"] for result in cut["results"]} == {0: True, 1: False}
    assert all("document" not in result for result in cut["results"])


def test_answers_say_where_the_time_went(server: Server) -> None:
    response = post(server, "/v1/score", {"query": "x", "items": ["y"]}, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    parts = [float(response.headers[f"x-{part}-time"]) for part in ("tokenization", "queue", "inference", "response")]
    assert min(parts) >= 0
    assert sum(parts) <= float(response.headers["x-total-time"]) + 0.01
    tokens = len(server.service.engine.model.ranker.prompt.encode("x", ["y"]).item_ids[0])
    assert int(response.headers["x-compute-tokens"]) > tokens


def test_calibrated_scores_are_the_checkpoints(server: Server, ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"query": "night nurse", "items": ["a ward", "a job"]}
    assert ok(post(server, "/v1/score", body))["calibrated"] is None
    calibration = Calibration(method="platt", scale=0.5, bias=-1.0)
    monkeypatch.setattr(ranker, "manifest", ranker.manifest.model_copy(update={"calibration": calibration}))
    answer = ok(post(server, "/v1/score", body))
    expected = [1 / (1 + np.exp(1.0 - 0.5 * logit)) for logit in answer["logits"]]
    np.testing.assert_allclose(answer["calibrated"], expected, rtol=1e-6)
    assert answer["calibrated"] != [yes for _, yes in answer["scores"]]


def test_metrics_count(server: Server) -> None:
    names = ("jaxslm_items_total", "jaxslm_prompt_tokens_total", "jaxslm_num_requests_total")
    before = [metric(server.url, name) for name in names]
    tokens = ok(post(server, "/v1/score", {"query": "x", "items": ["y", "z"]}))["usage"]["total_tokens"]
    after = [metric(server.url, name) for name in names]
    assert after[0] - before[0] == 2
    assert after[1] - before[1] == tokens
    assert after[2] > before[2]
    assert metric(server.url, "jaxslm_queued_tokens") == metric(server.url, "jaxslm_num_requests_running") == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"query": "x", "items": []}, 200),
        ({"query": "x"}, 400),
        ({"query": "x", "items": None, "item_ids": None}, 400),
        ({"items": ["y"]}, 422),
        ({"query": " ", "items": ["y"]}, 400),
        ({"query": "x", "items": ["y", " "]}, 400),
        ({"query": "x", "items": [1]}, 422),
        ({"query": "x", "items": ["y"], "itms": 1}, 422),
        ({"query": "x", "items": ["y"], "item_ids": ["a", "b"]}, 400),
        ({"query": "x", "items": ["y"] * 201}, 413),
        ({"query": "x", "items": [""] * 201}, 413),
        ({"query": [1], "items": ["y"]}, 400),
        ({"query": "x", "items": [[1]]}, 400),
        ({"query": [1], "items": [[10**6]]}, 400),
        ({"query": [-1], "items": [[1]]}, 422),
        ({"query": [1], "items": [[1] * 4000]}, 400),
        ({"query": [], "items": [[]]}, 400),
        ({"query": "x", "items": ["y"], "label_token_ids": [10**6], "apply_softmax": True}, 400),
        ({"query": "x", "items": [], "label_token_ids": [10**6]}, 400),
        ({"query": "x", "items": ["y"], "label_token_ids": []}, 400),
        ({"query": "x", "items": ["y"], "label_token_ids": list(range(17))}, 400),
        ({"query": "x", "items": ["y"], "return_pooled_hidden_states": True}, 400),
        ({"query": "x", "items": ["y"], "item_first": True}, 400),
        ({"query": "x" * 5000, "items": ["y"]}, 400),
        ({"query": [1], "items": [[1]], "item_embed_overrides": [None]}, 400),
        ([], 422),
    ],
)
def test_rules_of_score_requests(server: Server, body: Any, status: int) -> None:
    response = post(server, "/v1/score", body)
    if status == 200:
        assert ok(response)["scores"] == []
    else:
        assert refused(response, status)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"items": [8, 9]}, 422, "items[0]: Input should be a valid string or a valid array"),
        ({"items": 5}, 422, "items: Input should be a valid string or a valid array"),
        ({"items": ["a", 5]}, 422, "items[1]: Input should be a valid string"),
        ({"items": [[1], [2, "a"]]}, 422, "items[1][1]: Input should be a valid integer"),
        ({"query": [1, -2]}, 422, "query[1]: Input should be greater than or equal to 0"),
        ({"items": ["y", " "]}, 400, "items[1]: has no text"),
        ({"query": " "}, 400, "query: must not be empty"),
        ({"item_embeddings": {"data": "", "dtype": "int8", "shape": [1, 1, 1]}}, 422, "item_embeddings.dtype: Input"),
        ({"item_embeddings": {"data": "", "more": 1}}, 422, "item_embeddings.dtype: Field required"),
    ],
)
def test_refusals_name_the_value_at_fault_in_one_line(
    server: Server, fields: dict[str, Any], status: int, message: str
) -> None:
    answer = post(server, "/v1/score", {"query": "x", "items": ["y"]} | fields)
    assert refused(answer, status).startswith(message)
    assert answer.json()["param"] == message.partition(":")[0]


def test_sglangs_default_scores_any_labels_among_the_whole_vocabulary(server: Server, ranker: Ranker) -> None:
    """Beside requests that ask for nothing of the kind, in the same passes, whose scores stay what they are."""
    no, yes = ranker.label_token_ids
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 256, (70, 9))  # more than are computed at once
    rows[:, :2] = 7, 8

    @jax.jit
    def logits(params: Params) -> jax.Array:
        layout = Rows(jnp.ones(rows.shape, bool))
        states: Any = Decoder(ranker.config.model).apply({"params": params}, jnp.asarray(rows), layout)
        return vocab_logits(states, params)

    vocabulary = np.asarray(logits(ranker.params), np.float64)
    before = metric(server.url, "jaxslm_compilations_after_ready")
    bodies: list[dict[str, Any]] = []
    expected = []
    for labels in ([yes, no], [no, yes], [yes], [17, 3], [yes, 5, no, 5], list(range(16))):
        for softmax in (None, False, True):
            part = np.sort(generator.choice(70, generator.integers(1, 71), replace=False))
            options = {} if softmax is None else {"apply_softmax": softmax}
            items = rows[part, 2:].tolist()
            bodies.append({"query": [7, 8], "items": items, "label_token_ids": labels} | options)
            expected.append((part, labels, bool(softmax)))
    with ThreadPoolExecutor(8) as threads:
        plain = threads.map(
            lambda query: ok(post(server, "/v1/score", {"query": query, "items": LOREM[:20]})), LOREM[:9]
        )
        answers = list(threads.map(lambda body: ok(post(server, "/v1/score", body)), bodies))
        assert metric(server.url, "jaxslm_compilations_after_ready") == before  # the ranker here may compile
        for query, answer in zip(LOREM, plain, strict=False):
            log_odds = ranker.score_request(query, LOREM[:20]).log_odds
            np.testing.assert_allclose(answer["logits"], log_odds, rtol=0, atol=4 * TOLERANCE)
    for (part, labels, softmax), answer in zip(expected, answers, strict=True):
        wanted = np.exp(vocabulary[part])
        wanted = wanted[:, labels] / (wanted[:, labels] if softmax else wanted).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(answer["scores"], wanted, rtol=1e-5)
        assert answer["label_token_ids"] == labels
        np.testing.assert_allclose(
            answer["logits"], vocabulary[part, yes] - vocabulary[part, no], rtol=0, atol=4 * TOLERANCE
        )


def test_vectors_in_the_batch_do_not_touch_texts(server: Server, ranker: Ranker) -> None:
    """The packer refuses mixtures of both; the batcher must never make one."""
    request = PackRequest([1, 2], [[3, 4, 5]])
    batcher = server.service.engine.model.batcher
    deadline = 1e12
    text = batcher.submit(request, deadline)
    vectors = batcher.submit(PackRequest([1, 2], [[0, 0, 5]], np.ones((1, 2, 32), np.float32)), deadline)
    assert not np.array_equal(text.future.result(60), vectors.future.result(60))
