"""What every store promises, whichever engine keeps it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxslm.errors import InputError
from jaxslm.items.store import MAX_ID_BYTES, Store, StoreUnavailable, open_store


@pytest.fixture(params=["folder", "lmdb", "redis", "valkey"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    if request.param == "lmdb":
        return f"lmdb://{tmp_path}/a%20store"
    port = request.getfixturevalue("server")
    return f"{request.param}://127.0.0.1:{port}?prefix={tmp_path}:"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with open_store(url) as store:
        yield store


def test_what_is_put_is_got(store: Store) -> None:
    records = {"b": b"two", "a": b"one", "ä/?#\0 ": bytes(range(256)), "empty": b"", "tails": b"x", "x" * 511: b"long"}
    store.put(records)
    asked = [*records, "none", "a", "", "x" * 512]
    assert store.get(asked) == [*records.values(), None, b"one", None, None]
    assert sorted(store.ids()) == sorted(records)
    assert store.count() == len(records)
    assert store.get([]) == []


@pytest.mark.parametrize("size", [1, 2000, 4079, 4080, 4081, 5000, 8176, 8177, 8368, 12271, 12272, 12273, 99_999])
def test_values_of_every_size_replace_each_other(store: Store, size: int) -> None:
    def value(of: int) -> bytes:
        return bytes(n * 31 % 251 for n in range(of))

    for other in (1, 8176, 8368, 20_000):
        store.put({"a": value(other), "b": value(size)})
        assert store.get(["a", "b"]) == [value(other), value(size)]
        store.put({"a": value(size), "b": value(other)})
        assert store.get(["a", "b"]) == [value(size), value(other)]
    assert store.delete(["a"]) == 1
    assert store.get(["a", "b"]) == [None, value(20_000)]
    store.put({"a": value(8176)})  # nothing is left of what was there before
    assert store.get(["a"]) == [value(8176)]


def test_delete_says_how_many_there_were(store: Store) -> None:
    store.put({"a": b"1", "b": b"2", "c": b"3"})
    assert store.delete(["a", "none", "c", ""]) == 2
    assert list(store.ids()) == ["b"]
    assert store.delete(["a"]) == 0
    assert store.delete([]) == 0


def test_many_at_once(store: Store) -> None:
    records = {f"item-{n}": f"{n}".encode() * 20 for n in range(25_000)}
    store.put(records)
    assert store.count() == len(set(store.ids())) == len(records)
    assert store.get(list(records)) == list(records.values())


@pytest.mark.parametrize("item_id", ["", "ä" * (MAX_ID_BYTES // 2 + 1)])
def test_ids_that_no_store_holds_are_refused_and_nothing_is_put(store: Store, item_id: str) -> None:
    with pytest.raises(InputError, match="must have 1 to 511 bytes"):
        store.put({"good": b"1", item_id: b"2"})
    assert store.get(["good", item_id]) == [None, None]
    store.put({})
    assert store.count() == 0


def test_it_outlives_its_process(url: str) -> None:
    with open_store(url) as store:
        store.put({"a": b"1"})
    with open_store(url, read_only=True) as store:
        assert store.get(["a"]) == [b"1"]
        with pytest.raises(StoreUnavailable, match="read"):
            store.put({"a": b"2"})
        with pytest.raises(StoreUnavailable, match="read"):
            store.delete(["a"])
        assert store.get(["a"]) == [b"1"]


def test_threads_read_whole_transactions_while_one_writes(store: Store) -> None:
    ids = [f"item-{n}" for n in range(20)]
    store.put(dict.fromkeys(ids, b"0" * 9000))
    stop = threading.Event()
    problems: list[object] = []
    rounds = [0] * 4

    def read(number: int) -> None:
        while not stop.is_set():
            found = store.get(ids)
            if len({data and data[:4] for data in found}) != 1:
                problems.append(found)
            rounds[number] += 1

    readers = [threading.Thread(target=read, args=(number,)) for number in range(len(rounds))]
    for reader in readers:
        reader.start()
    for number in range(60):
        store.put(dict.fromkeys(ids, f"{number:04}".encode() * 2250))
    stop.set()
    for reader in readers:
        reader.join()
    assert not problems
    assert min(rounds) > 0


@pytest.mark.parametrize(
    "url", ["http://host/store", "sqlite:///x", "redis://host:port", "redis://h?ttl_s=0", "redis://h?x=1"]
)
def test_urls_that_name_no_store_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="store"):
        open_store(url)
