"""Runs from files compare as runs in memory do; a checkpoint is evaluated as ranker and as bi-encoder on one list."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxslm.errors import InputError
from jaxslm.evaluate.agreement import kendall_tau
from jaxslm.evaluate.checkpoints import evaluate_checkpoint
from jaxslm.evaluate.compare import compare_run_files
from jaxslm.evaluate.metrics import Run
from jaxslm.evaluate.significance import compare_runs
from jaxslm.evaluate.trec import read_run, write_run
from tests.tiny import tiny_checkpoint, tiny_config

GENERATOR = np.random.default_rng(0)
LABELS = {f"q{n}": {f"i{n}": 1.0, f"i{n + 1}": 0.5} for n in range(12)}
GOOD: Run = {query: {f"i{n}": float(n == int(query[1:])) for n in range(13)} for query in LABELS}
RANDOM: Run = {query: {f"i{n}": float(GENERATOR.normal()) for n in range(13)} for query in LABELS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    queries = [
        {"query_id": query, "query": "red job", "items": [{"id": key, "label": label} for key, label in judged.items()]}
        for query, judged in LABELS.items()
    ]
    items = [{"id": f"i{n}", "text": " ".join(GENERATOR.choice(["red", "blue", "job"], 5))} for n in range(13)]
    for name, rows in (("dev", queries), ("items", items)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_run(folder / "good.run", GOOD)
    write_run(folder / "random.run", RANDOM)
    return folder


def test_files_compare_as_runs_do(data: Path) -> None:
    found = compare_run_files(data / "good.run", data / "random.run", data, "dev")
    for measure, numbers in found["measures"].items():
        expected = compare_runs(LABELS, GOOD, RANDOM, measure)
        assert numbers["difference"] == pytest.approx(numbers["first"] - numbers["second"])
        assert numbers["difference"] == pytest.approx(expected.mean)
        assert numbers["ci95"] == [expected.low, expected.high]
    assert found["queries"] == 12
    assert found["measures"]["rr_at_10"]["first"] == 1
    same = compare_run_files(data / "good.run", data / "good.run", data, "dev")
    assert all(numbers["ci95"] == [0, 0] for numbers in same["measures"].values())
    assert same["kendall_tau"] == {"mean": 1, "ci95": [1, 1]}
    assert abs(found["kendall_tau"]["mean"]) < 0.5


def test_tau_to_a_reference_is_paired_by_query(data: Path, tmp_path: Path) -> None:
    """A run keeps its own order best; the sides change the sign; queries that the reference leaves out do not count."""
    write_run(tmp_path / "half.run", {query: RANDOM[query] for query in list(RANDOM)[:6]})
    own, turned = (
        compare_run_files(data / first, data / second, data, "dev", tmp_path / "half.run")["kendall_tau_to_reference"]
        for first, second in (("random.run", "good.run"), ("good.run", "random.run"))
    )
    taus = [kendall_tau(run, read_run(tmp_path / "half.run")) for run in (RANDOM, GOOD)]
    assert [own["first"], own["second"]] == pytest.approx([tau.mean for tau in taus if tau])
    assert own["first"] == 1
    assert own["difference"] == pytest.approx(own["first"] - own["second"])
    assert own["ci95"][0] > 0
    assert own["queries"] == 6
    assert turned["difference"] == -own["difference"]
    assert compare_run_files(data / "good.run", data / "random.run", data, "dev")["kendall_tau_to_reference"] is None
    write_run(tmp_path / "other.run", {"elsewhere": {"i1": 1.0}})
    with pytest.raises(InputError, match="no query whose order both runs can be compared with"):
        compare_run_files(data / "good.run", data / "random.run", data, "dev", tmp_path / "other.run")


def test_runs_of_other_queries_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "few.run", {query: GOOD[query] for query in list(GOOD)[:5]})
    with pytest.raises(InputError, match="cover different queries: 7 only in the first"):
        compare_run_files(data / "good.run", tmp_path / "few.run", data, "dev")
    write_run(tmp_path / "other.run", {"elsewhere": {"i1": 1.0}})
    with pytest.raises(InputError, match=r"dev.jsonl: holds none of the 1 queries of .*other.run"):
        compare_run_files(data / "good.run", tmp_path / "other.run", data, "dev")
    write_run(tmp_path / "more.run", {**GOOD, "elsewhere": {"i1": 1.0}})
    capsys.readouterr()
    assert compare_run_files(tmp_path / "more.run", data / "good.run", data, "dev")["queries"] == 12
    assert "dev.jsonl: lacks 1 of the 13 queries of " in capsys.readouterr().err
    with pytest.raises(InputError, match="no such file"):
        compare_run_files(tmp_path / "none.run", data / "good.run", data, "dev")


def test_a_checkpoint_is_evaluated_as_ranker_and_as_bi_encoder_on_one_list(data: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "ckpt", tiny_config("llama", num_layers=1), template="yes-no", instruction="?")
    results: dict[str, dict[str, Any]] = {}
    for mode, options in (("text", {"dtype": "bfloat16"}), ("bi-encoder", {"max_item_tokens": 16})):
        run = tmp_path / f"{mode}.run"
        results[mode] = evaluate_checkpoint(model, data, "dev", mode=mode, candidates=5, run_out=run, **options)  # type: ignore[arg-type]
    conditions = [result["conditions"] for result in results.values()]
    assert [each["mode"] for each in conditions] == ["text", "bi-encoder"]
    assert conditions[1]["max_item_tokens"] == 16
    assert [each["dtype"] for each in conditions] == ["bfloat16", "float32"]
    assert conditions[0]["candidates"] == conditions[1]["candidates"]
    assert results["text"]["rows"][1] == results["bi-encoder"]["rows"][1]  # BM25 on the same candidates
    runs = [read_run(tmp_path / f"{mode}.run") for mode in results]
    assert all(runs[0][query].keys() == runs[1][query].keys() for query in LABELS)
    assert all(-1.001 <= cosine <= 1.001 for row in runs[1].values() for cosine in row.values())
    assert compare_run_files(tmp_path / "text.run", tmp_path / "bi-encoder.run", data, "dev")["queries"] == 12
    with pytest.raises(InputError, match="max_item_tokens is the bi-encoder's"):
        evaluate_checkpoint(model, data, "dev", max_item_tokens=16)


def test_a_run_that_cannot_be_written_is_told_before_anything_is_scored(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's name is the tag, whatever it is; an id with white space or a path below a file is refused."""
    model = tiny_checkpoint(tmp_path / "my ckpt", tiny_config("llama", num_layers=1), template="yes-no")
    for folder, out in ((model, tmp_path / "spaced.run"), (Path(), tmp_path / "here.run")):
        monkeypatch.chdir(model)
        assert evaluate_checkpoint(folder, data, "dev", limit=1, run_out=out)["rows"][-1]["name"] == "my ckpt"
        assert out.read_text().split("\n")[0].endswith(" my-ckpt")
    spaced = tmp_path / "data"
    spaced.mkdir()
    for name in ("items", "dev"):
        content = (data / f"{name}.jsonl").read_text()
        (spaced / f"{name}.jsonl").write_text(content.replace('"i3"', '"i 3"'))
    monkeypatch.setattr("jaxslm.score.scorer.Ranker.log_odds", lambda *arguments: pytest.fail("must not score"))
    with pytest.raises(InputError, match="item id 'i 3' is empty or holds white space"):
        evaluate_checkpoint(model, spaced, "dev", run_out=tmp_path / "new.run")
    with pytest.raises(InputError, match=r"cannot create it \(.*here.run is not a folder\)"):
        evaluate_checkpoint(model, data, "dev", run_out=tmp_path / "here.run" / "new.run")
    assert not (tmp_path / "new.run").exists()
