"""From ids to vectors: each id has its status, and only what is whole and of this model gets through."""

from pathlib import Path

import numpy as np
import pytest

from jaxslm.errors import InputError
from jaxslm.items.lookup import ItemVectors
from jaxslm.items.record import CorruptRecord, StaleRecord, unpack_record
from jaxslm.items.store import Store, StoreUnavailable, open_store
from tests.items.fakes import identity, packed, sha256


def damaged(data: bytes) -> bytes:
    return data[:200] + bytes([data[200] ^ 4]) + data[201:]


@pytest.fixture(params=["lmdb", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "lmdb":
        return open_store(str(tmp_path / "store"))
    return open_store(f"redis://127.0.0.1:{request.getfixturevalue('server')}?prefix={tmp_path}:")


def test_every_id_has_its_status(store: Store) -> None:
    records = {f"item-{n}": packed(n) for n in range(6)} | {"short": packed(7, c=1, dtype="bfloat16")}
    store.put(records | {"old": packed(8, of=identity("old")), "bad": damaged(packed(9)), "none of ours": b"?"})
    ids = ["item-3", "old", "none", "bad", "short", "item-0", "item-3", "none of ours", ""]
    found = ItemVectors(store, identity()).get(ids)
    assert found.status == [
        *("found", "stale", "not_found", "corrupt", "found", "found", "found", "corrupt", "not_found"),
    ]
    assert found.counts == {"found": 4, "stale": 1, "corrupt": 2, "not_found": 2}
    for item_id, vectors, status in zip(ids, found.vectors, found.status, strict=True):
        assert (vectors is not None) == (status == "found")
        if vectors is not None:
            np.testing.assert_array_equal(vectors, unpack_record(records[item_id], identity()).vectors)
    store.close()


def test_no_ids_no_vectors(store: Store) -> None:
    found = ItemVectors(store, identity()).get([])
    assert (found.vectors, found.status, found.counts) == ([], [], {})
    store.close()


def test_a_store_of_another_checkpoint_is_refused_with_both_hashes(store: Store) -> None:
    vectors = ItemVectors(store, identity())
    with pytest.raises(InputError, match="holds no items; `jaxslm encode` fills it"):
        vectors.check_store()
    store.put({f"item-{n}": packed(n, of=identity("old")) for n in range(10)})
    with pytest.raises(StaleRecord) as caught:
        vectors.check_store()
    assert sha256("old") in str(caught.value)
    assert sha256("encoder") in str(caught.value)
    assert store.url in str(caught.value)
    store.put({"item-5": packed(5)})  # while it is encoded anew it serves what it has
    vectors.check_store()
    store.close()


def test_a_store_of_damaged_records_is_refused(store: Store) -> None:
    store.put({"a": damaged(packed(1))})
    with pytest.raises(CorruptRecord, match="damaged"):
        ItemVectors(store, identity()).check_store()
    store.close()


def test_a_store_that_fails_is_no_empty_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    vectors = ItemVectors(store, identity())
    store.close()
    with pytest.raises(StoreUnavailable):
        vectors.get(["a"])
