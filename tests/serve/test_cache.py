"""The score cache: what is fresh is not scored again, and a cache that fails is one that holds nothing."""

import time
from typing import Any

import httpx
import numpy as np
import pytest

from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.items.store import StoreUnavailable
from jaxslm.score.scorer import Ranker
from jaxslm.serve import cache as cache_module
from jaxslm.serve.cache import CachedScore, MemoryCache, SharedCache, score_key
from jaxslm.serve.metrics import Metrics
from jaxslm.serve.prepare import Preparer
from jaxslm.serve.run import Server
from jaxslm.serve.schemas import RerankRequest, ScoreRequest
from jaxslm.serve.settings import CacheSettings, ServeSettings
from tests.serve.tiny_server import metric, ok, post, running

SCORE = CachedScore(-0.5, 0.25, 17, truncated=True)


class FakeStore:
    """A dictionary that can be unplugged."""

    def __init__(self) -> None:
        self.records: dict[str, bytes] = {}
        self.there, self.calls = True, 0

    def get(self, ids: list[str]) -> list[bytes | None]:
        self._check()
        return [self.records.get(each) for each in ids]

    def put(self, records: dict[str, bytes]) -> None:
        self._check()
        self.records |= records

    def _check(self) -> None:
        self.calls += 1
        if not self.there:
            raise StoreUnavailable("gone")


def test_scores_are_forgotten_when_their_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    cache = MemoryCache(ttl_s=10.0, max_items=5)
    cache.put({"a": SCORE})
    now += 9.9
    assert cache.get(["a", "b"]) == [SCORE, None]
    now += 0.1
    assert cache.get(["a"]) == [None]


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = MemoryCache(ttl_s=1000.0, max_items=5)
    cache.put({"a": SCORE})
    for jump in (86_400.0, -86_400.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.8e9 + jump)
        assert cache.get(["a"]) == [SCORE]


def test_the_least_recently_used_scores_go_first() -> None:
    cache = MemoryCache(ttl_s=1000.0, max_items=2)
    cache.put({"a": SCORE, "b": SCORE})
    cache.get(["a"])
    cache.put({"c": SCORE})
    assert cache.get(["a", "b", "c"]) == [SCORE, None, SCORE]


def test_keys_differ_in_whatever_a_score_depends_on() -> None:
    vectors = np.arange(8.0, dtype=np.float32).reshape(2, 4)
    base: tuple[Any, ...] = ("model", "query", "item", None)
    others: list[tuple[Any, ...]] = [
        ("model2", "query", "item", None),
        ("model", "query2", "item", None),
        ("model", "query", "item2", None),
        ("model", "query", "item", 5),
        ("modelq", "uery", "item", None),
        ("model", "queryitem", "", None),
        ("model", "query", Item(id="1", title="a", text="item"), None),
        ("model", "query", Item(id="1", text="item"), None),
        ("model", "query", '[null, "item"]', None),
        ("model", "query", vectors, None),
        ("model", "query", vectors + 1, None),
    ]
    assert score_key(*base) == score_key(*base)
    assert len({score_key(*each) for each in (base, *others)}) == 1 + len(others)


def test_a_shared_cache_that_fails_holds_nothing_and_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    store, now = FakeStore(), 1000.0
    monkeypatch.setattr(cache_module, "open_store", lambda url: store)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    cache = SharedCache("redis://localhost:1/0", 60.0)
    cache.put({"a": SCORE})
    assert cache.get(["a", "b"]) == [SCORE, None]
    store.records["b"] = b"short"
    assert cache.get(["b"]) == [None]
    store.there = False
    assert cache.get(["a"]) == [None]
    calls = store.calls
    assert cache.get(["a"]) == [None]
    cache.put({"c": SCORE})
    assert store.calls == calls
    store.there = True
    now += 2 * cache_module.RETRY_S
    assert cache.get(["a"]) == [SCORE]


def known(preparer: Preparer, cache: MemoryCache, query: str, items: list[str]) -> None:
    """Puts scores of these items into the cache."""
    prepared = preparer.score(ScoreRequest(query=query, items=items))
    prepared.logits[:] = 0
    cache.put(prepared.scored())


def test_only_what_is_not_cached_counts_as_work(
    server: Server, ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, cache = server.service.engine, MemoryCache(ttl_s=1000.0, max_items=5)
    asked = []

    def wait_s(tokens: int) -> float:
        asked.append(tokens)
        return 0.0

    monkeypatch.setattr(engine, "cache", cache)
    monkeypatch.setattr(engine.model.preparer, "_cache", cache)
    monkeypatch.setattr(engine.model.batcher, "wait_s", wait_s)
    known(engine.model.preparer, cache, "q", ["a", "b"])
    answer = ok(post(server, "/v1/score", {"query": "q", "items": ["a", "new", "b"]}))
    encoded = ranker.prompt.encode("q", ["new"])
    assert asked == [len(encoded.prefix_ids) + len(encoded.item_ids[0])]
    assert answer["usage"]["total_tokens"] > asked[0]


def test_a_broken_item_keeps_its_number_when_others_are_cached(ranker: Ranker) -> None:
    cache = MemoryCache(ttl_s=1000.0, max_items=5)
    preparer = Preparer(ranker, Metrics(), 5, cache=cache)
    known(preparer, cache, "q", ["a", "b"])
    documents = ["a", "b", {"title": "x" * 2000, "text": "y"}]
    with pytest.raises(InputError, match=r"^item 2: title of"):
        preparer.rerank(RerankRequest.model_validate({"query": "q", "documents": documents}))


def test_a_server_does_not_score_again_what_it_knows(files: dict[str, Any]) -> None:
    settings = ServeSettings(**files, cache=CacheSettings())
    with running(settings) as server:
        url = f"{server.url}/v1/score"
        first = httpx.post(url, json={"query": "q", "items": ["a", "b"]}, timeout=60).json()
        scored = metric(server.url, "jaxslm_items_total")
        until = time.monotonic() + 30
        body = {"query": "q", "items": ["b", "a", "b"]}
        expected = [first["scores"][1], *first["scores"]]
        # The cache is filled behind the first answer.
        while (again := httpx.post(url, json=body, timeout=60).json())["scores"] != expected:
            assert time.monotonic() < until
        assert metric(server.url, "jaxslm_items_total") <= scored + 3
        hits = metric(server.url, "jaxslm_score_cache_total")
        answer = httpx.post(url, json=body, timeout=60).json()
        assert answer == again
        assert answer["usage"]["total_tokens"] > first["usage"]["total_tokens"]
        assert metric(server.url, "jaxslm_score_cache_total") == hits + 3
        other = httpx.post(url, json={"query": "q2", "items": ["a"]}, timeout=60).json()
        assert other["scores"][0] != first["scores"][0]
