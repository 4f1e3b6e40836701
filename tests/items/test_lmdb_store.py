"""The embedded engine among processes: growth, readers beside a writer, kill -9, a full disk, folders it cannot use."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxslm.errors import InputError
from jaxslm.items import lmdb_store
from jaxslm.items.store import Store, StoreUnavailable, open_store

ROOT = Path(__file__).parents[2]
Start = Callable[..., "subprocess.Popen[str]"]

WRITER = """
import sys
from jaxslm.items.store import open_store
with open_store(sys.argv[1]) as store:
    for number in range(int(sys.argv[2])):
        store.put({f"item-{n}": f"{number:08}".encode() * 1100 for n in range(50)})
        print(number, flush=True)
"""
READER = """
import sys
from jaxslm.items.store import open_store
ids = [f"item-{n}" for n in range(50)]
with open_store(sys.argv[1], read_only=True) as store:
    seen = set()
    print("open", flush=True)
    while f"{int(sys.argv[2]) - 1:08}" not in seen:
        found = store.get(ids)
        assert all(data is not None and len(data) == 8800 for data in found)
        [content] = {data for data in found}
        assert content == content[:8] * 1100
        seen.add(content[:8].decode())
    print(len(seen), flush=True)
"""


def start(code: str, *arguments: object, **options: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def rest(process: "subprocess.Popen[str]") -> str:
    """Waits for the end of a process; returns what it printed since the last `readline`."""
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read()
    process.wait()
    return output


def finish(process: "subprocess.Popen[str]") -> str:
    output = rest(process)
    assert process.returncode == 0, output
    return output


def file_bytes(store: Store) -> int:
    return (Path(store.url) / "data.mdb").stat().st_size


def test_the_map_grows_and_readers_of_other_processes_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_store, "_FIRST_MAP_BYTES", 1 << 17)
    with open_store(str(tmp_path)) as store:
        store.put({f"item-{n}": f"{0:08}".encode() * 1100 for n in range(50)})  # more than the whole map
        reader = start(READER, tmp_path, 2)
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
        for number in range(20):
            store.put({f"more-{number}-{n}": os.urandom(10_000) for n in range(20)})
        store.put({f"item-{n}": f"{1:08}".encode() * 1100 for n in range(50)})
        assert finish(reader) == "2\n"
        assert store.count() == 450
        assert file_bytes(store) > 32 << 17


def test_readers_of_other_processes_see_whole_transactions(tmp_path: Path) -> None:
    with open_store(str(tmp_path)) as store:
        store.put({f"item-{n}": b"start..." * 1100 for n in range(50)})
    readers = [start(READER, tmp_path, 300) for _ in range(2)]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
    finish(start(WRITER, tmp_path, 300))
    assert min(int(finish(reader)) for reader in readers) > 1


def test_writers_of_two_processes_take_turns(tmp_path: Path) -> None:
    writers = [start(WRITER, tmp_path, 100) for _ in range(2)]
    for writer in writers:
        finish(writer)
    with open_store(str(tmp_path)) as store:
        assert set(store.get([f"item-{n}" for n in range(50)])) == {b"00000099" * 1100}


def test_a_store_that_another_process_is_making_opens(tmp_path: Path) -> None:
    (tmp_path / "lock.mdb").write_bytes(b"")  # what LMDB makes first
    with open_store(str(tmp_path)) as store:
        store.put({"a": b"1"})
        assert store.get(["a"]) == [b"1"]


def test_a_killed_writer_loses_its_transaction_and_blocks_nobody(tmp_path: Path) -> None:
    for _ in range(3):
        writer = start(WRITER, tmp_path, 100_000)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "0\n"
        time.sleep(0.05)
        writer.send_signal(signal.SIGKILL)
        last = max([0, *map(int, rest(writer).split())])
        with open_store(str(tmp_path)) as store:
            [data] = set(store.get([f"item-{n}" for n in range(50)]))
            assert data is not None
            assert int(data[:8]) in (last, last + 1)
            assert data == data[:8] * 1100
            store.put({"other": b"1"})


STUCK_READER = """
import sys, time
from jaxslm.items.store import open_store
store = open_store(sys.argv[1], read_only=True)
with store._env.begin():
    print("open", flush=True)
    time.sleep(60)
"""


def kill_reader(path: Path) -> None:
    """Starts a process that reads, and kills it in the middle."""
    reader = start(STUCK_READER, path)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "open\n"
    reader.kill()
    rest(reader)


def test_killed_readers_do_not_make_the_file_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_store, "_FIRST_MAP_BYTES", 1 << 22)
    with open_store(str(tmp_path)) as store:
        store.put({f"item-{n}": os.urandom(9000) for n in range(50)})
        kill_reader(tmp_path)
        for _ in range(20):
            store.put({f"item-{n}": os.urandom(9000) for n in range(50)})
        assert file_bytes(store) <= 1 << 22


def test_killed_readers_give_their_slots_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_store, "_MAX_READERS", 2)
    with open_store(str(tmp_path)) as store:
        store.put({"a": b"1"})
        for _ in range(2):
            kill_reader(tmp_path)
        assert store.get(["a"]) == [b"1"]


def test_a_full_disk_is_one_error_and_what_was_there_stays(tmp_path: Path) -> None:
    full = """
import os, resource, sys
from jaxslm.items.store import StoreUnavailable, open_store
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
with open_store(sys.argv[1]) as store:
    store.put({"a": b"1"})
    try:
        store.put({f"item-{n}": os.urandom(9000) for n in range(200)})
    except StoreUnavailable as error:
        print(error)
    assert store.get(["a", "item-0"]) == [b"1", None]
    store.put({"b": b"2"})
"""
    assert f"store {tmp_path}: " in finish(start(full, tmp_path))
    with open_store(str(tmp_path)) as store:
        assert sorted(store.ids()) == ["a", "b"]


def test_a_folder_that_cannot_be_made_is_unavailable() -> None:
    with pytest.raises(StoreUnavailable, match="/proc/no/store: "):
        open_store("/proc/no/store")


def test_a_folder_without_permission_to_write_is_unavailable(tmp_path: Path) -> None:
    code = """
import os, sys
from jaxslm.items import lmdb_store  # noqa: F401 -- another user may not be allowed to read the interpreter's files
from jaxslm.items.store import StoreUnavailable, open_store
if not os.getuid():
    os.setuid(65534)  # permissions do not bind root
try:
    open_store(sys.argv[1])
except StoreUnavailable as error:
    print(error)
"""
    for folder in [tmp_path, *tmp_path.parents]:  # how many are pytest's depends on its number of processes
        folder.chmod(0o755)
        if folder.name.startswith("pytest-of-"):
            break
    (tmp_path / "store").mkdir(0o555)
    assert f"store {tmp_path}/store: " in finish(start(code, tmp_path / "store"))


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    import lmdb

    (tmp_path / "file").write_text("")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "manifest.json").write_text("{}")
    with lmdb.open(str(tmp_path / "other")) as other, other.begin(write=True) as transaction:
        for n in range(3):
            transaction.put(b"%d" % n, b"")
    for name, read_only, message in [
        ("file", False, "must be a folder"),
        ("checkpoint", False, "a folder of something else"),
        ("other", False, "an LMDB folder of something else"),
        ("other", True, "an LMDB folder of something else"),
        ("none", True, "no such store"),
        ("checkpoint", True, "no such store"),
    ]:
        with pytest.raises(InputError, match=message):
            open_store(str(tmp_path / name), read_only=read_only)
    assert not (tmp_path / "none").exists()
    assert len(list((tmp_path / "checkpoint").iterdir())) == 1


def test_a_damaged_file_is_unavailable(tmp_path: Path) -> None:
    with open_store(str(tmp_path)) as store:
        store.put({"a": b"1"})
    with (tmp_path / "data.mdb").open("r+b") as file:
        file.write(b"\0" * 8192)
    with pytest.raises(StoreUnavailable, match=f"store {tmp_path}: "):
        open_store(str(tmp_path))


@pytest.mark.parametrize("bytes_lost", [1, 4096, 500_000])
@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_that_is_cut_off_is_unavailable(tmp_path: Path, bytes_lost: int, read_only: bool) -> None:
    with open_store(str(tmp_path)) as store:
        store.put({f"item-{n}": b"x" * 8800 for n in range(100)})
    os.truncate(tmp_path / "data.mdb", (tmp_path / "data.mdb").stat().st_size - bytes_lost)
    with pytest.raises(StoreUnavailable, match=f"store {tmp_path}: data.mdb is cut off"):
        open_store(str(tmp_path), read_only=read_only)


def test_a_file_that_is_shorter_than_its_pages_but_whole_opens(tmp_path: Path) -> None:
    names = [f"{n:04}" for n in range(60)]
    with open_store(str(tmp_path)) as store:  # LMDB never writes the last page that this makes and frees
        store.put(dict.fromkeys(names[11:35], b"x" * 8800))
        store.put(dict.fromkeys(names[50:53], b"x" * 3000))
        store.delete(names[17:34])
        store.put(dict.fromkeys(names[13:53], b"x" * 10))
        assert file_bytes(store) < 4096 * (store._env.info()["last_pgno"] + 1)  # type: ignore[attr-defined]
    with open_store(str(tmp_path), read_only=True) as store:
        assert None not in store.get(names[11:53])


def test_a_closed_store_is_unavailable(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.close()
    with pytest.raises(StoreUnavailable):
        store.get(["a"])
