"""Another checkpoint in place of the one in service: nobody waits, nothing is mixed, a broken one changes nothing."""

import gc
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.checkpoint import load_checkpoint, load_manifest, save_checkpoint
from jaxslm.score.compiled import CompiledScorer
from jaxslm.score.scorer import Ranker
from jaxslm.score.warmup import compilations, uncounted_compilations
from jaxslm.serve import batcher
from jaxslm.serve.engine import _without_folder
from jaxslm.serve.run import Server
from jaxslm.serve.served import ServedModel
from jaxslm.serve.settings import CacheSettings, ServeSettings
from tests.compress.tiny_compressor import compressor_checkpoint
from tests.serve.tiny_server import ADMIN, metric, running
from tests.tiny import tiny_config, tiny_ranker_config

QUERY, ITEMS = "night nurse", ["a ward", "a developer"]
TEXTS = {"query": QUERY, "items": ITEMS}
BY_ID = {"query": "night nurse", "item_ids": ["kept"], "on_miss": "skip"}


@pytest.fixture(scope="module")
def checkpoints(files: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints by what is about them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    compressor_checkpoint(folder / "retrained", seed=5)
    compressor_checkpoint(folder / "pruned", tiny_config("llama", mlp_width=32), seed=6)
    damaged = shutil.copytree(files["model"], folder / "damaged")
    parameters = [path for path in (damaged / "params").rglob("*") if path.is_file()]
    victim = max(parameters, key=lambda path: path.stat().st_size)
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    good = load_checkpoint(Path(files["model"]), extra=["compressor"])
    tokenizer = dict(good.tokenizer_files)
    config = tiny_ranker_config(good.config.model, template="yes-no")
    save_checkpoint(folder / "text-only", config, good.params, tokenizer, source="random")
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, good.params)
    compressor = good.manifest.compressor
    save_checkpoint(
        folder / "nan", config, nan, tokenizer, source="random", extra=dict(good.extra), compressor=compressor
    )
    others = {"first": files["model"], "missing": str(folder / "no"), "null": "a\0b"}
    return {path.name: str(path) for path in folder.iterdir()} | others


@pytest.fixture(scope="module")
def reloadable(files: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own, with a store and a score cache."""
    store = str(tmp_path_factory.mktemp("store") / "lmdb")
    times: dict[str, Any] = {"deadline_ms": 120_000.0, "watchdog_s": 3600.0, "stall_s": 120.0}
    settings = ServeSettings(**files, **times, store=store, cache=CacheSettings())
    with running(settings) as server:
        gc.unfreeze()
        yield server


def reload(server: Server, model: str | None, headers: dict[str, str] = ADMIN) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/reload", json={"model": model}, headers=headers, timeout=300)


def score(server: Server, body: dict[str, Any] = TEXTS) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/score", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def put(server: Server) -> dict[str, Any]:
    body = {"items": [{"id": "kept", "text": "a job"}], "vectors_per_item": 2}
    content: dict[str, Any] = httpx.put(f"{server.url}/v1/items", json=body, headers=ADMIN, timeout=120).json()
    return content


@pytest.fixture
def first_model(reloadable: Server, checkpoints: dict[str, str]) -> Server:
    """The server with the first checkpoint in service."""
    if reloadable.service.engine.model.name != Path(checkpoints["first"]).name:
        assert reload(reloadable, checkpoints["first"]).status_code == 200
    return reloadable


def test_requests_end_with_the_model_that_they_began_with(
    first_model: Server, checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, old = first_model, first_model.service.engine.model
    expected = old.ranker.score_request(QUERY, ITEMS).log_odds
    manifest = load_manifest(Path(checkpoints["retrained"]))
    collect: Callable[..., None] = old.ranker.scorer.collect
    reached, released = threading.Event(), threading.Event()

    def held(*arguments: Any) -> None:
        reached.set()
        assert released.wait(120)
        collect(*arguments)

    monkeypatch.setattr(old.ranker.scorer, "collect", held)
    monkeypatch.setattr(old.preparer, "_cache", None)
    before = metric(server.url, "jaxslm_compilations_after_ready")
    with ThreadPoolExecutor(2) as threads:
        begun = threads.submit(score, server)
        assert reached.wait(60)
        reloading = threads.submit(reload, server, checkpoints["retrained"])
        while server.service.engine.model is old:
            assert not reloading.done(), reloading.result().text
        # The old model still holds a request; the new one answers meanwhile, and says who it is.
        answer = score(server)
        assert not begun.done()
        assert not reloading.done()
        released.set()
        np.testing.assert_allclose(begun.result()["logits"], expected, rtol=0, atol=4e-6)
        assert begun.result()["model"] == Path(checkpoints["first"]).name
        assert reloading.result().json()["params_sha256"] == manifest.params_sha256
    new = server.service.engine.model
    assert answer["model"] == "retrained"
    np.testing.assert_allclose(answer["logits"], new.ranker.score_request(QUERY, ITEMS).log_odds, rtol=0, atol=4e-6)
    assert np.abs(np.array(answer["logits"]) - expected).max() > 1e-3
    assert metric(server.url, "jaxslm_compilations_after_ready") == before


def test_a_new_model_finds_stale_records_and_forgets_cached_scores(
    first_model: Server, checkpoints: dict[str, str]
) -> None:
    server = first_model
    put(server)
    scores, by_id = score(server), score(server, BY_ID)
    assert by_id["status"] == ["embedding"]
    answer = reload(server, checkpoints["retrained"]).json()
    assert answer["model"] == "retrained"
    assert answer["stored_items"] == {"stale": 1}
    assert score(server)["logits"] != scores["logits"]
    assert score(server, BY_ID)["status"] == ["stale"]
    assert put(server)["encoded"] == 1
    assert score(server, BY_ID)["status"] == ["embedding"]
    # The same folder again: null names what was loaded last.
    again = reload(server, None).json()
    assert (again["model"], again["stored_items"]) == ("retrained", {"found": 1})


@pytest.mark.slow
def test_a_model_of_another_shape_compiles_beside_and_the_old_one_is_freed(
    first_model: Server, checkpoints: dict[str, str]
) -> None:
    server = first_model
    old = weakref.ref(first_model.service.engine.model.ranker)
    stop = threading.Event()
    seen: set[tuple[str, bool]] = set()

    def ask() -> None:
        while not stop.is_set():
            answer = score(server)
            seen.add((answer["model"], httpx.get(f"{server.url}/health/ready", timeout=60).status_code == 200))

    before = compilations()
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask)
        assert reload(server, checkpoints["pruned"]).status_code == 200
        score(server)
        stop.set()
        asking.result()
    assert {ready for _, ready in seen} == {True}
    assert compilations() == before
    assert old() is None


@pytest.mark.parametrize(
    ("which", "rule"),
    [
        ("missing", "model: not a checkpoint"),
        ("null", "null characters"),
        ("damaged", "is damaged"),
        ("text-only", "holds no compressor"),
        ("nan", "no finite numbers"),
    ],
)
def test_a_broken_checkpoint_changes_nothing(
    first_model: Server, checkpoints: dict[str, str], which: str, rule: str
) -> None:
    server, model, scores = first_model, first_model.service.engine.model, score(first_model)
    threads = threading.active_count()
    answer = reload(server, checkpoints[which])
    assert (answer.status_code, answer.json()["type"], answer.json()["param"]) == (400, "invalid_request", "model")
    assert rule in answer.json()["message"]
    assert "\n" not in answer.json()["message"]
    assert str(Path(checkpoints["missing"]).parent) not in answer.text
    assert server.service.engine.model is model
    assert score(server)["logits"] == scores["logits"]
    assert httpx.get(f"{server.url}/health/ready", timeout=60).status_code == 200
    assert threading.active_count() <= threads


@pytest.mark.parametrize("folder", [".", "m", "..", "tests/.."])
def test_a_short_name_of_a_folder_leaves_the_message_whole(first_model: Server, folder: str) -> None:
    answer = reload(first_model, folder)
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("model: not a checkpoint")


@pytest.mark.parametrize(
    ("folder", "message", "expected"),
    [
        ("/m", "/m: not a checkpoint: it has no /m/a.json", "model: not a checkpoint: it has no model/a.json"),
        ("/m", "/m/params is damaged, as is '/m'", "model/params is damaged, as is 'model'"),
        ("/m", "/mnt/m and /a/m stay, /m.old too", "/mnt/m and /a/m stay, /m.old too"),
        ("/a+(b)", "/a+(b)/x.", "model/x."),
    ],
)
def test_only_the_folder_itself_is_taken_out(folder: str, message: str, expected: str) -> None:
    assert _without_folder(message, folder) == expected


def test_a_device_that_fails_with_the_new_model_leaves_the_old_one(
    first_model: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory at /secret/path")

    before = score(first_model)
    with monkeypatch.context() as patch:
        patch.setattr(ServedModel, "warm_up", full)
        answer = reload(first_model, None)
    assert (answer.status_code, answer.json()["type"]) == (503, "reload_failed")
    assert "secret" not in answer.text
    assert score(first_model)["logits"] == before["logits"]


def test_a_device_that_hangs_with_the_new_model_keeps_no_reload_waiting(
    first_model: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first pass has as long as any, and a later reload is not refused for its sake."""
    engine, released = first_model.service.engine, threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "settings", engine.settings.model_copy(update={"stall_s": 0.2}))
        patch.setattr(Ranker, "warm_up", lambda *_: None)
        patch.setattr(CompiledScorer, "dispatch", lambda *_: released.wait(120))
        patch.setattr(batcher, "STOP_S", 0.1)
        answers = [reload(first_model, None) for _ in range(2)]
        released.set()
    assert [(answer.status_code, answer.json()["type"]) for answer in answers] == [(503, "reload_failed")] * 2


def test_one_reload_at_a_time_and_only_with_the_admin_key(first_model: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reload(first_model, None, {}).status_code == 401
    assert reload(first_model, None, {"x-api-key": "some-other-key"}).status_code == 401
    reached, released, warm_up = threading.Event(), threading.Event(), ServedModel.warm_up

    def slow(self: ServedModel, **options: Any) -> None:
        reached.set()
        assert released.wait(60)
        warm_up(self, **options)

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as threads:
        patch.setattr(ServedModel, "warm_up", slow)
        one = threads.submit(reload, first_model, None)
        assert reached.wait(60)
        other = reload(first_model, None)
        assert (other.status_code, other.json()["type"]) == (409, "reload_in_progress")
        released.set()
        assert one.result().status_code == 200


def test_what_other_threads_compile_meanwhile_is_counted() -> None:
    def compile_one(factor: float) -> None:
        jax.jit(lambda x: x * factor)(np.ones(3)).block_until_ready()

    before = compilations()
    with uncounted_compilations():
        compile_one(1.25)
        assert compilations() == before
        other = threading.Thread(target=compile_one, args=(2.25,))
        other.start()
        other.join()
        assert compilations() == before + 1
    compile_one(3.25)
    assert compilations() == before + 2
