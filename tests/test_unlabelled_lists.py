"""Queries that nobody judged become lists of training: near items, nothing kept out, lists that a teacher can label."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxslm.checkpoint import load_checkpoint
from jaxslm.data_files import read_items, read_queries
from jaxslm.score.bi_encoder import BiEncoder
from tests.tiny import tiny_checkpoint, tiny_config

SCRIPT = Path(__file__).parents[1] / "scripts" / "unlabelled_lists.py"
WORDS = ("red", "blue", "green", "job", "python", "black")
LOG = ("blue job", "Red, job!", "green python", "a title", "  ", "black job", "green python", "held out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve items, of which queries judge six, an encoder, a log, and a query that is kept out."""
    folder = tmp_path_factory.mktemp("unlabelled")
    tiny_checkpoint(folder / "encoder", tiny_config("llama", num_layers=1), template="yes-no", instruction="?")
    generator = np.random.default_rng(0)
    items = [{"id": f"i{n}", "title": "A Title", "text": " ".join(generator.choice(WORDS, 4))} for n in range(12)]
    judged = [
        {"query_id": f"q{n}", "query": text, "items": [{"id": f"i{3 * n + m}", "label": 1.0} for m in range(3)]}
        for n, text in enumerate(("red job", "white job"))
    ]
    kept_out = [{"query_id": "e", "query": "Held-out", "items": [{"id": "i0", "label": 1.0}]}]
    for name, rows in (("items", items), ("judged", judged), ("dev", kept_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "log.txt").write_text("\n".join(LOG))
    return folder


def run(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    given = {"encoder": "encoder", "queries": "log.txt", "judged": "judged.jsonl", "items": "items.jsonl"}
    options = [each for name, file in given.items() for each in (f"--{name}", str(folder / file))]
    options += ["--exclude", str(folder / "dev.jsonl"), "--candidates", "4", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_lists_are_of_near_items_and_of_queries_that_nothing_knows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        run(folder, tmp_path / name, monkeypatch)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["unlabelled"] == 3
    queries = {query.query_id: query for query in read_queries(tmp_path / "one")}
    assert {query_id: queries.pop(query_id) for query_id in ("q0", "q1")} == {
        query.query_id: query for query in read_queries(folder / "judged.jsonl")
    }
    # Not the judged, the kept-out, the titles or the empty one, whatever their punctuation; nothing twice.
    assert sorted(query.query for query in queries.values()) == ["black job", "blue job", "green python"]
    checkpoint = load_checkpoint(folder / "encoder")
    encoder = BiEncoder(checkpoint.config.model, checkpoint.prompt, np.dtype("float32"), max_item_tokens=40)
    encoder.load(checkpoint.params)
    pool = [item for item in read_items(folder / "items.jsonl").values() if int(item.id[1:]) < 6]
    for query in queries.values():
        cosines = dict(zip([item.id for item in pool], encoder.score(query.query, pool), strict=True))
        listed = [cosines.pop(each.id) for each in query.items]
        assert len(listed) == 4
        assert listed == sorted(listed, reverse=True)
        assert min(listed) >= max(cosines.values())
        assert all(each.label == 0 for each in query.items)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--limit", "0"), "limit: 0, must be at least 1"),
        (("--queries", "no.txt"), "no.txt: cannot be read"),
        (("--queries", "known.txt"), "known.txt: no line that is not among the judged or excluded queries"),
        (("--judged", "elsewhere.jsonl"), "names 1 items that"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("known.txt").write_text("red job\nHELD OUT\n")
    judged: dict[str, Any] = {"query_id": "q", "query": "red", "items": [{"id": "gone", "label": 1.0}]}
    Path("elsewhere.jsonl").write_text(json.dumps(judged) + "\n")
    with pytest.raises(SystemExit, match="2"):
        run(folder, tmp_path / "out", monkeypatch, *more)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("unlabelled_lists: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()
