"""The quickstart: all stages on made data, what a second run reuses, going on after Ctrl-C, what damage leads to."""

import json
import re
import runpy
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxslm import cli
from jaxslm.checkpoint import load_checkpoint, load_manifest, save_checkpoint
from jaxslm.errors import InputError
from jaxslm.quickstart import pipeline, run, serving
from jaxslm.quickstart.measure import DENSE, Contestant, quality
from jaxslm.quickstart.measure import evaluate as measure_quality
from jaxslm.quickstart.pipeline import Pipeline
from jaxslm.quickstart.settings import MeasureSettings, QuickstartSettings
from jaxslm.quickstart.stages import Stage, files_sha256, run_stages, seconds_by_stage
from jaxslm.score.scorer import load
from jaxslm.train import step
from tests.convert.test_gguf import write_gguf
from tests.tiny import tiny_config
from tests.train.test_loop import stop_after
from tests.train.toy import toy_folder, write_toy_data

SCRIPT = Path(__file__).parents[1] / "scripts" / "quality_study.py"
QUALITY = ("ndcg_at_10", "ndcg_ci95", "ndcg_minus_dense", "ndcg_minus_dense_ci95")
COUNTS = {"items": 40, "train_task_queries": 60, "train_dwa_queries": 0, "dev_queries": 10, "bls_queries": 0}
MODEL = tiny_config(
    "llama", width=64, num_layers=3, num_kv_heads=1, queries_per_kv=2, head_dim=16, mlp_width=64, max_positions=2048
)
BATCHES = (
    "steps=2",
    "save_every=1",
    "data.items_per_list=8",
    "data.hard_negatives=2",
    "data.random_negatives=2",
    "data.hard_negative_pool=0",
    "data.lists_per_batch=2",
    "data.tokens_per_batch=1800",
    "data.max_prefix_tokens=100",
    "data.max_item_tokens=60",
    "optimiser.warmup_steps=0",
)
SETTINGS = QuickstartSettings(
    encoder=(
        "steps=2",
        "save_every=1",
        "layers=2",
        "data.pairs_per_batch=4",
        "data.tokens_per_batch=800",
        "data.max_prefix_tokens=100",
        "data.max_item_tokens=60",
        "optimiser.warmup_steps=0",
    ),
    ranker=(*BATCHES, "prompt.max_tokens=168", "comparison_layer=true", "train_layers=1"),
    recover=BATCHES,
    compressor=(*BATCHES, "curriculum.projector_steps=1", "compressor.ks=[1, 2]", "evaluation_ks=[]"),
    mlp_keep=48,
    width_multiple=16,
    calibration_tokens=600,
    measure=MeasureSettings(queries=3, candidates=4, speed_requests=1, speed_items=4, repeats=1),
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("encoder", "ranker", "compressor"):
        monkeypatch.setattr(f"jaxslm.train.{name}.make_mesh", lambda: step.make_mesh(jax.devices()[:1]))


def make_demo(data: Path) -> dict[str, Any]:
    """Fills a folder like `fetch_demo` does: a tiny model, forty items, sixty queries to learn from, ten held out."""
    if not data.is_dir():
        (data / "jobs").mkdir(parents=True)
        (data / "model").mkdir()
        write_gguf(data / "model" / "tiny.gguf", MODEL)
        write_toy_data(data / "jobs")
        shutil.copy(data / "jobs" / "train.jsonl", data / "jobs" / "train-mixed.jsonl")
    return {"counts": COUNTS}


def quickstart(out: Path) -> dict[str, Any]:
    return run(out, serve=False, fetch=make_demo, settings=SETTINGS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a whole run, and what it returned."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    with pytest.MonkeyPatch.context() as patched:
        for name in ("encoder", "ranker", "compressor"):
            patched.setattr(f"jaxslm.train.{name}.make_mesh", lambda: step.make_mesh(jax.devices()[:1]))
        return out, quickstart(out)


@pytest.mark.slow
def test_the_whole_run(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    assert result["finished"]
    rows = {row["name"]: row for row in result["rows"]}
    measured = ["full text", "pruned", "compressed k=2", "compressed k=1"]
    references = ["bi-encoder", "BM25"]
    assert list(rows) == [*measured, "bi-encoder", "random order", "BM25"]
    assert all(0 <= row["ndcg_ci95"][0] <= row["ndcg_at_10"] <= row["ndcg_ci95"][1] <= 1 for row in rows.values())
    assert {name for name, row in rows.items() if row.get("items_per_s", 0) > 0} == {*measured, *references}
    curves = {name: row["calibration"] for name, row in rows.items() if "calibration" in row}
    assert list(curves) == measured  # a cosine is no probability
    assert {curve["pairs"] for curve in curves.values()} == {result["conditions"]["candidates"]}
    assert [rows[f"compressed k={k}"]["tokens_per_item"] for k in (1, 2)] == [2, 3]
    assert rows["full text"]["tokens_per_item"] == rows["pruned"]["tokens_per_item"] > 3
    assert rows["pruned"]["parameters"] < rows["full text"]["parameters"]
    assert rows["pruned"]["gflop_per_item"] < rows["full text"]["gflop_per_item"]
    assert "ndcg_minus_dense_ci95" in rows["compressed k=1"]
    assert result["conditions"]["queries"] == 3
    seconds = result["conditions"]["seconds"]
    assert {"Data", "Ranker", "Server"} <= seconds.keys()
    assert seconds["Ranker"] > 0
    page = Path(result["report"]).read_text()
    assert "compressed k=1" in page
    assert "Reliability of P(yes)" in page
    assert load(out / "ranker").config.model.num_layers == 3
    widths = load(out / "pruned").config.model.mlp_width_by_layer
    assert sum(widths) == 3 * 48
    assert json.loads((out / "hf" / "config.json").read_text())["intermediate_size"] == max(widths)


@pytest.mark.slow
def test_quality_on_a_split_is_what_the_run_measured(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, result = finished
    study = runpy.run_path(str(SCRIPT))["study"]
    studied = study(Pipeline(out, make_demo, SETTINGS), ["dev"], SETTINGS.measure, tmp_path / "study")
    assert studied == json.loads((tmp_path / "study" / "result.json").read_text())
    measured = {f"{row['name']}, dev": row for row in result["rows"]}
    assert [row["name"] for row in studied["rows"]] == list(measured)
    for row in studied["rows"]:
        assert row["queries"] == 3
        assert {name: row.get(name) for name in QUALITY} == {name: measured[row["name"]].get(name) for name in QUALITY}


@pytest.mark.slow
def test_the_server_answers_each_kind_of_request(finished: tuple[Path, dict[str, Any]]) -> None:
    answers = [each["answer"] for each in json.loads((finished[0] / "served.json").read_text()).values()]
    texts, stored, reranked = answers
    expected = load(finished[0] / "compressed").score_request(serving.QUERY, list(serving.TEXTS)).log_odds
    assert texts["logits"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert set(stored["status"]) == {"embedding"}
    assert len(stored["logits"]) == serving.STORED
    assert [each["index"] for each in reranked["results"]] == (-expected).argsort(kind="stable").tolist()


@pytest.mark.slow
def test_a_second_run_shows_the_report_in_seconds(
    finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = finished
    start = time.perf_counter()
    assert quickstart(out) == result
    assert time.perf_counter() - start < 5
    shown = capsys.readouterr().err
    assert "Done already" in shown
    assert "full text" in shown
    assert "index.html" in shown


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in training ends the run between two updates; the same command goes on and begins no stage anew."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        assert quickstart(out) == {"finished": False, "out": str(out)}
    assert (out / "smollm2").is_dir()
    assert not (out / "encoder").exists()
    with monkeypatch.context() as patched:
        stop_after(patched, 1)  # in the last update: the stage ends well, the next one must not begin
        patched.setattr(pipeline, "convert", lambda *_, **__: pytest.fail("the model was converted again"))
        patched.setattr(pipeline, "train_ranker", lambda *_: pytest.fail("the next stage began"))
        assert quickstart(out) == {"finished": False, "out": str(out)}
    assert (out / "encoder").is_dir()
    lines = (out / "encoder.training" / "log.jsonl").read_text().splitlines()
    assert [entry["step"] for line in lines if "loss" in (entry := json.loads(line))] == [1, 2]


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "ranker")
    shutil.copytree(out / "encoder", out / "ranker")
    with pytest.raises(InputError, match=r"ranker: made from another encoder than the one beside it; remove it"):
        quickstart(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remade", "told"), [("compressed", "encoded.json"), ("recovered", "done"), ("encoder", "done"), ("ranker", "done")]
)
def test_numbers_of_another_checkpoint_are_refused(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, remade: str, told: str
) -> None:
    """A checkpoint that was made anew of the same parent, and all checkpoints of it too: the numbers are the old's."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    remake(out / remade)
    with pytest.raises(InputError, match=rf"{told}: of another {remade} than the one beside it; remove it"):
        quickstart(out)


@pytest.mark.slow
def test_quality_is_measured_anew_where_the_checkpoint_is_another(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    remake(out / "ranker")
    before = {path.name: path.read_bytes() for path in (out / "evaluations").glob("*.json")}
    Pipeline(out, make_demo, SETTINGS).evaluate("dev", SETTINGS.measure, out / "evaluations")
    after = {path.name: path.read_bytes() for path in (out / "evaluations").glob("*.json")}
    assert {name for name in after if after[name] != before[name]} == {"full-text.json"}


@pytest.mark.parametrize("changed", [{"candidates": 8}, {"queries": 3}, {"split": "held-out"}, {"data": True}], ids=str)
def test_quality_of_other_lists_is_measured_anew(tmp_path: Path, changed: dict[str, Any]) -> None:
    """Rankers in a table were measured on the same lists, also where a run went on with other settings or data."""
    toy, folder = toy_folder(tmp_path / "toy", num_layers=1), tmp_path / "evaluations"
    shutil.copy(toy / "dev.jsonl", toy / "held-out.jsonl")
    contestants = [Contestant(name, toy / "tiny") for name in (DENSE, "pruned")]

    def measure(count: int, split: str = "dev", **settings: int) -> dict[str, Any]:
        chosen = MeasureSettings(**({"queries": 2, "candidates": 4} | settings))
        measure_quality(contestants[:count], toy / "tiny", 40, toy, chosen, folder, split)
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    before = measure(1)
    assert len(before) == 2
    assert before.items() <= measure(2).items()
    if changed.pop("data", False):
        (toy / "dev.jsonl").write_text("".join((toy / "dev.jsonl").read_text().splitlines(keepends=True)[:-1]))
    after = measure(2, **changed)
    assert all(after[name] != before[name] for name in before)
    rows, conditions = quality(contestants, folder)
    assert {row["candidates"] for row in rows[:3]} == {conditions["candidates"]}


@pytest.mark.slow
def test_the_report_is_of_the_numbers_that_are_there(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Speed that is measured again is in the report; other settings measure anew what is of them, and its report."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "speed.json").unlink()
    rows = {row["name"]: row for row in quickstart(out)["rows"]}
    speeds = json.loads((out / "speed.json").read_text())["rows"]
    assert {name: rows[name]["items_per_s"] for name in speeds} == {
        name: row["items_per_s"] for name, row in speeds.items()
    }
    fewer = SETTINGS.model_copy(update={"measure": SETTINGS.measure.model_copy(update={"queries": 2})})
    assert run(out, serve=False, fetch=make_demo, settings=fewer)["conditions"]["queries"] == 2


def test_a_result_of_something_else_is_made_anew(tmp_path: Path) -> None:
    """Also after a stop that came while it was made anew."""
    numbers, page = tmp_path / "numbers", tmp_path / "report"
    (numbers / "dev").mkdir(parents=True)

    def make(stop: bool = False) -> None:
        if stop:
            raise KeyboardInterrupt
        shutil.copytree(numbers, page)

    def go(act: Callable[[], None] = make) -> None:
        stage = Stage("Report", "", None, act, page, made_of=lambda: files_sha256([numbers]))
        run_stages([stage], tmp_path)

    for content in ("1", "2"):
        (numbers / "dev" / "speed.json").write_text(content)
        go()
        assert (page / "dev" / "speed.json").read_text() == content
    go(lambda: pytest.fail("the report was made again"))
    (numbers / "dev" / "speed.json").write_text("3")
    with pytest.raises(KeyboardInterrupt):
        go(lambda: make(stop=True))
    (numbers / "dev" / "speed.json").write_text("2")
    go()
    assert (page / "dev" / "speed.json").read_text() == "2"


def remake(checkpoint: Path) -> None:
    """Changes the weights of a checkpoint, and what its children say of it."""
    old = load_checkpoint(checkpoint, extra=tuple(load_manifest(checkpoint).extra))
    shutil.rmtree(checkpoint)
    new = save_checkpoint(
        checkpoint,
        old.config,
        jax.tree.map(lambda leaf: leaf * 1.5, old.params),
        old.tokenizer_files,
        source=old.manifest.source,
        parent=old.manifest.parent,
        extra=old.extra,
        compressor=old.manifest.compressor,
    )
    for manifest in checkpoint.parent.glob("*/manifest.json"):
        manifest.write_text(manifest.read_text().replace(old.manifest.params_sha256, new.params_sha256))


@pytest.mark.slow
def test_damaged_results_are_named(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results\.json: damaged .*; remove it"):
        quickstart(out)


def test_damage_of_the_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "stages.jsonl").write_text('{"stage": "Data", "seconds": "many"}\n')
    with pytest.raises(InputError, match=r"stages\.jsonl: damaged; remove it"):
        seconds_by_stage(tmp_path)


@pytest.mark.slow
def test_the_server_stays_until_ctrl_c(
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, urls = finished[0], []

    def ready(url: str) -> int:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=60) as answer:
            return int(answer.status)

    def wait() -> None:
        told = re.search(r"Try it: (http://[\d.]+:\d+) in a browser", " ".join(capsys.readouterr().err.split()))
        assert told
        urls.append(told[1])
        assert ready(told[1]) == 200
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "_wait_for_ctrl_c", wait)
    serving.try_server(out / "compressed", out / "store-k2", out / "demo/jobs/items.jsonl", tmp_path, stay=True)
    assert "Stopping the server." in capsys.readouterr().err
    with pytest.raises(urllib.error.URLError):
        ready(urls[0])


def command_line(out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs `jaxslm quickstart --no-serve`; returns its exit code."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # tests leave the user's cache folder alone
    monkeypatch.setattr(sys, "argv", ["jaxslm", "quickstart", "--out", str(out), "--no-serve"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_an_output_that_is_no_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert command_line(tmp_path / "out", monkeypatch) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"jaxslm: error: {tmp_path}/out: cannot create the folder (File exists)"
    assert (tmp_path / "out").read_text() == "mine"


def test_a_catalogue_is_done_when_its_file_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill within the write leaves nothing that would count as done."""

    def killed(self: Path, text: str, **_: Any) -> None:
        self.write_bytes(text.encode()[:9])
        raise KeyboardInterrupt

    stages = {stage.title: stage for stage in Pipeline(tmp_path, make_demo, SETTINGS).stages()}
    monkeypatch.setattr(pipeline, "encode_file", lambda *_, **__: {"items": 40})
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            stages["Catalogue"].run()
    assert not (tmp_path / "encoded.json").exists()
    stages["Catalogue"].run()
    assert json.loads((tmp_path / "encoded.json").read_text()) == {"items": 40}


def test_the_command_line_ends_with_the_reports_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"name": "full text", "ndcg_at_10": 0.5, "ndcg_ci95": [0.4, 0.6]}
    said = {"queries": 3, "candidates": 4, "candidate_list": "made up", "conventions": "none", "speed": "none"}

    def stages(self: Pipeline) -> list[Stage]:
        content = {"rows": [row], "conditions": said | {"seconds": {"All": 90}}}
        return [Stage("All", "", None, lambda: self.results.write_text(json.dumps(content)), self.results)]

    monkeypatch.setattr(Pipeline, "stages", stages)
    assert command_line(tmp_path / "out", monkeypatch) == 0
    printed = capsys.readouterr()
    page = tmp_path / "out" / "report" / "index.html"
    assert f"In all 1.5 minutes. Report: {page.as_uri()}\n" in printed.err
    answer = json.loads(printed.out)
    assert answer["finished"]
    assert answer["report"] == str(page)
    assert answer["rows"] == [row]


def test_an_interrupted_command_ends_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "stages", lambda self: [Stage("All", "", None, interrupted, self.results)])
    assert command_line(tmp_path / "out", monkeypatch) == 130
    printed = capsys.readouterr()
    assert "the same command goes on" in " ".join(printed.err.split())
    assert json.loads(printed.out) == {"finished": False, "out": str(tmp_path / "out")}
