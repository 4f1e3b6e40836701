"""Settings of the server. Imports no jax."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from jaxslm.config import ComputeDtype, NonEmpty, Positive, Settings
from jaxslm.errors import InputError
from jaxslm.items.record import StorageDtype

Seconds = Annotated[float, Field(gt=0)]


class CacheSettings(Settings):
    """Scores that are kept. Off unless the settings name it.

    Attributes:
        url: "memory", or redis:// or valkey:// for a cache that a fleet shares.
        ttl_s: a score is forgotten after so many seconds.
        max_items: how many a cache in memory holds; the least recently used go first.
    """

    url: Annotated[str, Field(pattern=r"^(memory|(rediss?|valkeys?)://.+)$")] = "memory"
    ttl_s: Seconds = 3600.0
    max_items: Positive = 1_000_000


class TracingSettings(Settings):
    """OpenTelemetry spans. Off unless the settings name it.

    Attributes:
        endpoint: where a collector takes OTLP over HTTP, with the path, as in http://127.0.0.1:4318/v1/traces.
    """

    endpoint: Annotated[str, Field(pattern=r"^https?://.+$")]


class ServeSettings(Settings):
    """What `jaxslm serve` can be told; times in the unit of their name.

    Attributes:
        model: checkpoint folder. model_name: what answers call every checkpoint; its folder's name if None.
        store: URL of the item store, if any. items: file of postings that the page at `/` ranks.
        host, port: where to listen; port 0 takes a free one.
        buckets: TOML of `jaxslm bench fit-buckets`, the shapes to compile; `jaxslm.serve.buckets.serving_buckets` if
            None.
        dtype: what scores are computed in; float32 on a CPU and bfloat16 elsewhere if None.
        max_batch_tokens: tokens that are sent to the device together; the largest bucket's, times devices, if None.
        max_wait_ms: how long a request may wait for others to share its forward pass.
        max_queued_requests: requests being prepared or waiting, beyond which new ones get 429. max_open_bodies: the
            same for requests whose body is still on its way; slow clients are many and cost little.
        deadline_ms: the time that a request has when it names none, and the most that it may ask for.
        max_items, max_body_bytes: larger requests get 413.
        read_timeout_s: a request whose head and body take longer is cut off.
        watchdog_s: an idle device is tried so often. stall_s: a pass that takes longer turns readiness off.
        drain_s: how long a stopping server waits for accepted requests.
        keys_file: API keys, one per line, # for comments; besides those of JAXSLM_API_KEYS.
        store_dtype: how `PUT /v1/items` stores vectors.
        cache: the score cache. tracing: where spans go.
    """

    model: NonEmpty
    model_name: NonEmpty | None = None
    store: NonEmpty | None = None
    items: NonEmpty | None = None
    host: NonEmpty = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    buckets: NonEmpty | None = None
    dtype: ComputeDtype | None = None
    max_batch_tokens: Positive | None = None
    max_wait_ms: Annotated[float, Field(ge=0)] = 2.0
    max_queued_requests: Positive = 256
    max_open_bodies: Positive = 2048
    deadline_ms: Annotated[float, Field(gt=0)] = 10_000.0
    max_items: Positive = 1000
    max_body_bytes: Positive = 16 * 2**20
    read_timeout_s: Seconds = 30.0
    watchdog_s: Seconds = 5.0
    stall_s: Seconds = 30.0
    drain_s: Seconds = 30.0
    keys_file: NonEmpty | None = None
    store_dtype: StorageDtype = "int8"
    cache: CacheSettings | None = None
    tracing: TracingSettings | None = None


class Keys(Settings):
    """Secrets, kept apart from the settings so that these can be printed. No keys: every caller may score."""

    api: frozenset[str] = frozenset()
    admin: str | None = None


def read_keys(keys_file: str | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """Returns the keys of the file, of JAXSLM_API_KEYS (separated by commas) and of JAXSLM_ADMIN_KEY.

    Raises:
        InputError: the file cannot be read or holds no key, or a key is shorter than 8 or has other than printable
            ASCII characters.
    """
    api = [key.strip() for key in environment.get("JAXSLM_API_KEYS", "").split(",") if key.strip()]
    if keys_file is not None:
        try:
            lines = Path(keys_file).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InputError(f"{keys_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"{keys_file}: invalid UTF-8") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise InputError(f"{keys_file}: holds no key; one per line")
        api += found
    admin = environment.get("JAXSLM_ADMIN_KEY") or None
    for key in (*api, *([admin] if admin else [])):
        if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError("API keys: each needs 8 or more printable ASCII characters without spaces")
    return Keys(api=frozenset(api), admin=admin)
