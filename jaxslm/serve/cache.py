"""Scores that are kept: an item that was scored for a query is not scored again while its score is fresh."""

import hashlib
import json
import logging
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

from jaxslm.data_files import Item
from jaxslm.items.store import StoreUnavailable, open_store
from jaxslm.serve.settings import CacheSettings

RETRY_S = 1.0
"""A cache server that failed is left alone for so long."""

logger = logging.getLogger(__name__)
_VALUE = struct.Struct("<ffI?")


@dataclass(frozen=True)
class CachedScore:
    """Logits of (no, yes) of one item, its number of tokens, and whether its text was cut."""

    no: float
    yes: float
    tokens: int
    truncated: bool


def score_key(model: str, query: str, item: str | Item | np.ndarray, limit: int | None) -> str:
    """Returns the name of an item's score: a hash of all that it depends on.

    Args:
        model: what identifies weights and prompt. item: its text, title and text, or vectors.
        limit: the most tokens of the text.
    """
    digest = hashlib.blake2b(digest_size=20)
    if isinstance(item, str):
        content = item.encode()
    elif isinstance(item, Item):
        content = json.dumps([item.title, item.text]).encode()
    else:
        content = np.ascontiguousarray(item, "<f4").tobytes()
    kind = type(item).__name__
    for part in (model.encode(), query.encode(), f"{kind} {limit}".encode(), content):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


class ScoreCache(ABC):
    """Scores by `score_key`. Safe for threads. A cache that fails is one that holds nothing."""

    @abstractmethod
    def get(self, keys: Sequence[str]) -> list[CachedScore | None]:
        """Returns per key its score, None if there is none that is fresh."""

    @abstractmethod
    def put(self, scores: Mapping[str, CachedScore]) -> None:
        """Keeps these scores from now on for their time to live."""


class MemoryCache(ScoreCache):
    """In this process; the least recently used scores go first."""

    def __init__(self, ttl_s: float, max_items: int) -> None:
        self._ttl_s, self._max_items = ttl_s, max_items
        self._scores: OrderedDict[str, tuple[float, CachedScore]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, keys: Sequence[str]) -> list[CachedScore | None]:
        """See ScoreCache."""
        now = time.monotonic()
        found: list[CachedScore | None] = []
        with self._lock:
            for key in keys:
                until, score = self._scores.get(key, (0.0, None))
                if score is not None and until <= now:
                    del self._scores[key]
                    score = None
                elif score is not None:
                    self._scores.move_to_end(key)
                found.append(score)
        return found

    def put(self, scores: Mapping[str, CachedScore]) -> None:
        """See ScoreCache."""
        until = time.monotonic() + self._ttl_s
        with self._lock:
            for key, score in scores.items():
                self._scores[key] = until, score
                self._scores.move_to_end(key)
            while len(self._scores) > self._max_items:
                self._scores.popitem(last=False)


class SharedCache(ScoreCache):
    """In a Valkey or Redis server, under keys of its own."""

    def __init__(self, url: str, ttl_s: float) -> None:
        """Raises InputError for a wrong URL and StoreUnavailable if nobody answers there."""
        options = f"prefix=jaxslm-score:&ttl_s={max(1, round(ttl_s))}&socket_timeout=0.25"
        self._store = open_store(f"{url}{'&' if urlsplit(url).query else '?'}{options}")
        self._resting_until = 0.0

    def get(self, keys: Sequence[str]) -> list[CachedScore | None]:
        """See ScoreCache."""
        if time.monotonic() < self._resting_until:
            return [None] * len(keys)
        try:
            found = self._store.get(keys)
        except StoreUnavailable as error:
            self._rest(error)
            return [None] * len(keys)
        whole = (data if data is not None and len(data) == _VALUE.size else None for data in found)
        return [None if data is None else CachedScore(*_VALUE.unpack(data)) for data in whole]

    def put(self, scores: Mapping[str, CachedScore]) -> None:
        """See ScoreCache."""
        if time.monotonic() < self._resting_until:
            return
        values = {key: _VALUE.pack(each.no, each.yes, each.tokens, each.truncated) for key, each in scores.items()}
        try:
            self._store.put(values)
        except StoreUnavailable as error:
            self._rest(error)

    def _rest(self, error: StoreUnavailable) -> None:
        logger.warning("score cache unavailable: %s", error)
        self._resting_until = time.monotonic() + RETRY_S


def open_cache(settings: CacheSettings) -> ScoreCache:
    """Returns the cache of the settings; raises as `SharedCache`."""
    if settings.url == "memory":
        return MemoryCache(settings.ttl_s, settings.max_items)
    return SharedCache(settings.url, settings.ttl_s)
