"""Requests of a file share forward passes, and each is answered as if it were alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxslm.compress.encoder import load_encoder
from jaxslm.errors import InputError
from jaxslm.items.record import Record, pack_record
from jaxslm.items.store import open_store
from jaxslm.score import files
from jaxslm.score.compiled import CompiledScorer
from jaxslm.score.scorer import Ranker

WORDS = ("python", "nurse", "night shift welder", "pilot", "baker of bread")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward pass from now on."""
    seen: list[int] = []
    dispatch = CompiledScorer.dispatch

    def counted(self: CompiledScorer, group: Sequence[Any]) -> Any:
        seen.extend(forward.bucket.tokens for forward in group)
        return dispatch(self, group)

    monkeypatch.setattr(CompiledScorer, "dispatch", counted)
    return seen


def write(path: Path, requests: list[tuple[str, list[dict[str, str]]]]) -> Path:
    path.write_text("".join(json.dumps({"query": query, "items": items}) + "\n" for query, items in requests))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("group_tokens", [None, 250])
def test_texts(
    tmp_path: Path,
    checkpoint: Path,
    ranker: Ranker,
    passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    group_tokens: int | None,
) -> None:
    if group_tokens is not None:
        monkeypatch.setattr(files, "_group_tokens", lambda ranker: group_tokens)
    requests = [(f"query {n}", [{"text": word} for word in WORDS[: 1 + n % 5]]) for n in range(12)]
    summary = files.score_file(checkpoint, write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl")
    shared = len(passes)
    assert (summary["requests"], summary["items"], summary["truncated"]) == (12, sum(1 + n % 5 for n in range(12)), 0)
    assert shared < 12
    lines = read(tmp_path / "out.jsonl")
    assert len(lines) == 12
    for (query, items), line in zip(requests, lines, strict=True):
        expected = ranker.score_request(query, [item["text"] for item in items])
        np.testing.assert_allclose(line["logits"], expected.log_odds, rtol=0, atol=1e-5)
        np.testing.assert_allclose(line["scores"], expected.probabilities, rtol=0, atol=1e-5)
        assert line["truncated"] == [False] * len(items)
    if group_tokens is not None:
        assert shared > 1


def test_stored_items(tmp_path: Path, checkpoint: Path, ranker: Ranker, passes: list[int]) -> None:
    encoder = load_encoder(checkpoint)
    vectors = encoder.encode(list(WORDS), 2)
    with open_store(str(tmp_path / "store")) as store:
        store.put(
            {
                w: pack_record(Record(encoder.identity, v, "0" * 64), "float32")
                for w, v in zip(WORDS, vectors, strict=True)
            }
        )
    asked = [["nurse", "unknown", "pilot"], ["unknown"], ["baker of bread"], list(WORDS), ["pilot", "pilot"]]
    requests = [(f"query {n}", [{"id": name} for name in names]) for n, names in enumerate(asked)]
    output = tmp_path / "out.jsonl"
    summary = files.score_file(
        checkpoint, write(tmp_path / "in.jsonl", requests), output, store=str(tmp_path / "store")
    )
    assert summary["status"] == {"found": 10, "not_found": 2}
    assert len(passes) == 1
    for (query, _), names, line in zip(requests, asked, read(output), strict=True):
        found = [place for place, name in enumerate(names) if name in WORDS]
        assert line["status"] == ["found" if name in WORDS else "not_found" for name in names]
        assert [line["scores"][place] is None for place in range(len(names))] == [n not in WORDS for n in names]
        if found:
            expected = ranker.score_vectors(query, vectors[[WORDS.index(names[place]) for place in found]])
            logits = [line["logits"][place] for place in found]
            np.testing.assert_allclose(logits, expected.log_odds, rtol=0, atol=1e-5)


def test_a_request_that_cannot_be_scored_is_named(tmp_path: Path, checkpoint: Path) -> None:
    good = ("python", [{"text": "pilot"}])
    requests = write(tmp_path / "in.jsonl", [good, good, ("word " * 5000, [{"text": "pilot"}]), good])
    with pytest.raises(InputError, match=r"in\.jsonl: request 3: .*leave no room"):
        files.score_file(checkpoint, requests, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
