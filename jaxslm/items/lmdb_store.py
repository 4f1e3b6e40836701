"""The embedded engine: LMDB, a folder. Readers never wait for the writer, writers of any process take turns.

Every `put` is a transaction that is on disk when it returns. A crash loses the transaction that was running and
nothing else, and a reader sees each transaction whole or not at all.

LMDB keeps a value that does not fit beside others in whole pages of 4,096 bytes (the first has 4,080): an int8 record
of 8 x 1,024 values would take three, the last one almost empty. Such a value is cut where a page ends: its tail lives
in a second table, among others.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from jaxslm.errors import InputError
from jaxslm.items.lmdb_pages import misses_pages
from jaxslm.items.store import Store, StoreUnavailable, id_of, key_of, required_key_of

_PAGE_HEADER_BYTES = 16
_FIRST_MAP_BYTES = 1 << 28
_MAX_READERS = 1024
_IDS_AT_ONCE = 10_000

Result = TypeVar("Result")


class LmdbStore(Store):
    """A folder with `data.mdb` and `lock.mdb`; a process opens it once. The map grows as it fills."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Opens the folder, and makes it unless `read_only`. Raises as `open_store`."""
        self.url = str(path)
        self._gate = _Gate()
        try:
            _check_folder(path, read_only)
            if not read_only:
                path.mkdir(parents=True, exist_ok=True)
            self._env = lmdb.open(
                str(path),
                map_size=_FIRST_MAP_BYTES,
                readonly=read_only,
                create=not read_only,
                mode=0o644,
                readahead=False,  # reads are scattered, and a store may be larger than memory
                meminit=False,
                max_readers=_MAX_READERS,
                max_dbs=2,
            )
        except (lmdb.Error, OSError) as error:
            raise StoreUnavailable(f"store {path}: {error}") from None
        try:
            self._page_bytes = self._env.stat()["psize"]
            self._check_whole(path / "data.mdb")
            if not read_only and self._env.stat()["entries"] > 2:
                raise InputError(f"store {path}: an LMDB folder of something else")
            self._heads = self._env.open_db(b"heads", create=not read_only)
            self._tails = self._env.open_db(b"tails", create=not read_only)
        except lmdb.NotFoundError:
            self._env.close()
            raise InputError(f"store {path}: an LMDB folder of something else") from None
        except (lmdb.Error, OSError) as error:
            self._env.close()
            raise StoreUnavailable(f"store {path}: {error}") from None

    def get(self, ids: Sequence[str]) -> list[bytes | None]:
        """See Store."""
        keys = [key_of(item_id) for item_id in ids]

        def read(transaction: Any) -> list[bytes | None]:
            return [key and self._read(transaction, key) for key in keys]

        return self._run(read)

    def put(self, records: Mapping[str, bytes]) -> None:
        """See Store. Waits while another process writes."""
        pairs = sorted((required_key_of(item_id), data) for item_id, data in records.items())

        def write(transaction: Any) -> None:
            for key, data in pairs:
                cut = self._cut(len(data))
                transaction.put(key, data[:cut], db=self._heads)
                if cut < len(data):
                    transaction.put(key, data[cut:], db=self._tails)
                else:
                    transaction.delete(key, db=self._tails)

        self._run(write, write=True)

    def renew(self, ids: Sequence[str]) -> None:
        """See Store. Nothing to do: records stay."""

    def delete(self, ids: Sequence[str]) -> int:
        """See Store."""
        keys = [key for item_id in ids if (key := key_of(item_id)) is not None]

        def remove(transaction: Any) -> int:
            for key in keys:
                transaction.delete(key, db=self._tails)
            return sum(transaction.delete(key, db=self._heads) for key in keys)

        return self._run(remove, write=True)

    def ids(self) -> Iterator[str]:
        """See Store. In the order of their bytes; no long transaction, which would keep old pages from being reused."""
        after = b""

        def read(transaction: Any) -> list[bytes]:
            cursor = transaction.cursor(db=self._heads)
            found = cursor.set_range(after + b"\0") if after else cursor.first()
            keys = cursor.iternext(keys=True, values=False) if found else iter(())
            return [key for _, key in zip(range(_IDS_AT_ONCE), keys, strict=False)]

        while keys := self._run(read):
            yield from map(id_of, keys)
            after = keys[-1]

    def count(self) -> int:
        """See Store."""
        return self._run(lambda transaction: int(transaction.stat(db=self._heads)["entries"]))

    def close(self) -> None:
        """See Store. Waits for the transactions of other threads."""
        with self._gate.alone():
            self._env.close()

    def _check_whole(self, file: Path) -> None:
        """Raises StoreUnavailable if the file ends before a page in use, which is asked only where it may."""
        needed = (self._env.info()["last_pgno"] + 1) * self._page_bytes
        found = file.stat().st_size  # after `needed`: a writer makes the file longer before it says so
        if found >= needed:
            return
        with self._env.begin() as transaction:
            cut = misses_pages(file, self._page_bytes, transaction.id())
        if cut:
            raise StoreUnavailable(f"store {self.url}: data.mdb is cut off, it has {found:,} of {needed:,} bytes")

    def _cut(self, size: int) -> int:
        """Returns where a value of `size` bytes is cut: before its last page if less than a quarter of that is full."""
        pages, rest = divmod(size + _PAGE_HEADER_BYTES, self._page_bytes)
        return size - rest if pages and rest < self._page_bytes // 4 else size

    def _read(self, transaction: Any, key: bytes) -> bytes | None:
        head: bytes | None = transaction.get(key, db=self._heads)
        if head is None or (len(head) + _PAGE_HEADER_BYTES) % self._page_bytes:
            return head
        return head + transaction.get(key, b"", db=self._tails)

    def _run(self, work: Callable[[Any], Result], *, write: bool = False) -> Result:
        """Returns what `work` returns; runs it again after the map was too small or all readers' slots were taken."""
        while True:
            try:
                map_bytes = self._env.info()["map_size"]
                with self._gate.transaction(), self._env.begin(write=write) as transaction:
                    return work(transaction)
            except lmdb.MapFullError:
                if not self._free_slots():
                    self._resize(map_bytes, 2 * map_bytes)
            except lmdb.MapResizedError:
                self._resize(map_bytes, 0)
            except lmdb.ReadersFullError as error:
                if not self._free_slots():
                    raise StoreUnavailable(f"store {self.url}: {error}") from None
            except lmdb.Error as error:
                raise StoreUnavailable(f"store {self.url}: {error}") from None

    def _free_slots(self) -> int:
        """Returns how many readers were killed since the last call: they kept their slots and the pages they read."""
        return int(self._env.reader_check())

    def _resize(self, map_bytes: int, new_bytes: int) -> None:
        """Sets the map's size, 0 for what the file says, unless another thread has done it since."""
        try:
            with self._gate.alone():
                if self._env.info()["map_size"] == map_bytes:
                    self._env.set_mapsize(new_bytes)
        except lmdb.Error as error:
            raise StoreUnavailable(f"store {self.url}: {error}") from None


class _Gate:
    """Lets any number of transactions run, or one change of the map, which must have the process to itself."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._closed = False

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            self._changed.wait_for(lambda: not self._running)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


def _check_folder(path: Path, read_only: bool) -> None:
    """Raises InputError unless `path` is a store, or a place for a new one."""
    if path.exists() and not path.is_dir():
        raise InputError(f"store {path}: must be a folder")
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()  # once: another process may add to it
    if "data.mdb" in names:
        return
    if read_only:
        raise InputError(f"store {path}: no such store; `jaxslm encode` makes one")
    if names - {"lock.mdb"}:  # LMDB makes this file first
        raise InputError(f"store {path}: a folder of something else")
