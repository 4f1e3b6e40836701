"""Measures a store of items in LMDB at size: bytes on disk, put and random batched get throughput, memory.

    python scripts/scale_items.py --out /tmp/scale --items 1000000

int8 records of random vectors under ids in no order, in batches as `jaxslm encode` writes them. A million items of
8 x 1,024 values need 9 GB in --out, a folder that is removed at the end. "cold" is right after the system dropped the
file from its memory, "warm" after it read the whole file. Prints one JSON object last (Linux only).
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxslm.atomic import refuse_existing
from jaxslm.errors import exit_on_input_error
from jaxslm.items.lookup import ItemVectors
from jaxslm.items.record import Record, RecordIdentity, pack_record
from jaxslm.items.store import Store, open_store
from jaxslm.progress import progress

IDENTITY = RecordIdentity(*(hashlib.sha256(name.encode()).hexdigest() for name in ("encoder", "ranker", "template")))
DISTINCT = 4096
"""Records that are made; the ids repeat them, because LMDB compresses nothing."""

PUT_BATCH = 256
"""Records of a transaction, as `jaxslm encode` writes them."""


def item_id(number: int) -> str:
    """Ids of 20 hex digits in no order, like those of a real catalogue."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=10).hexdigest()


def put(store: Store, count: int, k: int, width: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((DISTINCT, k, width), np.float32)
    start = time.perf_counter()
    records = [pack_record(Record(IDENTITY, each, "0" * 64), "int8") for each in vectors]
    pack_s = time.perf_counter() - start
    start = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("put", total=count)
        for first in range(0, count, PUT_BATCH):
            numbers = range(first, min(first + PUT_BATCH, count))
            store.put({item_id(number): records[number % DISTINCT] for number in numbers})
            bar.update(task, completed=numbers.stop)
    seconds = time.perf_counter() - start
    return {
        "record_bytes": len(records[0]),
        "pack_items_per_s": round(DISTINCT / pack_s),
        "put_items_per_s": round(count / seconds),
        "put_s": round(seconds, 1),
    }


def get(store: Store, count: int, batch: int, seconds: float) -> dict[str, Any]:
    vectors = ItemVectors(store, IDENTITY)
    generator = np.random.default_rng(1)
    latencies_ms: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        ids = [item_id(number) for number in generator.integers(0, count, batch).tolist()]
        start = time.perf_counter()
        found = vectors.get(ids)
        latencies_ms.append(1000 * (time.perf_counter() - start))
        assert found.counts == {"found": batch}
    p50, p95, p99 = np.percentile(latencies_ms, [50, 95, 99])
    return {
        "batches": len(latencies_ms),
        "get_items_per_s": round(batch * len(latencies_ms) / (sum(latencies_ms) / 1000)),
        "p50_ms": round(p50, 2),
        "p95_ms": round(p95, 2),
        "p99_ms": round(p99, 2),
    }


def memory_mb() -> dict[str, int]:
    """Returns resident memory in MB: the process's own, and pages of files, which the system takes back at need."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest}
    return {"own_mb": fields["RssAnon"] // 1024, "file_pages_mb": fields["RssFile"] // 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the store; must not exist")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--get-batch", type=int, default=50)
    parser.add_argument("--get-seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    refuse_existing(arguments.out)
    result: dict[str, Any] = {"items": arguments.items, "k": arguments.k, "width": arguments.width}
    try:
        with open_store(str(arguments.out)) as store:
            result |= put(store, arguments.items, arguments.k, arguments.width)
            result["memory_after_put"] = memory_mb()
        with (arguments.out / "data.mdb").open("rb") as file:
            result["file_bytes_per_item"] = round(os.fstat(file.fileno()).st_size / arguments.items, 1)
            for name in ("cold", "warm"):
                if name == "cold":
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(1 << 24):
                        pass
                with open_store(str(arguments.out), read_only=True) as store:
                    result[name] = get(store, arguments.items, arguments.get_batch, arguments.get_seconds)
                    result[name] |= memory_mb()
    finally:
        shutil.rmtree(arguments.out, ignore_errors=True)
    print(json.dumps(result))


if __name__ == "__main__":
    with exit_on_input_error("scale_items"):
        main()
