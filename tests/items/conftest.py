"""A real server for the tests of stores: Valkey or Redis, whichever is installed, on a free port of this machine."""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Start = Callable[..., int]


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a server with these further arguments and returns its port; all of them end with the tests."""
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        pytest.skip("neither valkey-server nor redis-server is installed")
    servers: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        folder = tmp_path_factory.mktemp("server")
        listen = arguments if "--tls-port" in arguments else ("--port", str(port), *arguments)
        listen = tuple(str(port) if argument == "PORT" else argument for argument in listen)
        command = [binary, "--bind", "127.0.0.1", "--save", "", "--dir", str(folder), *listen]
        with (folder / "log").open("wb") as log:
            servers.append(subprocess.Popen(command, stdout=log))
        wait_for(port, folder / "log")
        return port

    yield start
    for server in servers:
        server.kill()
        server.wait()


def wait_for(port: int, log: Path) -> None:
    """Returns when something listens."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    pytest.fail(f"the server does not listen: {log.read_text()}")


@pytest.fixture(scope="session")
def server(start_server: Start) -> int:
    """The port of a server without a password."""
    return start_server()
