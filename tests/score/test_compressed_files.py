"""`jaxslm score` and `eval` with a store: the same scores as in memory, and nothing unusable is ever scored."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxslm import cli
from jaxslm.compress.encoder import load_encoder
from jaxslm.items.record import Record, RecordIdentity, pack_record
from jaxslm.items.store import open_store
from jaxslm.score import scorer
from jaxslm.score.scorer import Ranker, load
from tests.compress.tiny_compressor import compressor_checkpoint

TEXTS = {"a": "python developer", "b": "nurse", "c": "night shift welder", "d": "pilot"}


@pytest.fixture(scope="module")
def vectors(checkpoint: Path) -> np.ndarray:
    return load_encoder(checkpoint).encode(list(TEXTS.values()), 2)


def fill(path: Path, identity: RecordIdentity, vectors: np.ndarray) -> Path:
    """Writes a store of the items of TEXTS."""
    records = [pack_record(Record(identity, each, "0" * 64), "float32") for each in vectors]
    with open_store(str(path)) as store:
        store.put(dict(zip(TEXTS, records, strict=True)))
    return path


@pytest.fixture
def store(tmp_path: Path, checkpoint: Path, vectors: np.ndarray) -> Path:
    return fill(tmp_path / "store", load_encoder(checkpoint).identity, vectors)


@pytest.fixture
def stale(vectors: np.ndarray) -> bytes:
    """A record for another model."""
    return pack_record(Record(RecordIdentity("1" * 64, "2" * 64, "3" * 64), vectors[0], "0" * 64), "float32")


def run(*arguments: Any) -> int:
    """Runs the command line in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAX_COMPILATION_CACHE_DIR", "")  # tests leave the user's cache folder alone
        patched.setattr(sys, "argv", ["jaxslm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def score(
    folder: Path, checkpoint: Path, store: Path | str, ids: list[str], *more: Any
) -> tuple[int, list[dict[str, Any]]]:
    (folder / "in.jsonl").write_text(
        json.dumps({"query": "python", "items": [{"id": item_id, "text": "not read"} for item_id in ids]}) + "\n"
    )
    output = folder / "out.jsonl"
    code = run(
        "score", "--model", checkpoint, "--mode", "compressed", "--store", store,
        "--input", folder / "in.jsonl", "--output", output, *more,
    )  # fmt: skip
    return code, [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def test_buckets_fitted_to_texts_serve_vectors_too(
    tmp_path: Path, checkpoint: Path, ranker: Ranker, vectors: np.ndarray, store: Path
) -> None:
    fitted = tmp_path / "buckets.toml"
    fitted.write_text("[[buckets]]\ntokens = 512\nrows = 8\nprefix_tokens = 128\nitems_per_row = 2\nitem_tokens = 64\n")
    code, (line,) = score(tmp_path, checkpoint, store, ["b", "d"], "--buckets", fitted)
    assert code == 0
    expected = ranker.score_vectors("python", vectors[[1, 3]])
    np.testing.assert_allclose(line["scores"], expected.probabilities, rtol=0, atol=1e-5)


def test_an_item_that_cannot_be_scored_is_named_by_its_number_in_the_request(
    tmp_path: Path, checkpoint: Path, store: Path, capsys: Any
) -> None:
    odd = Record(load_encoder(checkpoint).identity, np.zeros((3, 32), np.float32), "0" * 64)
    with open_store(str(store)) as opened:
        opened.put({"odd": pack_record(odd, "float32")})
    assert score(tmp_path, checkpoint, store, ["unknown", "odd"]) == (2, [])
    assert "request 1: item 1: 3 vectors" in capsys.readouterr().err


def test_items_by_id_score_as_in_memory_and_others_say_why_not(
    tmp_path: Path, checkpoint: Path, ranker: Ranker, vectors: np.ndarray, store: Path, stale: bytes, capsys: Any
) -> None:
    with open_store(str(store)) as opened:
        [good] = opened.get(["a"])
        assert good is not None
        corrupt = good[:200] + bytes([good[200] ^ 1]) + good[201:]
        opened.put({"stale": stale, "corrupt": corrupt})
    code, [line] = score(tmp_path, checkpoint, store, ["b", "unknown", "a", "stale", "corrupt", "b"])
    assert code == 0
    assert line["status"] == ["found", "not_found", "found", "stale", "corrupt", "found"]
    expected = ranker.score_vectors("python", vectors[[1, 0, 1]])
    found = [0, 2, 5]
    np.testing.assert_array_equal([line["logits"][place] for place in found], expected.log_odds)
    np.testing.assert_array_equal([line["scores"][place] for place in found], expected.probabilities)
    assert [line["scores"][place] for place in (1, 3, 4)] == [None] * 3
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["status"] == {"found": 3, "not_found": 1, "stale": 1, "corrupt": 1}


def test_a_store_of_another_model_is_refused_with_both_hashes(
    tmp_path: Path, checkpoint: Path, vectors: np.ndarray, capsys: Any
) -> None:
    other = RecordIdentity("1" * 64, "2" * 64, "3" * 64)
    code, lines = score(tmp_path, checkpoint, fill(tmp_path / "store", other, vectors), ["a"])
    error = capsys.readouterr().err
    assert (code, lines) == (2, [])
    assert "1" * 64 in error
    assert load_encoder(checkpoint).identity.encoder_sha256 in error


def test_a_store_that_cannot_be_reached(tmp_path: Path, checkpoint: Path, capsys: Any) -> None:
    code, lines = score(tmp_path, checkpoint, "redis://127.0.0.1:1", ["a"])
    assert (code, lines) == (1, [])
    assert "redis://127.0.0.1:1" in capsys.readouterr().err


def test_arguments_that_do_not_fit(tmp_path: Path, checkpoint: Path, store: Path, capsys: Any) -> None:
    (tmp_path / "in.jsonl").write_text('{"query": "python", "items": [{"text": "x"}]}\n')
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out")
    assert run("score", "--model", checkpoint, "--mode", "compressed", *files) == 2
    assert "belong together" in capsys.readouterr().err
    assert run("score", "--model", checkpoint, "--mode", "compressed", "--store", store, *files) == 2
    assert "items.0.id: needed to find the item in the store" in capsys.readouterr().err


def test_text_beside_vectors_is_needed_before_any_work(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"ks": (2,), "text_fields": ("title",), "max_text_tokens": 4}
    checkpoint = compressor_checkpoint(tmp_path / "ckpt", **fields)
    encoder = load_encoder(checkpoint)
    vectors = encoder.encode(list(TEXTS.values()), 2)
    store = fill(tmp_path / "store", encoder.identity, vectors)
    items = [{"id": "a", "text": "developer"}, {"id": "b", "text": ""}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"query": "python", "items": items}) + "\n")
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    arguments = ("score", "--model", checkpoint, "--mode", "compressed", "--store", store, *files)
    assert run(*arguments) == 0
    expected = load(checkpoint).score_vectors("python", vectors[:2], ["developer", ""]).log_odds
    np.testing.assert_allclose(json.loads((tmp_path / "out.jsonl").read_text())["logits"], expected, atol=1e-5)

    (tmp_path / "out.jsonl").unlink()
    capsys.readouterr()
    (tmp_path / "in.jsonl").write_text('{"query": "python", "items": [{"id": "a", "text": "x"}, {"id": "b"}]}\n')
    monkeypatch.setattr(scorer, "load", lambda *arguments, **options: pytest.fail("must not load"))
    assert run(*arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "request 1: items.1.text: needed: this compressor reads title beside the vectors" in line
    assert not (tmp_path / "out.jsonl").exists()


def write_data(folder: Path, ids: list[str], queries: int = 1) -> Path:
    """Items and queries; the first query judges item "a", the last ones also what has no record of its own."""
    folder.mkdir()
    items = [{"id": item_id, "text": TEXTS.get(item_id, "baker")} for item_id in ids]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    judged = [["a"], ["b", "e", "f"], ["a", "e", "g", "h", "s"]]
    rows = [
        {"query_id": f"q{number}", "query": "python", "items": [{"id": each, "label": 1.0} for each in judged[number]]}
        for number in range(queries)
    ]
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_an_evaluation_scores_what_the_store_has(
    tmp_path: Path, checkpoint: Path, ranker: Ranker, vectors: np.ndarray, store: Path
) -> None:
    arguments = ("--model", checkpoint, "--mode", "compressed", "--store", store, "--candidates", 4)
    data = write_data(tmp_path / "data", list(TEXTS))
    assert run("eval", *arguments, "--data", data, "--run-out", tmp_path / "run") == 0
    scores = {line.split()[2]: float(line.split()[4]) for line in (tmp_path / "run").read_text().splitlines()}
    expected = ranker.score_vectors("python", vectors).log_odds
    np.testing.assert_allclose([scores[item_id] for item_id in TEXTS], expected, atol=1e-5)


def test_what_cannot_be_evaluated_is_told_whole_and_first(
    tmp_path: Path, checkpoint: Path, store: Path, stale: bytes, capsys: Any, monkeypatch: Any
) -> None:
    """Every reason with its number and its first ids, in one line, over all queries, before anything is scored."""
    data = write_data(tmp_path / "data", [*TEXTS, *"efghs"], queries=3)
    with open_store(str(store)) as opened:
        opened.put({"s": stale})
    monkeypatch.setattr(Ranker, "score_vectors", lambda *arguments: pytest.fail("must not score"))
    arguments = ("--model", checkpoint, "--mode", "compressed", "--store", store, "--candidates", 0)
    assert run("eval", *arguments, "--data", data, "--run-out", tmp_path / "run") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "5 of 7 candidates cannot be scored: 4 not found ('e', 'f', 'g', ...), 1 stale ('s'); `jaxslm enc" in line
    assert not (tmp_path / "run").exists()
