"""One server for the tests that change nothing of it."""

import gc
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from jaxslm.score.scorer import Ranker
from jaxslm.serve.run import Server
from jaxslm.serve.settings import ServeSettings
from tests.serve.tiny_server import running, write_files

UNOPTIMISED = jax.config.read("jax_disable_most_optimizations")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Servers run a program hundreds of times, so that wholly unoptimised ones cost more here than they save."""
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Tests of other folders go on as they would have."""
    jax.config.update("jax_disable_most_optimizations", UNOPTIMISED)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings that name a checkpoint with a compressor and buckets."""
    return write_files(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="session")
def server(files: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a store, an admin key, and a limit of 200 items and 1 MB."""
    store = str(tmp_path_factory.mktemp("store") / "lmdb")
    limits: dict[str, Any] = {"max_items": 200, "max_body_bytes": 1_000_000, "read_timeout_s": 2.0}
    # A busy machine may be slow.
    settings = ServeSettings(**files, **limits, store=store, deadline_ms=120_000.0, watchdog_s=3600.0, stall_s=120.0)
    with running(settings) as server:
        gc.unfreeze()
        yield server


@pytest.fixture
def ranker(server: Server) -> Ranker:
    """The ranker behind the server."""
    return server.service.engine.model.ranker
