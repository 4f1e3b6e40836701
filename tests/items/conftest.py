"""A real server for the tests of stores: Valkey or Redis, whichever is installed, on a free port of this machine."""

import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.items.real_server import free_port, launch

Start = Callable[..., int]


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a server with these further arguments and returns its port; all of them end with the tests."""
    servers: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> int:
        port = free_port()
        listen = arguments if "--tls-port" in arguments else ("--port", str(port), *arguments)
        listen = tuple(str(port) if argument == "PORT" else argument for argument in listen)
        servers.append(launch(port, tmp_path_factory.mktemp("server"), *listen))
        return port

    yield start
    for server in servers:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def server(start_server: Start) -> int:
    """The port of a server without a password."""
    return start_server()
