"""The study of compression: rows, intervals and slices of a tiny checkpoint, and its script."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from jaxslm.data_files import Item, Judged, Query
from jaxslm.evaluate.compression import SLICES, slices_of, study
from jaxslm.evaluate.report import write_report
from tests.compress.tiny_compressor import compressor_checkpoint
from tests.train.toy import write_toy_data

SCRIPT = Path(__file__).parents[2] / "scripts" / "compression_study.py"


def test_queries_fall_into_their_slices() -> None:
    items = {
        str(number): Item(id=str(number), text=f"weld pipes {'using argon' if number < 3 else 'by hand'}")
        for number in range(20)
    }
    texts = {
        "skill": "argon welding",
        "number": "Lift 20 kg",
        "word": "Lead two teams",
        "place": "Weld in hospitals",
        "town": "Weld pipes in Oslo",
        "not": "Weld without gas",
        "non": "Work with non-ferrous metal",
        "plain": "Notify nobody of twofold pipes",
    }
    queries = [Query(query_id=name, query=text, items=(Judged(id="1", label=1.0),)) for name, text in texts.items()]
    assert slices_of(queries, items) == {
        "all": list(texts),
        "exact skill": ["skill"],
        "number": ["number", "word"],
        "place": ["place", "town"],
        "negation": ["not", "non"],
    }


@pytest.mark.slow
def test_the_script_writes_rows_that_a_report_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_data(tmp_path)
    arm = compressor_checkpoint(tmp_path / "arm", ks=(1, 2))
    options = ["--data", tmp_path, "--out", tmp_path / "study", "--limit", 5, "--candidates", 0, "--repeats", 1, arm]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result = json.loads((tmp_path / "study" / "compression.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == str(tmp_path / "study")
    text, *others = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["arm, text", "arm, k = 1", "arm, k = 2", "arm, k = 2, int8"]
    assert text["minus_text"] == {"mean": 0.0, "ci95": [0.0, 0.0], "queries": 5}
    for row in others:
        low, high = row["minus_text"]["ci95"]
        assert low <= row["minus_text"]["mean"] <= high
        assert row["minus_text"]["mean"] == pytest.approx(row["ndcg_at_10"] - text["ndcg_at_10"])
        assert row["items_per_s"] > 0
        assert row["slices"].keys() <= SLICES.keys()
        assert row["slices"]["all"]["ndcg_at_10"] == pytest.approx(row["ndcg_at_10"])
    assert [row["tokens_per_item"] for row in others] == [2, 3, 3]
    assert text["tokens_per_item"] > 15
    report = write_report([tmp_path / "study" / "compression.json"], tmp_path / "report").parent
    assert "arm, k = 2" in (report / "compression-frontier.svg").read_text()


def test_arms_are_compared_with_the_ranker_that_is_named(tmp_path: Path) -> None:
    items = {str(number): Item(id=str(number), text=f"text {number}") for number in range(8)}
    judged = (Judged(id="1", label=1.0), Judged(id="5", label=0.5))
    queries = [Query(query_id=name, query=f"text {name}", items=judged) for name in "ab"]
    arm = compressor_checkpoint(tmp_path / "arm", ks=(1, 2))
    other = compressor_checkpoint(tmp_path / "other", ks=(1,), seed=1)
    rows = study([arm], items, queries, full_text=other, candidates=8, repeats=1)["rows"]
    assert [row["name"] for row in rows][:2] == ["other, text", "arm, text"]
    assert rows[0]["minus_text"]["mean"] == 0
    assert rows[0]["tokens_per_item"] == rows[1]["tokens_per_item"] > rows[2]["tokens_per_item"]
    for row in rows:
        assert row["minus_text"]["mean"] == pytest.approx(row["ndcg_at_10"] - rows[0]["ndcg_at_10"])
