"""The quickstart: its stages on made data, what a second run reuses, and what it says about damage."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from jaxslm import quickstart
from jaxslm.errors import InputError
from tests.convert.test_gguf import write_gguf
from tests.tiny import tiny_config

COUNTS = {"items": 8, "train_task_queries": 1, "train_dwa_queries": 1, "dev_queries": 1, "bls_queries": 6}


def make_demo(data: Path) -> dict[str, Any]:
    """Fills a folder like `fetch_demo` does: a tiny model, eight postings and six queries."""
    if not data.is_dir():
        (data / "jobs").mkdir(parents=True)
        (data / "model").mkdir()
        write_gguf(data / "model" / "tiny.gguf", tiny_config("llama", max_positions=2048))
        words = ("baker", "nurse", "pilot", "truck", "judge", "diver", "actor", "miner")
        items = [{"id": f"i{n}", "title": word, "text": f"The work of a {word}."} for n, word in enumerate(words)]
        queries = [
            {"query_id": f"q{n}", "query": word, "items": [{"id": f"i{n}", "label": 1.0}]}
            for n, word in enumerate(words[:6])
        ]
        (data / "jobs" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        (data / "jobs" / "bls.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    return {"counts": COUNTS}


def test_the_whole_run_and_a_second_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = quickstart.run(tmp_path / "out", make_demo)
    shown = capsys.readouterr().err
    assert [row["name"] for row in result["rows"]] == ["random order", "BM25", quickstart.MODEL_NAME]
    assert result["conditions"]["queries"] == 6
    assert result == json.loads((tmp_path / "out" / "results.json").read_text())
    for text in ("P(yes) =", "untrained for ranking", "BM25", "parameters"):
        assert text in shown
    start = time.perf_counter()
    assert quickstart.run(tmp_path / "out", make_demo) == result
    assert time.perf_counter() - start < 5
    assert "untrained for ranking" in capsys.readouterr().err


def test_damaged_results_are_named(tmp_path: Path) -> None:
    quickstart.run(tmp_path / "out", make_demo)
    (tmp_path / "out" / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results\.json: damaged .*; remove it"):
        quickstart.run(tmp_path / "out", make_demo)
