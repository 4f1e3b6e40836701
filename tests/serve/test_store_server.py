"""A store on a server of its own that goes away and comes back, and what clients see of it."""

import time
from pathlib import Path
from typing import Any

import httpx

from jaxslm.serve.settings import ServeSettings
from tests.items.real_server import free_port, launch
from tests.serve.tiny_server import ADMIN, running


def score(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/score", json=body, timeout=120)


def put(url: str, item_id: str) -> dict[str, Any]:
    items = {"items": [{"id": item_id, "text": "a job"}]}
    answer: dict[str, Any] = httpx.put(f"{url}/v1/items", json=items, headers=ADMIN, timeout=120).json()
    return answer


def test_a_store_server_that_goes_away_and_comes_back(files: dict[str, Any], tmp_path: Path) -> None:
    """A real one: by id 503 while it is gone, texts as ever; what it still has afterwards is scored again."""
    port, options = free_port(), ("--appendonly", "yes", "--appendfsync", "always")
    store = launch(port, tmp_path, "--port", str(port), *options)
    try:
        settings = ServeSettings(**files, store=f"redis://127.0.0.1:{port}/0", deadline_ms=120_000.0)
        with running(settings) as server:
            assert put(server.url, "kept")["encoded"] == 1
            by_id = {"query": "x", "item_ids": ["kept"], "items": ["a job"], "on_miss": "text"}
            before = score(server.url, by_id)
            assert before.json()["status"] == ["embedding"]
            store.kill()
            store.wait()
            answer = score(server.url, by_id)
            assert (answer.status_code, answer.json()["type"]) == (503, "store_unavailable")
            assert int(answer.headers["retry-after"]) >= 1
            assert str(port) not in answer.text
            assert score(server.url, {"query": "x", "items": ["y"]}).status_code == 200
            assert httpx.get(f"{server.url}/health/ready", timeout=60).status_code == 200
            store = launch(port, tmp_path, "--port", str(port), *options)
            until = time.monotonic() + 60
            while score(server.url, by_id).status_code != 200:
                assert time.monotonic() < until
                time.sleep(0.05)
            assert score(server.url, by_id).json() == before.json()
            assert put(server.url, "new")["encoded"] == 1
    finally:
        store.kill()
        store.wait()
