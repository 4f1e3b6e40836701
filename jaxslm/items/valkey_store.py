"""The engine of a fleet: a Valkey or Redis server, through redis-py.

How much survives a crash of the server is the server's setting (`appendonly`); a batch is there whole or not at all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from jaxslm.errors import InputError
from jaxslm.items.store import Store, StoreUnavailable, id_of, key_of, required_key_of

try:
    import redis
except ModuleNotFoundError:
    raise InputError("stores on a server need the package redis: pip install 'jaxslm[valkey]'") from None

_SCHEMES = {"valkey": "redis", "valkeys": "rediss"}
_KEYS_AT_ONCE = 128
_SCAN_AT_ONCE = 1000
_TIMEOUT_S = 5.0

Result = TypeVar("Result")


class ValkeyStore(Store):
    """The keys of one server that start with a prefix. A pool of connections: threads do not wait for each other."""

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        """Connects. Args: url: see `open_store`. Raises as `open_store`."""
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        self._prefix = options.pop("prefix", "jaxslm:").encode()
        self._ttl_s = _positive_seconds(options.pop("ttl_s", None))
        self._read_only = read_only
        host = parts.netloc.rpartition("@")[2]
        self.url = f"{parts.scheme}://{host}{parts.path}"
        server = parts._replace(scheme=_SCHEMES.get(parts.scheme, parts.scheme), query=urlencode(options))
        try:
            self._client = redis.Redis.from_url(
                urlunsplit(server),
                socket_connect_timeout=_TIMEOUT_S,
                socket_timeout=_TIMEOUT_S,
                socket_keepalive=True,
                health_check_interval=30,
            )
            # What a connection does not know it refuses only when the first one is made.
            self._run(self._client.ping)
        except (ValueError, TypeError) as error:
            raise InputError(f"store {self.url}: {error}") from None

    def get(self, ids: Sequence[str]) -> list[bytes | None]:
        """See Store. One round trip."""
        keys = [key_of(item_id) for item_id in ids]
        asked = [self._prefix + key for key in keys if key is not None]

        def read() -> list[list[bytes | None]]:
            with self._client.pipeline(transaction=False) as pipeline:
                for start in range(0, len(asked), _KEYS_AT_ONCE):
                    pipeline.mget(asked[start : start + _KEYS_AT_ONCE])
                return pipeline.execute()

        found = iter([data for part in self._run(read) for data in part])
        return [None if key is None else next(found) for key in keys]

    def put(self, records: Mapping[str, bytes]) -> None:
        """See Store."""
        self._require_writable()
        pairs = [(self._prefix + required_key_of(item_id), data) for item_id, data in records.items()]

        def write() -> None:
            with self._client.pipeline(transaction=True) as pipeline:
                for key, data in pairs:
                    pipeline.set(key, data, ex=self._ttl_s)
                pipeline.execute()

        self._run(write)

    def renew(self, ids: Sequence[str]) -> None:
        """See Store. One round trip, none without `ttl_s`."""
        self._require_writable()
        ttl_s, keys = self._ttl_s, [self._prefix + key for item_id in ids if (key := key_of(item_id)) is not None]
        if ttl_s is None or not keys:
            return

        def expire() -> None:
            with self._client.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.expire(key, ttl_s)
                pipeline.execute()

        self._run(expire)

    def delete(self, ids: Sequence[str]) -> int:
        """See Store."""
        self._require_writable()
        keys = [self._prefix + key for item_id in ids if (key := key_of(item_id)) is not None]
        return self._run(lambda: int(self._client.unlink(*keys))) if keys else 0

    def ids(self) -> Iterator[str]:
        """See Store. An id may come twice while others write, as SCAN's keys do."""
        pattern = b"".join(b"\\" + bytes([byte]) if byte in b"*?[]\\^-" else bytes([byte]) for byte in self._prefix)
        keys = self._client.scan_iter(pattern + b"*", _SCAN_AT_ONCE)
        while (key := self._run(lambda: next(keys, None))) is not None:
            assert isinstance(key, bytes)
            yield id_of(key[len(self._prefix) :])

    def count(self) -> int:
        """See Store. Reads every key of the server's database, unless the prefix is empty."""
        return sum(1 for _ in self.ids()) if self._prefix else self._run(lambda: int(self._client.dbsize()))

    def close(self) -> None:
        """See Store."""
        self._client.close()

    def _require_writable(self) -> None:
        if self._read_only:
            raise StoreUnavailable(f"store {self.url}: opened for reading only")

    def _run(self, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except (redis.RedisError, OSError) as error:
            raise StoreUnavailable(f"store {self.url}: {error}") from None


def _positive_seconds(value: str | None) -> int | None:
    if value is None:
        return None
    if not value.isdecimal() or not int(value):
        raise InputError(f"store: ttl_s must be a whole number of seconds above 0, is {value!r}")
    return int(value)
