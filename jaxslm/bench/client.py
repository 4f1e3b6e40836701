"""A client of an open-loop load: requests leave when they are due, whether or not earlier ones have been answered."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

TIMEOUT_S = 30.0
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand"
    " part place case week company system program question work government number night point home water room mother"
    " area money story fact month lot right study book eye job word business issue side kind head house service friend"
    " father power hour game line end member law car city name team minute idea body information back parent face"
    " others level office door health person art war history party result change morning reason research girl guy"
    " moment air teacher force education"
)
WORDS = tuple(_TEXT.split())
"""Common words, one token each in most vocabularies."""


@dataclass(frozen=True)
class TextTraffic:
    """Requests of random words. No two are alike, so that no cache answers them."""

    query_words: int
    item_words: int
    items: int

    def body(self, generator: np.random.Generator) -> dict[str, Any]:
        """Returns the body of one `/v1/score` request."""
        lengths = [self.query_words, *[self.item_words] * self.items]
        query, *items = (" ".join(generator.choice(WORDS, length).tolist()) for length in lengths)
        return {"query": query, "items": items}


@dataclass(frozen=True)
class StoredTraffic:
    """Requests for items of the server's store, drawn anew for each request."""

    ids: Sequence[str]
    items: int
    query_words: int = 4

    def body(self, generator: np.random.Generator) -> dict[str, Any]:
        """Returns the body of one `/v1/score` request."""
        chosen = generator.choice(len(self.ids), min(self.items, len(self.ids)), replace=False)
        query = " ".join(generator.choice(WORDS, self.query_words).tolist())
        return {"query": query, "item_ids": [self.ids[place] for place in chosen]}


@dataclass(frozen=True)
class Answer:
    """What became of one request.

    Attributes:
        status: of HTTP; 0 if there was no answer. due_s: when it was due, from the start of the load.
        latency_s: from when it was due to the end of its answer.
        late_s: from when it was due to when it was sent; a client that is too slow shows here.
        tokens: that the server says it scored.
    """

    status: int
    due_s: float
    latency_s: float
    late_s: float
    tokens: int


@dataclass(frozen=True)
class Target:
    """A server, and the key that it wants, if any."""

    url: str
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        key = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        return {"content-type": "application/json", **key}


def run_client(
    target: Target, traffic: TextTraffic | StoredTraffic, rate: float, seconds: float, seed: int, start_at: float
) -> list[Answer]:
    """Sends requests at random moments (a Poisson process) and returns their answers when all have come.

    Args:
        rate: requests per second, on average. start_at: `time.time()` of the first moment.
    """
    return asyncio.run(_run(target, traffic, rate, seconds, seed, start_at))


def poisson_arrivals(rate: float, seconds: float, generator: np.random.Generator) -> list[float]:
    """Returns the moments in [0, seconds) of a Poisson process of `rate` events per second."""
    arrivals: list[float] = []
    while (moment := (arrivals[-1] if arrivals else 0.0) + generator.exponential(1 / rate)) < seconds:
        arrivals.append(moment)
    return arrivals


async def _run(
    target: Target, traffic: TextTraffic | StoredTraffic, rate: float, seconds: float, seed: int, start_at: float
) -> list[Answer]:
    generator = np.random.default_rng(seed)
    due = poisson_arrivals(rate, seconds, generator)
    bodies = [json.dumps(traffic.body(generator)).encode() for _ in due]
    # The clock that is read from now on does not jump; the one that all processes share may.
    start = time.monotonic() + start_at - time.time()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=TIMEOUT_S, headers=target.headers) as client:
        sent = []
        for moment, body in zip(due, bodies, strict=True):
            await asyncio.sleep(start + moment - time.monotonic())
            sent.append(asyncio.create_task(_send(client, f"{target.url}/v1/score", body, start, moment)))
        return list(await asyncio.gather(*sent))


async def _send(client: httpx.AsyncClient, url: str, body: bytes, start: float, due_s: float) -> Answer:
    late_s = time.monotonic() - start - due_s
    status, tokens = 0, 0
    try:
        response = await client.post(url, content=body)
        status, tokens = response.status_code, int(response.headers.get("x-compute-tokens", 0))
    except httpx.TransportError:
        pass  # no answer: status 0
    return Answer(status, due_s, time.monotonic() - start - due_s, late_s, tokens)
