"""The engine of a fleet against a real server: prefixes, time to live, passwords, TLS, a server gone or full."""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from jaxslm.compress.catalogue import encode_catalogue
from jaxslm.items.store import StoreUnavailable, open_store
from tests.items.fakes import FakeEncoder, items


def test_prefixes_keep_stores_apart(server: int) -> None:
    names = ["a:", "a*", "a?", "a[b]", "a\\\\", "ä^-", ""]
    stores = [open_store(f"redis://127.0.0.1:{server}/1?prefix={name.replace('?', '%3F')}") for name in names]
    for store, name in zip(stores[:-1], names, strict=False):
        store.put({"x": name.encode()})
    for store, name in zip(stores[:-1], names, strict=False):
        assert (list(store.ids()), store.get(["x"]), store.count()) == (["x"], [name.encode()], 1)
    assert stores[-1].count() == len(names) - 1
    assert sorted(stores[-1].ids()) == sorted(f"{name}x" for name in names[:-1])
    for store in stores:
        store.close()


def test_records_are_gone_after_their_time(server: int) -> None:
    url = f"redis://127.0.0.1:{server}/2"
    with open_store(url) as stay, open_store(f"{url}?ttl_s=1") as passing:
        stay.put({"a": b"1", "b": b"1"})
        passing.put({"b": b"2"})
        assert passing.get(["a", "b"]) == [b"1", b"2"]
        deadline = time.monotonic() + 10
        while stay.get(["b"]) != [None]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert stay.get(["a"]) == [b"1"]


def test_encoding_again_keeps_what_is_unchanged_alive(server: int) -> None:
    """A catalogue that is encoded more often than its records expire stays whole."""
    url = f"redis://127.0.0.1:{server}/3"
    with open_store(f"{url}?ttl_s=3") as store:
        encode_catalogue(FakeEncoder(), items(5), {2: store}, dtype="int8")
        with redis.Redis(port=server, db=3) as client:
            assert all(client.expire(key, 1) for key in client.scan_iter())
            summary = encode_catalogue(FakeEncoder(), items(4), {2: store}, dtype="int8")
            assert (summary.encoded, summary.unchanged) == (0, 4)
            left = {item: client.ttl(f"jaxslm:{item}") for item in store.ids()}
        assert all(left[item.id] >= 2 for item in items(4))
        assert left.get("item-4", 0) <= 1
    with open_store(url) as store:
        store.put({"stays": b"1"})
        store.renew(["stays", "item-0", "none", ""])
        with redis.Redis(port=server, db=3) as client:
            assert client.ttl("jaxslm:stays") == -1


def test_a_password_opens_and_is_never_shown(start_server: Callable[..., int]) -> None:
    port = start_server("--requirepass", "s3cret")
    with open_store(f"redis://:s3cret@127.0.0.1:{port}") as store:
        store.put({"a": b"1"})
        assert store.get(["a"]) == [b"1"]
        assert "s3cret" not in store.url
    for url in (f"redis://:wr0ng@127.0.0.1:{port}", f"redis://127.0.0.1:{port}"):
        with pytest.raises(StoreUnavailable, match=f"store redis://127.0.0.1:{port}: ") as caught:
            open_store(url)
        assert "wr0ng" not in str(caught.value)


def test_tls_is_checked_against_the_authority(start_server: Callable[..., int], tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    files = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(certificate))
    port = start_server("--port", "0", "--tls-port", "PORT", "--tls-auth-clients", "no", *files)
    with open_store(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}") as store:
        store.put({"a": b"1"})
        assert store.get(["a"]) == [b"1"]
    with pytest.raises(StoreUnavailable, match="certificate verify failed"):
        open_store(f"rediss://127.0.0.1:{port}")


def test_nobody_there_is_unavailable() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(StoreUnavailable, match=f"store valkey://127.0.0.1:{port}: "):
        open_store(f"valkey://127.0.0.1:{port}")


def test_a_silent_server_is_unavailable_within_its_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(StoreUnavailable, match="Timeout"):
            open_store(f"redis://127.0.0.1:{silent.getsockname()[1]}?socket_timeout=0.2")


def test_a_full_server_takes_all_of_a_batch_or_nothing(start_server: Callable[..., int]) -> None:
    port = start_server("--maxmemory", "8mb", "--maxmemory-policy", "noeviction")
    with open_store(f"redis://127.0.0.1:{port}") as store:

        def fill(batches: int) -> None:
            for _ in range(batches):
                count = store.count()
                store.put({f"item-{count + n}": b"x" * 9000 for n in range(50)})

        fill(10)
        with pytest.raises(StoreUnavailable, match=f"store redis://127.0.0.1:{port}: .*maxmemory"):
            fill(1000)
        assert store.count() % 50 == 0
