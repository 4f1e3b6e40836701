"""kill -9 while encoding, ten times: whatever is in the store is whole, and the run after it completes the rest."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxslm.items.lookup import ItemVectors
from jaxslm.items.store import open_store
from tests.items.fakes import FakeEncoder, identity, items

COUNT = 10_000
# Says when it starts a transaction, so that it can be killed within one, or soon after.
ENCODE = f"""
import sys
from jaxslm.compress.catalogue import encode_catalogue
from jaxslm.items.store import open_store
from tests.items.fakes import FakeEncoder, items
with open_store(sys.argv[1]) as store:
    put = store.put
    def put_aloud(records):
        print("put", flush=True)
        put(records)
    store.put = put_aloud
    summary = encode_catalogue(FakeEncoder(width=256, ks=(8,)), items({COUNT}), {{8: store}}, dtype="int8")
    print(summary.encoded, summary.unchanged, summary.failed)
"""


def start(url: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", ENCODE, url], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )


@pytest.mark.parametrize(("engine", "kills"), [pytest.param("lmdb", 10, marks=pytest.mark.slow), ("redis", 3)])
def test_every_record_is_readable_and_none_is_missing(
    engine: str, kills: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path)
    if engine == "redis":
        url = f"redis://127.0.0.1:{request.getfixturevalue('server')}?prefix={tmp_path}:"
    generator = random.Random(0)
    counts = []
    for _ in range(kills):
        process = start(url)
        assert process.stdout is not None
        for _ in range(generator.randint(1, 2)):
            assert process.stdout.readline() == "put\n"
        time.sleep(generator.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with open_store(url) as store:
            found = ItemVectors(store, identity()).get(list(store.ids()))
            counts.append(found.counts.get("found", 0))
            assert found.counts in ({"found": counts[-1]}, {})
    assert counts == sorted(counts)
    assert 0 < counts[-1] < COUNT
    encoded, unchanged, failed = map(int, start(url).communicate(timeout=300)[0].splitlines()[-1].split())
    assert (encoded + unchanged, unchanged, failed) == (COUNT, counts[-1], 0)
    encoder, catalogue = FakeEncoder(width=256, ks=(8,)), items(COUNT)
    with open_store(url) as store:
        found = ItemVectors(store, identity()).get([item.id for item in catalogue])
        assert found.counts == {"found": COUNT}
        for number in generator.sample(range(COUNT), 200):
            vectors = found.vectors[number]
            assert vectors is not None
            np.testing.assert_allclose(vectors, encoder.vectors(catalogue[number], 8), atol=0.03)
