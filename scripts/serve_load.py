"""Overloads a running server: finds the rate that it sustains, then asks twice that for as long as it is told.

    jaxslm encode --model ranker --items demo/jobs/items.jsonl --store items
    jaxslm serve --model ranker --store items --port 8000 &
    python scripts/serve_load.py --url http://127.0.0.1:8000 --pid $! --items demo/jobs/items.jsonl --seconds 120

Every request must be answered with 200 or 429, the p99 of the accepted ones must lie within their deadline, and memory
must stay flat: the exit code is 1 if one of these fails. `overhead_share` is the part of the time in which the device
had nothing to do: what the server costs beside it. With --items requests name items that the store holds; without, they
carry texts. The last line is JSON.

Where the overhead is, by function (`pip install py-spy`), while this runs:

    py-spy record --pid PID_OF_THE_SERVER --duration 30 --gil --threads --format raw --output profile.txt
"""

import argparse
import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx

WORDS = ("senior", "python", "nurse", "engineer", "night", "shift", "ward", "remote", "cloud", "sales", "chef")
ALLOWED = (200, 429)
FLAT = 1.05
"""Memory at the end over memory after the first quarter."""


@dataclass(frozen=True)
class Load:
    """What to send. ids: of the store's items; none for texts. size: items of a request."""

    url: str
    ids: Sequence[str]
    size: int

    def body(self, number: int) -> dict[str, Any]:
        """Returns a request, another one for each number."""
        chance = random.Random(number)
        query = " ".join(chance.choices(WORDS, k=4))
        if self.ids:
            return {"query": query, "item_ids": chance.choices(self.ids, k=self.size)}
        return {"query": query, "items": [" ".join(chance.choices(WORDS, k=20)) for _ in range(self.size)]}


def send(load: Load, seed: int, rate: float, seconds: float) -> list[tuple[int, float]]:
    """Sends requests for a while, at random times of this mean rate per second; returns (status, seconds) of each."""
    return asyncio.run(_send(load, seed, rate, seconds))


async def _send(load: Load, seed: int, rate: float, seconds: float) -> list[tuple[int, float]]:
    chance, answers = random.Random(seed), []
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=load.url, limits=limits, timeout=60) as client,
        asyncio.TaskGroup() as tasks,
    ):

        async def one(number: int) -> None:
            start = time.perf_counter()
            try:
                answer = await client.post("/v1/score", json=load.body(number))
                answers.append((answer.status_code, time.perf_counter() - start))
            except httpx.TransportError:
                answers.append((0, time.perf_counter() - start))

        until, number, due = time.perf_counter() + seconds, seed << 24, time.perf_counter()
        while due < until:
            number += 1
            tasks.create_task(one(number))
            due += chance.expovariate(rate)  # a client that is late catches up
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return answers


def wait_in_turn(load: Load, seed: int, seconds: float, loops: int = 8) -> int:
    """Returns how many requests were scored for clients that each wait for an answer before they send again."""

    async def client_loop(client: httpx.AsyncClient, number: int, until: float) -> int:
        done = 0
        while time.perf_counter() < until:
            answer = await client.post("/v1/score", json=load.body((number << 16) + done))
            done += answer.status_code == 200
        return done

    async def run() -> int:
        async with httpx.AsyncClient(base_url=load.url, timeout=60) as client:
            until = time.perf_counter() + seconds
            return sum(await asyncio.gather(*(client_loop(client, loops * seed + i, until) for i in range(loops))))

    return asyncio.run(run())


def metrics(url: str) -> dict[str, float]:
    """Returns the server's metrics that have no labels."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line[:1] != "#" and "{" not in line}


def own_mb(pid: int) -> float:
    """Returns a process's own memory, in RAM or swapped out; pages of files come and go as the kernel likes."""
    lines = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in ("RssAnon", "VmSwap")) / 1024


class Watch(threading.Thread):
    """Notes a process's memory, sixteen times within so many seconds."""

    def __init__(self, pid: int, seconds: float) -> None:
        super().__init__(daemon=True)
        self.pid, self.every, self.seen, self.over = pid, seconds / 16, [own_mb(pid)], threading.Event()

    def run(self) -> None:
        while not self.over.wait(self.every):
            self.seen.append(own_mb(self.pid))


def overhead(url: str, since: dict[str, float], seconds: float) -> float:
    """Returns the part of the time since then in which the device had no batch."""
    name = "jaxslm_device_busy_seconds_total"
    return 1 - (metrics(url)[name] - since[name]) / seconds


def main() -> int:
    """Runs both phases and prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--pid", type=int, required=True, help="of the server, for its memory")
    parser.add_argument("--items", type=Path, help="JSON Lines whose ids the store holds")
    parser.add_argument("--size", type=int, default=50, help="items of a request")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--deadline-ms", type=float, default=10_000, help="the server's deadline_ms")
    parser.add_argument("--clients", type=int, default=2, help="processes that send")
    options = parser.parse_args()
    if httpx.get(f"{options.url}/health/ready", timeout=60).status_code != 200:
        raise SystemExit(f"{options.url}: is not ready")
    ids = [json.loads(line)["id"] for line in options.items.open(encoding="utf-8")] if options.items else []
    load, seconds, clients = Load(options.url, ids, options.size), options.seconds, range(options.clients)
    with get_context("spawn").Pool(options.clients) as pool:
        pool.starmap(wait_in_turn, [(load, seed, 2.0) for seed in clients])
        began, start = metrics(load.url), time.perf_counter()
        scored = pool.starmap(wait_in_turn, [(load, 1000 + seed, max(5.0, seconds / 8)) for seed in clients])
        wall = time.perf_counter() - start
        rate, saturated = sum(scored) / wall, overhead(load.url, began, wall)
        if not rate:
            raise SystemExit(f"{options.url}: scored no request")
        watch = Watch(options.pid, seconds)
        watch.start()
        began, start = metrics(load.url), time.perf_counter()
        parts = pool.starmap(send, [(load, seed + 1, 2 * rate / options.clients, seconds) for seed in clients])
        wall = time.perf_counter() - start
        watch.over.set()
    answers = [answer for part in parts for answer in part]
    accepted = sorted(spent for status, spent in answers if status == 200)
    if not accepted:
        raise SystemExit(f"{load.url}: accepted none of {len(answers)} requests")
    p99_ms = 1000 * accepted[int(len(accepted) * 0.99)]
    statuses, settled = Counter(status for status, _ in answers), watch.seen[len(watch.seen) // 4]
    result = {
        "sustained_requests_per_s": round(rate, 2),
        "overhead_share_at_saturation": round(saturated, 3),
        "offered_requests_per_s": round(2 * rate, 2),
        "accepted_items_per_s": round(len(accepted) * load.size / wall, 1),
        "overhead_share_overloaded": round(overhead(load.url, began, wall), 3),
        "statuses": statuses,
        "p50_ms": round(1000 * accepted[len(accepted) // 2], 1),
        "p99_ms": round(p99_ms, 1),
        "memory_mb": [round(seen, 1) for seen in watch.seen],
        "compilations_after_ready": metrics(load.url)["jaxslm_compilations_after_ready"],
    }
    print(json.dumps(result))
    well = set(statuses) <= set(ALLOWED) and p99_ms <= options.deadline_ms and watch.seen[-1] <= FLAT * settled
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
