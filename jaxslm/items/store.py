"""Where records are kept under the ids of their items: one interface, two engines, chosen by URL.

    a folder, or lmdb:///folder     embedded: many readers beside one writer, in any number of processes
    redis:// rediss:// valkey://    a server that a fleet shares

A store keeps bytes and knows nothing of what they mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

from jaxslm.errors import InputError

MAX_ID_BYTES = 511
"""Longest item id in UTF-8, which is LMDB's longest key; the same for every engine, so that stores can be copied."""


class StoreUnavailable(Exception):  # noqa: N818 (a state of the store)
    """The store cannot be reached or failed: try again later or repair it. One line that names the store."""


class Store(ABC):
    """Bytes by item id. Safe for threads. Every method raises StoreUnavailable if the store fails.

    Attributes:
        url: how it was opened, without its password.
    """

    url: str

    @abstractmethod
    def get(self, ids: Sequence[str]) -> list[bytes | None]:
        """Returns per id what is kept under it, None if nothing; ids may repeat."""

    @abstractmethod
    def put(self, records: Mapping[str, bytes]) -> None:
        """Keeps all of these in one transaction, in place of what was there: after a crash all are there or none.

        Raises:
            InputError: an empty id, or one of more than MAX_ID_BYTES.
        """

    @abstractmethod
    def renew(self, ids: Sequence[str]) -> None:
        """Lets the time to live of what is there under these ids begin anew, where the store gives its records one."""

    @abstractmethod
    def delete(self, ids: Sequence[str]) -> int:
        """Removes what is there under these ids; returns how many there were."""

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """Yields the ids. Of those that are written or deleted meanwhile any may be missing."""

    @abstractmethod
    def count(self) -> int:
        """Returns the number of ids."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what the store holds; it must not be used afterwards."""

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_store(url: str, *, read_only: bool = False) -> Store:
    """Returns the store of a URL; a folder that does not exist is made, unless `read_only`.

    A server's URL is `SCHEME://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE][?OPTION=VALUE&...]` with the options
    `prefix` (of every key; "jaxslm:" by default), `ttl_s` (records are gone after so many seconds; by default they
    stay) and those of redis-py's `Redis.from_url`, such as `socket_timeout` in seconds or `ssl_ca_certs`.

    Raises:
        InputError: a URL of another kind or with a wrong option, or a folder that holds something else.
        StoreUnavailable: it cannot be opened or does not answer.
    """
    scheme = urlsplit(url).scheme if "://" in url else ""
    if scheme in ("redis", "rediss", "valkey", "valkeys"):
        from jaxslm.items.valkey_store import ValkeyStore

        return ValkeyStore(url, read_only=read_only)
    if scheme not in ("", "lmdb"):
        raise InputError(f"store {url}: must be a folder, or start with lmdb://, redis://, rediss:// or valkey://")
    from jaxslm.items.lmdb_store import LmdbStore

    path = Path(unquote(urlsplit(url).path)) if scheme else Path(url)
    return LmdbStore(path, read_only=read_only)


def key_of(item_id: str) -> bytes | None:
    """Returns the key of an item id in UTF-8; None for an id that no store can hold."""
    key = item_id.encode("utf-8", "surrogatepass")
    return key if 0 < len(key) <= MAX_ID_BYTES else None


def required_key_of(item_id: str) -> bytes:
    """Returns the key of an item id; raises InputError for an id that no store can hold."""
    key = key_of(item_id)
    if key is None:
        raise InputError(f"item id {item_id[:40]!r}: must have 1 to {MAX_ID_BYTES} bytes in UTF-8")
    return key


def id_of(key: bytes) -> str:
    """Returns the item id of a key."""
    return key.decode("utf-8", "surrogatepass")
