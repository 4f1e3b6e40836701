"""Servers of tiny models: in this process on a free port, or in a process of their own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from jaxslm.serve.engine import Engine
from jaxslm.serve.run import Server
from jaxslm.serve.settings import Keys, ServeSettings
from tests.compress.tiny_compressor import compressor_checkpoint

ADMIN = {"authorization": "Bearer the-admin-key"}
KEYS = Keys(admin="the-admin-key")
BUCKETS = """
buckets = [
  {tokens = 512, rows = 32, prefix_tokens = 320, items_per_row = 1, item_tokens = 64},
  {tokens = 640, rows = 8, prefix_tokens = 320, items_per_row = 1, item_tokens = 320},
  {tokens = 512, rows = 32, prefix_tokens = 320, items_per_row = 1, item_tokens = 8, vectors_per_item = 2},
  {tokens = 640, rows = 8, prefix_tokens = 320, items_per_row = 1, item_tokens = 320, overrides_per_item = 6},
]
"""
"""Two shapes for texts of up to about 250 bytes, one for two vectors per item, one for overrides. The tiny
prompt takes 85 tokens."""


def write_files(folder: Path) -> dict[str, Any]:
    """Writes a checkpoint and buckets into an empty folder; returns the settings that name them."""
    compressor_checkpoint(folder / "model")
    (folder / "buckets.toml").write_text(BUCKETS)
    return {"model": str(folder / "model"), "buckets": str(folder / "buckets.toml"), "port": 0}


@contextmanager
def running(settings: ServeSettings, keys: Keys = KEYS) -> Iterator[Server]:
    """Yields a server that is ready, listening on its `url`; drains it afterwards."""
    server = Server(Engine(settings, keys))
    thread = threading.Thread(target=server.serve_until_signal)
    thread.start()
    try:
        wait_until_ready(server.url)
        yield server
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(30)
        assert not thread.is_alive()


def wait_until_ready(url: str, seconds: float = 300, path: str = "/health/ready") -> None:
    """Returns when the server at `url` says that it is ready, or live; a busy machine may take minutes to start one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if httpx.get(f"{url}{path}", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise TimeoutError(f"{url} is not ready after {seconds} s")


@contextmanager
def process(
    settings: dict[str, Any], log: Path, *, until_ready: bool = True
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yields `jaxslm serve` in a process of its own and its url, ready or only listening; kills it if it still runs."""
    options = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    environment = os.environ | {"JAXSLM_ADMIN_KEY": "the-admin-key", "JAX_PLATFORMS": "cpu"}
    with log.open("w") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "jaxslm.cli", "serve", *options],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            text=True,
        )
    try:
        url = _url(child, log)
        wait_until_ready(url, path="/health/ready" if until_ready else "/health/live")
        yield child, url
    finally:
        child.kill()
        child.communicate()


def _url(child: subprocess.Popen[str], log: Path, seconds: float = 300) -> str:
    until = time.monotonic() + seconds
    while time.monotonic() < until and child.poll() is None:
        for line in log_lines(log):
            if line["message"] == "listening":
                return str(line["url"])
        time.sleep(0.05)
    raise TimeoutError(f"the server does not listen:\n{log.read_text()}")


def log_lines(log: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a structured log."""
    return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def metric(url: str, name: str) -> float:
    """Returns the sum of a metric over its labels."""
    lines = httpx.get(f"{url}/metrics", headers=ADMIN).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def post(server: Server, path: str, body: Any, **options: Any) -> httpx.Response:
    """Sends a JSON body."""
    return httpx.post(f"{server.url}{path}", json=body, timeout=120, **options)


def ok(response: httpx.Response) -> dict[str, Any]:
    """Returns the body of a 200."""
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refused(response: httpx.Response, status: int) -> str:
    """Checks the one error body; returns its message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"object", "message", "type", "param", "code", "id"}
    assert body["object"] == "error"
    assert body["code"] == status
    assert body["id"] == response.headers["x-request-id"]
    return str(body["message"])
