"""`jaxslm bench serve`: how many items per second a running server scores with 99 % of its answers within 500 ms, or
another target for a slow machine.

The load is open: requests leave at random moments whether or not earlier ones were answered, as users' do, and latency
counts from the moment at which a request was due. A client that waits for answers before it sends more would hide the
very queue that it makes (coordinated omission).
"""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from jaxslm.bench.client import TIMEOUT_S, Answer, StoredTraffic, Target, TextTraffic, run_client
from jaxslm.bench.workloads import WORKLOADS, Workload
from jaxslm.data_files import read_items
from jaxslm.errors import InputError
from jaxslm.progress import console

TARGET_SHARE = 0.99
GROWTH = 1.5
MAX_STEPS = 30
MIN_REQUESTS = 5  # a rate that brings fewer is none
REFINEMENTS = 2
LEAD_S = 1.0  # from when clients are told of a step to its first moment
STORED = "stored"
STORED_ITEMS = 50
PROBES = 5
_MODEL_INFO = re.compile(r"^jaxslm_model_info\{(.*)\} ", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
TEXT_WORKLOADS = tuple(name for name, workload in WORKLOADS.items() if not workload.vectors_per_item)


@dataclass(frozen=True)
class LoadOptions:
    """How to load a server.

    Attributes:
        clients: processes that send. seconds: that each rate is kept. start_rate: first requests per second; a fifth of
            what one request after the other reaches if None. target_ms: within which TARGET_SHARE must be answered.
    """

    clients: int = 2
    seconds: float = 15.0
    start_rate: float | None = None
    target_ms: float = 500.0


@dataclass(frozen=True)
class Traffic:
    """A named kind of request and what a few of them showed: their tokens, and seconds from sent to answered."""

    name: str
    requests: TextTraffic | StoredTraffic
    items: int
    tokens: float
    alone_s: float


def bench_serve(
    target: Target, workloads: Sequence[str], items: Path | None, options: LoadOptions | None = None
) -> dict[str, Any]:
    """Loads a running server with each workload and returns a result file for `jaxslm report`.

    Its `items_per_s` is the first workload's, None if no rate met the target; `dtype` and `device` are None if the
    server does not say what they are.

    Args:
        workloads: names of `WORKLOADS` without vectors, or "stored": 50 items a request by their ids.
        items: the items that the server's store holds; for "stored".

    Raises:
        InputError: an unknown workload, no items for "stored", or a server that does not answer or refuses a request.
    """
    options = options or LoadOptions()
    ids = None if items is None else list(read_items(items))
    for name in workloads:
        if name not in (*TEXT_WORKLOADS, STORED):
            raise InputError(f"--workload {name}: must be one of {', '.join((*TEXT_WORKLOADS, STORED))}")
        if name == STORED and ids is None:
            raise InputError("--workload stored: needs --items, the items that the server's store holds")
    rows, load = [], []
    with _clients(options.clients) as pool:
        for name in workloads:
            traffic = stored_traffic(target, ids or []) if name == STORED else text_traffic(target, WORKLOADS[name])
            row, steps = find_capacity(pool, target, traffic, options)
            rows.append(row)
            load += steps
    about = _about(target)
    conditions = {
        "url": target.url,
        **about,
        "target": f"{TARGET_SHARE:.0%} of requests answered within {options.target_ms:g} ms of when they were due",
        "arrivals": "Poisson, open loop",
        "client_processes": options.clients,
        "seconds_per_rate": options.seconds,
    }
    first = {"workload": ", ".join(workloads), **about, "items_per_s": rows[0].get("items_per_s")}
    return {**first, "rows": rows, "load": load, "conditions": conditions}


def find_capacity(
    pool: ProcessPoolExecutor, target: Target, traffic: Traffic, options: LoadOptions
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Raises the rate until the target is missed, then narrows it down; returns the row and every step, in order.

    If the first rate misses already, it is halved until one meets the target or brings too few requests to tell.
    """
    steps: list[dict[str, Any]] = []

    def passes(rate: float) -> bool:
        answers = _load(pool, target, traffic, rate, options, seed=len(steps))
        step, passed = _measured(traffic, rate, options, answers)
        steps.append(step)
        _print_step(step, passed)
        return passed

    rate = options.start_rate or 0.2 / traffic.alone_s
    console().print(
        f"{traffic.name}: {traffic.items} items and {traffic.tokens:.0f} tokens a request,"
        f" {1000 * traffic.alone_s:.1f} ms alone",
        soft_wrap=True,
    )
    best, missed = None, None
    while missed is None and len(steps) < MAX_STEPS:
        if passes(rate):
            best, rate = len(steps) - 1, rate * GROWTH
        else:
            missed = rate
    while best is None and missed is not None and missed / 2 * options.seconds >= MIN_REQUESTS:
        if passes(missed / 2):
            best = len(steps) - 1
        else:
            missed /= 2
    if best is not None and missed is not None:
        for _ in range(REFINEMENTS):
            between = math.sqrt(steps[best]["requests_per_s"] * missed)
            if passes(between):
                best = len(steps) - 1
            else:
                missed = between
    row = {"name": f"{traffic.name} over HTTP", "workload": traffic.name, "items_per_request": traffic.items}
    row["tokens_per_request"] = traffic.tokens
    if best is not None:
        kept = ("items_per_s", "requests_per_s", "p50_ms", "p95_ms", "p99_ms", "errors")
        row |= {name: steps[best][name] for name in kept}
    return row, steps


def text_traffic(target: Target, workload: Workload, seed: int = 0) -> Traffic:
    """Returns requests of random words that have a workload's tokens, as far as the server's prompt leaves room.

    How many words that takes, the server itself says: it answers with the tokens that it scored. Tokens are linear in
    words, and four requests give the slopes and what the prompt adds.
    """

    def tokens(query_words: int, item_words: int, items: int = 1) -> int:
        return _probe(target, TextTraffic(query_words, item_words, items), seed)[0]

    single = tokens(1, 1)
    per_item = tokens(1, 1, 2) - single
    per_query_word = (tokens(41, 1) - single) / 40
    per_item_word = (tokens(1, 41) - single) / 40
    if min(per_item, per_query_word, per_item_word) <= 0:
        raise InputError(
            f"{target.url}: does not say in x-compute-tokens how many tokens it scored, or cuts items of 41"
        )
    query_words = 1 + round((workload.prefix_tokens - (single - per_item)) / per_query_word)
    item_words = 1 + round((workload.item_tokens - per_item) / per_item_word)
    requests = TextTraffic(max(1, query_words), max(1, item_words), workload.items)
    return _traffic(target, workload.name, requests, workload.items)


def stored_traffic(target: Target, ids: Sequence[str]) -> Traffic:
    """Returns requests for items of the store."""
    number = min(STORED_ITEMS, len(ids))
    return _traffic(target, STORED, StoredTraffic(tuple(ids), number), number)


def _traffic(target: Target, name: str, requests: TextTraffic | StoredTraffic, items: int) -> Traffic:
    probes = [_probe(target, requests, seed) for seed in range(PROBES)]
    tokens, seconds = np.array(probes).T
    return Traffic(name, requests, items, float(tokens.mean()), float(np.median(seconds)))


def _probe(target: Target, requests: TextTraffic | StoredTraffic, seed: int) -> tuple[int, float]:
    """Returns the tokens of one request, and the seconds to its answer."""
    body = requests.body(np.random.default_rng(seed))
    start = time.monotonic()
    response = _post(target, body)
    return int(response.headers.get("x-compute-tokens", 0)), time.monotonic() - start


def _about(target: Target) -> dict[str, str | None]:
    """Returns the server's model, dtype and device, as its answers and its metrics name them."""
    model = _post(target, {"query": "time", "items": ["work"]}).json()["model"]
    about: dict[str, str | None] = {"model": model, "dtype": None, "device": None}
    try:
        metrics = httpx.get(f"{target.url}/metrics", headers=target.headers, timeout=TIMEOUT_S)
    except httpx.TransportError:
        return about
    if found := _MODEL_INFO.search(metrics.text):
        labels = {name: json.loads(f'"{value}"') for name, value in _LABEL.findall(found[1])}
        about |= {name: labels.get(name) for name in ("dtype", "device")}
    return about


def _post(target: Target, body: dict[str, Any]) -> httpx.Response:
    try:
        response = httpx.post(f"{target.url}/v1/score", json=body, headers=target.headers, timeout=TIMEOUT_S)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise InputError(f"{target.url}: does not answer ({error})") from None
    if response.status_code != httpx.codes.OK:
        raise InputError(f"{target.url}: answered {response.status_code}: {response.text[:200]}")
    return response


@contextmanager
def _clients(number: int) -> Iterator[ProcessPoolExecutor]:
    """Yields processes that have been started and have imported what they need."""
    with ProcessPoolExecutor(number, get_context("spawn")) as pool:
        list(pool.map(time.sleep, [LEAD_S] * number))
        yield pool


def _load(
    pool: ProcessPoolExecutor, target: Target, traffic: Traffic, rate: float, options: LoadOptions, seed: int
) -> list[Answer]:
    """Keeps one rate for a while; returns all answers. Independent Poisson processes add up to one."""
    start, share = time.time() + LEAD_S, rate / options.clients
    seeds = range(seed * options.clients, (seed + 1) * options.clients)
    runs = [
        pool.submit(run_client, target, traffic.requests, share, options.seconds, 1000 + each, start) for each in seeds
    ]
    return [answer for run in runs for answer in run.result()]


def _measured(
    traffic: Traffic, rate: float, options: LoadOptions, answers: Sequence[Answer]
) -> tuple[dict[str, Any], bool]:
    """Returns a step's figures, and whether it met the target; a request that failed has missed it."""
    scored = np.array([1000 * answer.latency_s for answer in answers if answer.status == httpx.codes.OK])
    errors = Counter("no answer" if not a.status else str(a.status) for a in answers if a.status != httpx.codes.OK)
    # What the server still owed when the last request was sent takes its time too.
    took = max([options.seconds, *(answer.due_s + answer.latency_s for answer in answers)])
    step: dict[str, Any] = {
        "workload": traffic.name,
        "offered_items_per_s": rate * traffic.items,
        "requests_per_s": rate,
        "requests": len(answers),
        "items_per_s": len(scored) * traffic.items / took,
        "errors": dict(errors),
        "late_p99_ms": float(np.quantile([1000 * answer.late_s for answer in answers] or [0.0], 0.99)),
    }
    for percent in (50, 95, 99):
        value = float(np.quantile(scored, percent / 100, method="higher")) if len(scored) else None
        step[f"p{percent}_ms"] = value
    return step, int((scored <= options.target_ms).sum()) >= TARGET_SHARE * len(answers) > 0


def _print_step(step: dict[str, Any], passed: bool) -> None:
    percentiles = ", ".join(
        f"{name} {step[f'{name}_ms']:.0f} ms" for name in ("p50", "p95", "p99") if step[f"{name}_ms"] is not None
    )
    errors = ", ".join(f"{number} × {status}" for status, number in step["errors"].items())
    console().print(
        f"  {step['requests_per_s']:8.2f} requests/s, {step['offered_items_per_s']:9.1f} items/s: {percentiles}"
        f"{'; ' + errors if errors else ''}{'' if passed else '  target missed'}",
        soft_wrap=True,
    )
