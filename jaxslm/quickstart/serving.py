"""The last stage: the server, one request of each kind, and, if wanted, the server for as long as someone is there."""

import json
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxslm.atomic import new_file
from jaxslm.bench.buckets import buckets_toml
from jaxslm.checkpoint import load_manifest
from jaxslm.data_files import read_items
from jaxslm.errors import InputError
from jaxslm.progress import console
from jaxslm.quickstart.stages import waiting
from jaxslm.score.buckets import few_buckets
from jaxslm.serve.engine import Engine
from jaxslm.serve.run import Server
from jaxslm.serve.settings import Keys, ServeSettings

QUERY = "python developer"
TEXTS = ("Writes web services in Python and reviews code.", "Drives a truck across the country.")
START_S = 600
STORED = 8
"""Stored postings that are scored: the first ones of the file."""


def try_server(model: Path, store: Path, items: Path, folder: Path, *, stay: bool) -> None:
    """Starts the server on a free port and sends it one request of each kind; keeps what it answered in `folder`.

    Args:
        stay: serve until Ctrl-C afterwards.

    Raises:
        InputError: the server refuses a request, or does not start.
    """
    settings = ServeSettings(
        model=str(model), store=str(store), items=str(items), port=0, buckets=str(_write_buckets(model, folder))
    )
    chosen = list(read_items(items).values())[:STORED]
    with _running(settings) as url:
        answers = {}
        for kind, route, body in _requests([item.id for item in chosen]):
            answers[kind] = {"path": route, "request": body, "answer": _post(url + route, body)}
        _show(answers, {item.id: item.title or item.text[:40] for item in chosen})
        path = folder / "served.json"
        path.unlink(missing_ok=True)
        with new_file(path) as staging:
            staging.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
        if stay:
            _stay(url)


def _requests(ids: Sequence[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """One of each kind: (what it is, path, body)."""
    return [
        ("texts", "/v1/score", {"query": QUERY, "items": list(TEXTS)}),
        ("stored postings, by id", "/v1/score", {"query": QUERY, "item_ids": list(ids)}),
        ("reranking, as other servers do it", "/v1/rerank", {"query": QUERY, "documents": list(TEXTS)}),
    ]


def _show(answers: dict[str, Any], names: dict[str, str]) -> None:
    texts, stored, reranked = (each["answer"] for each in answers.values())
    say = console().print
    for text, logit in zip(TEXTS, texts["logits"], strict=True):
        say(f"    log-odds {logit:+.2f} for '{QUERY}' and '{text}'")
    best = max(zip(stored["logits"], names.values(), strict=True))
    say(f"    of {len(names)} stored postings '{best[1]}' is best, log-odds {best[0]:+.2f}")
    say(f"    /v1/rerank puts document {reranked['results'][0]['index'] + 1} first")


@contextmanager
def _running(settings: ServeSettings) -> Iterator[str]:
    """Yields the address of a server that is ready; drains it afterwards."""
    server = Server(Engine(settings, Keys()))
    thread = threading.Thread(target=server.serve_until_signal, name="quickstart-server")
    thread.start()
    try:
        with waiting("the server compiles what it will run"):
            _wait_until_ready(server.url, thread)
        yield server.url
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join()


def _wait_until_ready(url: str, thread: threading.Thread) -> None:
    until = time.monotonic() + START_S
    while thread.is_alive() and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=10):
                return
        except (urllib.error.URLError, OSError):  # refused, or 503 while it warms up
            time.sleep(0.1)
    raise InputError(f"{url}: the server did not start; `jaxslm serve` says why")


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        with error:
            raise InputError(f"{url}: {error.code} {error.read().decode(errors='replace')[:300]}") from None


def _stay(url: str) -> None:
    console().print(f"[bold]Try it: {url}[/bold] in a browser, {url}/docs for programs. Ctrl-C stops the server.")
    try:
        _wait_for_ctrl_c()
    except KeyboardInterrupt:
        console().print("Stopping the server.")


def _wait_for_ctrl_c() -> None:
    threading.Event().wait()


def _write_buckets(model: Path, folder: Path) -> Path:
    """Writes the shapes that the server compiles as TOML, in place of an older one; returns the file."""
    manifest = load_manifest(model)
    path = folder / "buckets.toml"
    path.unlink(missing_ok=True)
    with new_file(path) as staging:
        buckets = few_buckets(jax.default_backend(), manifest.ranker, manifest.compressor)
        staging.write_text(buckets_toml(buckets, "What the quickstart's server compiles."), encoding="utf-8")
    return path
