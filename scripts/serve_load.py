"""Overloads a running server: finds the rate that it sustains, then asks twice that for as long as it is told.

    jaxslm serve --model ranker --port 8000 &
    python scripts/serve_load.py --url http://127.0.0.1:8000 --pid $! --seconds 120

Every request must be answered with 200 or 429, the p99 of the accepted ones must lie within their deadline, and memory
must stay flat. The share of time in which the device was busy says what the server costs beside it. The last line is
JSON. With --store-ids N requests name items `item-0` ... that the store holds, instead of texts.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import httpx

WORDS = [
    "senior",
    "junior",
    "python",
    "nurse",
    "engineer",
    "night",
    "shift",
    "ward",
    "remote",
    "cloud",
    "sales",
    "chef",
]


def body(number: int, items: int, store_ids: int) -> dict[str, Any]:
    """Returns a request of `items` items, another one for each number."""
    chance = random.Random(number)
    query = " ".join(chance.choices(WORDS, k=4))
    if store_ids:
        return {"query": query, "item_ids": [f"item-{chance.randrange(store_ids)}" for _ in range(items)]}
    return {"query": query, "items": [" ".join(chance.choices(WORDS, k=20)) for _ in range(items)]}


def send(task: tuple[argparse.Namespace, int, float]) -> list[tuple[int, float]]:
    """Sends requests for a while, at random times of this mean rate per second; returns (status, seconds) of each."""
    options, seed, rate = task
    return asyncio.run(_send(options, seed, rate))


async def _send(options: argparse.Namespace, seed: int, rate: float) -> list[tuple[int, float]]:
    chance, answers = random.Random(seed), []
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=options.url, limits=limits, timeout=60) as client,
        asyncio.TaskGroup() as tasks,
    ):

        async def one(number: int) -> None:
            start = time.perf_counter()
            try:
                answer = await client.post("/v1/score", json=body(number, options.items, options.store_ids))
                answers.append((answer.status_code, time.perf_counter() - start))
            except httpx.TransportError:
                answers.append((0, time.perf_counter() - start))

        until, number = time.perf_counter() + options.seconds, seed << 20
        while time.perf_counter() < until:
            number += 1
            tasks.create_task(one(number))
            await asyncio.sleep(chance.expovariate(rate))
    return answers


def sustained(options: argparse.Namespace, seconds: float) -> float:
    """Returns the requests per second that eight clients get which wait for each answer."""

    async def client_loop(client: httpx.AsyncClient, seed: int, until: float) -> int:
        done = 0
        while time.perf_counter() < until:
            answer = await client.post("/v1/score", json=body((seed << 10) + done, options.items, options.store_ids))
            done += answer.status_code == 200
        return done

    async def run() -> int:
        async with httpx.AsyncClient(base_url=options.url, timeout=60) as client:
            until = time.perf_counter() + seconds
            return sum(await asyncio.gather(*(client_loop(client, seed, until) for seed in range(8))))

    start = time.perf_counter()
    return asyncio.run(run()) / (time.perf_counter() - start)


def busy_s(url: str) -> float:
    """Returns for how long the device has been busy."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("jaxslm_device_busy_seconds_total "))


def resident_mb(pid: int) -> float:
    """Returns a process's resident memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    """Runs both phases and prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--pid", type=int, required=True, help="of the server, for its memory")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--items", type=int, default=10)
    parser.add_argument("--store-ids", type=int, default=0)
    parser.add_argument("--clients", type=int, default=2, help="processes that send")
    options = parser.parse_args()
    sustained(options, 3)
    rate = sustained(options, max(5.0, options.seconds / 10))
    memory, busy, start = resident_mb(options.pid), busy_s(options.url), time.perf_counter()
    with Pool(options.clients) as pool:
        tasks = [(options, seed + 1, 2 * rate / options.clients) for seed in range(options.clients)]
        answers = [answer for part in pool.map(send, tasks) for answer in part]
    wall = time.perf_counter() - start
    accepted = sorted(seconds for status, seconds in answers if status == 200)
    result = {
        "sustained_requests_per_s": round(rate, 2),
        "offered_requests_per_s": round(2 * rate, 2),
        "accepted_items_per_s": round(len(accepted) * options.items / wall, 2),
        "statuses": dict(Counter(status for status, _ in answers)),
        "p50_ms": round(1000 * accepted[len(accepted) // 2], 1),
        "p99_ms": round(1000 * accepted[int(len(accepted) * 0.99)], 1),
        "device_busy_share": round((busy_s(options.url) - busy) / wall, 3),
        "resident_mb": [round(memory, 1), round(resident_mb(options.pid), 1)],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
