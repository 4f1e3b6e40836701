"""Encoding a catalogue: nothing twice, nothing lost, one bad item stops nobody, passes are full."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxslm.compress import encoder as encoder_module
from jaxslm.compress.catalogue import check_items, encode_catalogue
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.items.record import StorageDtype, record_bytes, unpack_record
from jaxslm.items.store import Store, StoreUnavailable, open_store
from tests.compress.tiny_compressor import compressor_checkpoint
from tests.items.fakes import DTYPES, FakeEncoder, identity, items, packed
from tests.test_cli import Run
from tests.test_cli import run as run  # noqa: PLC0414 (a fixture)
from tests.tiny import tiny_checkpoint, tiny_config


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "store")) as store:
        yield store


def write_items(path: Path, *rows: Item | dict[str, Any]) -> Path:
    dumped = [row.model_dump() if isinstance(row, Item) else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in dumped), encoding="utf-8")
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_item_is_there_with_its_own_vectors(store: Store, dtype: StorageDtype) -> None:
    encoder, catalogue = FakeEncoder(), items(700)
    summary = encode_catalogue(encoder, iter(catalogue), {4: store}, dtype=dtype)
    assert (summary.encoded, summary.unchanged, summary.failed, summary.reasons) == (700, 0, 0, {})
    assert summary.bytes == 700 * record_bytes(4, 16, dtype)
    assert store.count() == 700
    for item, data in zip(catalogue, store.get([item.id for item in catalogue]), strict=True):
        assert data is not None
        found = unpack_record(data, identity()).vectors
        np.testing.assert_allclose(found, encoder.vectors(item, 4), atol=0.15)


def test_one_pass_serves_every_k(store: Store, tmp_path: Path) -> None:
    encoder, catalogue = FakeEncoder(), items(300)
    encode_catalogue(encoder, catalogue[:100], {1: store}, dtype="int8")
    encoder.batches.clear()
    with open_store(str(tmp_path / "other")) as other:
        summary = encode_catalogue(encoder, catalogue, {1: store, 8: other}, dtype="int8")
        assert (summary.encoded, summary.unchanged) == (300, 0)  # the first hundred were only in one of the stores
        assert sum(encoder.batches) == 300
        assert summary.bytes == 300 * (record_bytes(1, 16, "int8") + record_bytes(8, 16, "int8"))
        for k, each in ((1, store), (8, other)):
            [data] = each.get([catalogue[0].id])
            assert data is not None
            np.testing.assert_allclose(
                unpack_record(data, identity()).vectors, encoder.vectors(catalogue[0], k), atol=0.15
            )
        again = encode_catalogue(encoder, catalogue, {1: store, 8: other}, dtype="int8")
        assert (again.encoded, again.unchanged) == (0, 300)


def test_passes_are_full_and_of_one_length(store: Store) -> None:
    class Strict(FakeEncoder):
        def encode_all(self, items: Any) -> dict[int, np.ndarray]:
            [shape] = {self.pass_shape(tokens) for tokens in self.token_counts(items)}
            assert len(items) <= shape[0]
            self.full = [*getattr(self, "full", []), len(items) == shape[0]]
            return super().encode_all(items)

    encoder = Strict()
    encode_catalogue(encoder, items(3000), {1: store}, dtype="int8")
    num_shapes = len({encoder.pass_shape(tokens) for tokens in range(1, 41)})
    assert encoder.full.count(False) <= num_shapes
    assert encoder.full.count(True) > 100


def test_what_is_unchanged_is_skipped(store: Store) -> None:
    def encode(catalogue: list[Item], k: int = 4, dtype: StorageDtype = "int8", of: str = "encoder") -> tuple[int, int]:
        summary = encode_catalogue(FakeEncoder(identity(of)), catalogue, {k: store}, dtype=dtype)
        return summary.encoded, summary.unchanged

    catalogue = items(30)
    assert encode(catalogue) == (30, 0)
    assert encode(catalogue) == (0, 30)
    catalogue[3] = catalogue[3].model_copy(update={"text": "other words"})
    catalogue[4] = catalogue[4].model_copy(update={"title": "other title"})
    catalogue[5] = catalogue[5].model_copy(update={"colour": "a field that no encoder reads"})
    assert encode(catalogue) == (2, 28)
    assert encode([*catalogue, *items(5, start=30)]) == (5, 30)
    assert encode(catalogue, k=2) == (30, 0)
    assert encode(catalogue, k=2, dtype="float32") == (30, 0)
    assert encode(catalogue, k=2, dtype="float32", of="new encoder") == (30, 0)
    assert encode(catalogue, k=2, dtype="float32", of="new encoder") == (0, 30)
    data = store.get(["item-1"])[0]
    assert data is not None
    store.put({"item-1": data[:-1], "item-2": b"no record"})
    assert encode(catalogue, k=2, dtype="float32", of="new encoder") == (2, 28)


def test_items_that_fail_are_counted_with_their_reason(store: Store) -> None:
    class Overflow(FakeEncoder):
        def vectors(self, item: Item, k: int) -> np.ndarray:
            return super().vectors(item, k) * (np.inf if item.text == "overflow" else 1)

    catalogue = items(300)
    for number, text in [(7, ""), (8, " \n"), (70, "broken"), (71, "broken"), (200, "overflow")]:
        catalogue[number] = catalogue[number].model_copy(update={"text": text})
    catalogue.append(Item(id="x" * 512, text="words"))
    store.put({"item-70": packed()})
    summary = encode_catalogue(Overflow(), catalogue, {2: store}, dtype="int8")
    assert (summary.encoded, summary.unchanged, summary.failed) == (295, 0, 6)
    assert summary.reasons == {
        "has no text": (2, "item-7"),
        "it is broken": (2, "item-70"),
        "vectors: must be finite": (1, "item-200"),
        f"item id {'x' * 40!r}: must have 1 to 511 bytes in UTF-8": (1, "x" * 512),
    }
    assert store.get(["item-7", "item-70"]) == [None, packed()]
    assert store.count() == 296
    again = encode_catalogue(Overflow(), catalogue, {2: store}, dtype="int8")
    assert (again.encoded, again.unchanged, again.failed) == (0, 295, 6)


def test_progress_is_told_after_each_pass(store: Store) -> None:
    encoder, done = FakeEncoder(), []
    catalogue = [*items(500), Item(id="empty", text="")]
    encode_catalogue(
        encoder, catalogue, {1: store}, dtype="int8", on_progress=lambda summary: done.append(summary.done)
    )
    assert len(done) >= len(encoder.batches)
    assert done == sorted(done)
    assert done[-1] == 501


def test_reasons_stay_few(store: Store) -> None:
    class Talkative(FakeEncoder):
        def encode_all(self, items: Any) -> dict[int, np.ndarray]:
            raise InputError(f"item 0: {items[0].id} is not nice")

    summary = encode_catalogue(Talkative(), items(200), {1: store}, dtype="int8")
    assert summary.failed == sum(count for count, _ in summary.reasons.values()) == 200
    assert len(summary.reasons) <= 51
    assert all(first in reason for reason, (_, first) in summary.reasons.items() if reason != "other reasons")
    assert summary.reasons["other reasons"][0] == 150


def test_a_k_that_was_not_trained_is_refused(store: Store) -> None:
    with pytest.raises(InputError, match="k = 3: this compressor was trained for 1, 2, 4, 8, 16"):
        encode_catalogue(FakeEncoder(), items(3), {3: store}, dtype="int8")
    assert store.count() == 0


def test_a_run_that_stops_goes_on_where_it_was(store: Store) -> None:
    class Stopping(FakeEncoder):
        def encode_all(self, items: Any) -> dict[int, np.ndarray]:
            if sum(self.batches) > 900:
                raise KeyboardInterrupt
            return super().encode_all(items)

    with pytest.raises(KeyboardInterrupt):
        encode_catalogue(Stopping(), items(2000), {1: store}, dtype="int8")
    kept = store.count()
    assert 500 < kept < 1000
    summary = encode_catalogue(FakeEncoder(), items(2000), {1: store}, dtype="int8")
    assert (summary.encoded, summary.unchanged) == (2000 - kept, kept)


def test_a_store_that_fails_stops_the_run(store: Store) -> None:
    store.close()
    with pytest.raises(StoreUnavailable):
        encode_catalogue(FakeEncoder(), items(3), {1: store}, dtype="int8")


def test_the_catalogue_is_read_as_it_is_encoded(store: Store) -> None:
    """Memory does not grow with the catalogue: what was read and is not yet encoded stays within a bound."""
    encoder, ahead = FakeEncoder(), []

    def stream() -> Iterator[Item]:
        for number in range(6000):
            ahead.append(number - sum(encoder.batches))
            yield items(1, start=number)[0]

    assert encode_catalogue(encoder, stream(), {1: store}, dtype="int8").encoded == 6000
    assert max(ahead) < 600


def test_a_file_is_checked_before_anything_else(tmp_path: Path) -> None:
    good = items(5)
    assert check_items(write_items(tmp_path / "good.jsonl", *good)) == 5
    with pytest.raises(InputError, match="item id 'item-3' appears twice"):
        check_items(write_items(tmp_path / "twice.jsonl", *good, good[3]))
    with pytest.raises(InputError, match="line 6: text: Field required"):
        check_items(write_items(tmp_path / "schema.jsonl", *good, {"id": "a"}))


@pytest.fixture
def fake_encoder(monkeypatch: pytest.MonkeyPatch) -> FakeEncoder:
    encoder = FakeEncoder()
    monkeypatch.setattr(encoder_module, "load_encoder", lambda path: encoder)
    return encoder


def test_command_line_encodes_a_file_once(run: Run, fake_encoder: FakeEncoder, tmp_path: Path) -> None:
    file = write_items(tmp_path / "items.jsonl", *items(20), {"id": "empty", "text": ""})
    arguments = ("encode", "--model", "model", "--items", file, "--store", tmp_path / "store", "--k", 2)
    code, summary, stderr = run(*arguments)
    assert code == 0
    assert summary is not None
    assert (summary["encoded"], summary["unchanged"], summary["failed"]) == (20, 0, 1)
    assert summary["reasons"] == [{"reason": "has no text", "items": 1, "first_id": "empty"}]
    assert summary["bytes"] == 20 * record_bytes(2, 16, "int8")
    assert summary["stores"] == {"2": str(tmp_path / "store")}
    assert summary["items_per_s"] > 0
    assert "1 of 21 items failed, 'empty' first: has no text" in stderr
    code, summary, _ = run(*arguments)
    assert summary is not None
    assert (summary["encoded"], summary["unchanged"], summary["failed"]) == (0, 20, 1)


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("redis://127.0.0.1:1", 1, "store redis://127.0.0.1:1: "),
        ("/proc/no/store", 1, "store /proc/no/store: "),
        ("ftp://host", 2, "store ftp://host: must be a folder, or start with"),
    ],
)
def test_a_store_that_cannot_be_opened_is_one_line(
    run: Run, fake_encoder: FakeEncoder, tmp_path: Path, url: str, code: int, message: str
) -> None:
    file = write_items(tmp_path / "items.jsonl", *items(3))
    found, summary, stderr = run("encode", "--model", "model", "--items", file, "--store", url)
    assert (found, summary, len(stderr.splitlines())) == (code, None, 1)
    assert stderr.startswith(f"jaxslm: error: {message}")
    assert fake_encoder.batches == []


def test_bad_input_leaves_no_store(run: Run, fake_encoder: FakeEncoder, tmp_path: Path) -> None:
    file = write_items(tmp_path / "items.jsonl", *items(3), items(1)[0])
    code, _, stderr = run("encode", "--model", "model", "--items", file, "--store", tmp_path / "store")
    assert (code, stderr) == (2, f"jaxslm: error: {file}: item id 'item-0' appears twice\n")
    assert not (tmp_path / "store").exists()


def test_a_model_or_k_that_does_not_fit_leaves_no_store(run: Run, tmp_path: Path) -> None:
    file = write_items(tmp_path / "items.jsonl", *items(3))
    checkpoint = compressor_checkpoint(tmp_path / "compressor")
    plain = tiny_checkpoint(tmp_path / "plain", tiny_config(num_layers=1))
    arguments = ("encode", "--items", file, "--store", tmp_path / "store")
    for options, message in (
        (("--model", checkpoint, "--k", 8), "k = 8: this compressor was trained for 1, 2, 4"),
        (("--model", plain), "compressor"),
        (("--model", tmp_path / "absent"), "not a checkpoint"),
    ):
        code, _, stderr = run(*arguments, *options)
        assert (code, len(stderr.splitlines())) == (2, 1)
        assert message in stderr
        assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("ks", "expected"), [((1, 2, 4, 8, 16), "8"), ((1, 2, 4), "4"), ((16, 32), "16")])
def test_the_default_is_the_largest_k_up_to_eight(
    run: Run, fake_encoder: FakeEncoder, tmp_path: Path, ks: tuple[int, ...], expected: str
) -> None:
    fake_encoder.ks = ks
    file = write_items(tmp_path / "items.jsonl", *items(3))
    _, summary, _ = run("encode", "--model", "model", "--items", file, "--store", tmp_path / "store")
    assert summary is not None
    assert summary["stores"] == {expected: str(tmp_path / "store")}


def test_a_real_compressor_fills_a_store(run: Run, tmp_path: Path) -> None:
    checkpoint = compressor_checkpoint(tmp_path / "compressor")
    file = write_items(tmp_path / "items.jsonl", *items(12))
    code, summary, _ = run("encode", "--model", checkpoint, "--items", file, "--store", tmp_path / "store", "--k", 4)
    assert code == 0
    assert summary is not None
    assert summary["encoded"] == 12
    encoder = encoder_module.load_encoder(checkpoint)
    expected = encoder.encode(items(12), 4)
    with open_store(str(tmp_path / "store"), read_only=True) as store:
        for data, vectors in zip(store.get([item.id for item in items(12)]), expected, strict=True):
            assert data is not None
            found = unpack_record(data, encoder.identity).vectors
            np.testing.assert_allclose(found, vectors, atol=np.abs(vectors).max() / 200)
