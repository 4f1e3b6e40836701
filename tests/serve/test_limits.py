"""What hostile or broken clients get: a refusal with the one body, soon, and nobody else notices."""

import gzip
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from jaxslm.serve.run import Server
from tests.serve.tiny_server import ADMIN, metric

JSON = {"content-type": "application/json"}


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@contextmanager
def connection(server: Server) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        yield client


def until_closed(client: socket.socket) -> bytes:
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def head(path: str = "/v1/score", length: int = 10, extra: str = "") -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{extra}"
    return lines.encode()


@pytest.fixture(autouse=True)
def still_well(server: Server) -> Iterator[None]:
    """After each test the server answers, and nothing has broken inside."""
    yield
    assert httpx.post(f"{server.url}/v1/score", json={"query": "x", "items": ["y"]}, timeout=60).status_code == 200
    until = time.monotonic() + 60
    while metric(server.url, "jaxslm_num_requests_running") and time.monotonic() < until:
        time.sleep(0.05)
    assert metric(server.url, "jaxslm_num_requests_running") == 0
    assert server.service.engine.model.batcher.queued_tokens == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 422),
        (b"\xff\xfe", 400),
        (b'{"query": "x", "items": ["\\ud800"]}', 400),
        (b'{"query": "x", "items": [NaN]}', 422),
        (b'{"query": [1], "items": [[1]], "query_embed_overrides": [[NaN]]}', 422),
        (b'{"query": [1], "items": [[1]], "query_embed_overrides": [[Infinity]]}', 422),
        (b'{"query": [1], "items": [[1]], "query_embed_overrides": [[1e999]]}', 422),
        (b'{"query": "x", "items": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"query": "x", "items": [' + b'"",' * 200_000 + b'""]}', 413),
        (b'{"query": "x", "items": [' + b"1," * 400_000 + b"1]}", 422),
        (b'{"query": "x", "query": "y", "items": 5}', 422),
    ],
)
def test_broken_bodies(server: Server, body: bytes, status: int) -> None:
    answer = httpx.post(f"{server.url}/v1/score", content=body, headers=JSON, timeout=60)
    assert answer.status_code == status, answer.text[:500]
    assert answer.json()["code"] == status
    assert len(answer.content) < 2000
    assert "Traceback" not in answer.text
    assert "/" not in answer.json()["message"].replace("application/json", "")


def test_a_body_of_100_mb_is_refused_before_it_is_read(server: Server) -> None:
    with connection(server) as client:
        client.sendall(head(length=100_000_000) + b"\r\n")
        answer = until_closed(client)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"at most 1000000 bytes" in answer


def test_a_body_of_unknown_length_is_refused_once_it_is_too_long(server: Server) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 65536

    try:
        answer = httpx.post(f"{server.url}/v1/score", content=chunks(), headers=JSON, timeout=60)
        assert answer.status_code == 413
    except httpx.WriteError:  # the connection was closed while the client still sent
        pass


def test_bodies_of_another_type_are_refused(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/score", content=b"{}", headers={"content-type": "text/plain"}, timeout=60)
    assert answer.status_code == 415
    packed = gzip.compress(b'{"query": "x", "items": ["y"]}')
    answer = httpx.post(
        f"{server.url}/v1/score", content=packed, headers={**JSON, "content-encoding": "gzip"}, timeout=60
    )
    assert answer.status_code == 415
    assert "content-encoding" in answer.json()["message"]


def test_a_body_that_is_too_slow_is_refused(server: Server) -> None:
    with connection(server) as client:
        start = time.monotonic()
        client.sendall(head(length=100) + b"\r\n{")
        answer = until_closed(client)
        assert time.monotonic() - start < 30
    assert b" 408 " in answer


def test_clients_that_send_slowly_keep_nobody_else_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    admission = server.service.admission
    few = {"max_queued_requests": 2, "max_open_bodies": 4}
    with monkeypatch.context() as patch, ExitStack() as stack:
        patch.setattr(admission, "settings", admission.settings.model_copy(update=few))
        slow = [stack.enter_context(connection(server)) for _ in range(4)]
        for client in slow:
            client.sendall(head(length=100) + b"\r\n{")
            wait_for(lambda: admission._reading.number == admission.active.number > 0)
        wait_for(lambda: admission._reading.number == 4)
        answer = httpx.post(f"{server.url}/v1/score", json={"query": "x", "items": ["y"]}, timeout=60)
        assert (answer.status_code, answer.json()["type"]) == (429, "too_many_bodies")
        slow[0].close()
        wait_for(lambda: admission._reading.number == 3)
        answer = httpx.post(f"{server.url}/v1/score", json={"query": "x", "items": ["y"]}, timeout=60)
        assert answer.status_code == 200


def test_a_head_that_is_too_slow_is_cut_off(server: Server) -> None:
    with connection(server) as client:
        start = time.monotonic()
        client.sendall(b"POST /v1/score HTTP/1.1\r\n")
        assert until_closed(client) == b""
        assert time.monotonic() - start < 30


def test_a_head_that_is_too_long_is_refused(server: Server) -> None:
    with connection(server) as client:
        client.sendall(head(extra=f"x-long: {'a' * 70_000}\r\n") + b"\r\n")
        answer = until_closed(client)
    status = int(answer.split(b" ")[1])
    assert status in (400, 431)  # 400 if it does not come in one piece
    assert json.loads(answer.split(b"\r\n\r\n")[1])["code"] == status


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n"])
def test_what_is_no_http_is_refused(server: Server, data: bytes) -> None:
    with connection(server) as client:
        client.sendall(data)
        answer = until_closed(client)
    assert not answer or answer.startswith(b"HTTP/1.1 400")


def test_a_client_that_leaves_is_counted_and_its_request_dropped(server: Server) -> None:
    before = metric(server.url, "jaxslm_num_aborted_requests_total")
    body = json.dumps({"query": "x", "items": [f"the job {number}" for number in range(200)]}).encode()
    for half_closed in (False, True):
        with connection(server) as client:
            client.sendall(head(length=len(body)) + b"\r\n" + body)
            if half_closed:
                client.shutdown(socket.SHUT_WR)
                until_closed(client)
    until = time.monotonic() + 60
    while metric(server.url, "jaxslm_num_aborted_requests_total") < before + 1 and time.monotonic() < until:
        time.sleep(0.05)
    assert metric(server.url, "jaxslm_num_aborted_requests_total") > before


@pytest.mark.parametrize(
    "path",
    [
        "/v1/score/",
        "//v1/score",
        "/v1/../v1/score",
        "/v1/%2e%2e/v1/score",
        "/v1/score%00",
        "/page/../v1/score",
        "/page/%2e%2e/%2e%2e/etc/passwd",
        "/.env",
        "/V1/SCORE",
    ],
)
def test_only_the_documented_paths_are_there(server: Server, path: str) -> None:
    body = b'{"query": "x", "items": ["y"]}'
    with connection(server) as client:
        client.sendall(head(path, len(body), "connection: close\r\n") + b"\r\n" + body)
        answer = until_closed(client)
    assert answer.split(b" ")[1] in (b"404", b"405"), answer
    assert b"root:" not in answer


def test_wrong_methods_are_refused_with_what_is_allowed(server: Server) -> None:
    answer = httpx.get(f"{server.url}/v1/score", timeout=60)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json()["type"] == "method_not_allowed"
    answer = httpx.get(f"{server.url}/v1/items", headers=ADMIN, timeout=60)
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, PUT")


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_head_asks_as_get_does(server: Server, path: str) -> None:
    answer = httpx.head(f"{server.url}{path}", timeout=60)
    assert (answer.status_code, answer.content) == (200, b"")


def test_more_ids_than_items_are_allowed_are_refused(server: Server) -> None:
    ids = [f"i{number}" for number in range(201)]
    answer = httpx.request("DELETE", f"{server.url}/v1/items", json={"ids": ids}, headers=ADMIN, timeout=60)
    assert (answer.status_code, answer.json()["type"]) == (413, "too_many_items")


def test_openapi_says_which_keys_there_are(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    schemes = document["components"]["securitySchemes"]
    assert {each["type"] for each in schemes.values()} == {"http", "apiKey"}
    assert document["paths"]["/health/live"]["get"]["security"] == [{}]
    assert {name for each in document["paths"]["/v1/score"]["post"]["security"] for name in each} == set(schemes)
    assert httpx.get(f"{server.url}/redoc", timeout=60).status_code == 404


def test_a_request_id_that_could_break_a_log_is_replaced(server: Server) -> None:
    answer = httpx.get(f"{server.url}/health/live", headers={"x-request-id": "a b;{}"}, timeout=60)
    assert answer.headers["x-request-id"] != "a b;{}"
