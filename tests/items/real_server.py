"""A real Valkey or Redis, whichever is installed, on a port of this machine."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest


def free_port() -> int:
    """Returns a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(port: int, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Returns a server that listens; skips the test if none is installed."""
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        pytest.skip("neither valkey-server nor redis-server is installed")
    command = [binary, "--bind", "127.0.0.1", "--save", "", "--dir", str(folder), *arguments]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.02)
    server.kill()
    pytest.fail(f"the server does not listen: {(folder / 'log').read_text()}")
