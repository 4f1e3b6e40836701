"""The script for a GPU runs from end to end with small shapes on a CPU, and says what it could not measure."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gpu"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(SCRIPT, monkeypatch)


def run(out: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Runs the script on one CPU device; returns its output and its result files."""
    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(out), *arguments]
    found = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout, {file.stem: json.loads(file.read_text()) for file in out.iterdir()}


@pytest.mark.slow
def test_small_shapes_give_the_table_and_a_file_of_each_workload(tmp_path: Path) -> None:
    output, files = run(tmp_path / "out", "--workloads", "latent_1")
    assert files.keys() == {"latent_1"}
    result = files["latent_1"]
    assert {"date", "command", "jax", "python", "ceilings"} <= result.keys()
    assert result["ceilings"]["dtype"] == "bfloat16"
    assert [row["max_tokens"] for row in result["sizes"]] == [64, 32]
    assert all(row["items_per_s"] > 0 and row["max_abs_diff"] < 0.01 for row in result["sizes"])
    assert result["peers"] == result["implementations"] == []
    assert [line.split()[0] for line in output.splitlines()] == ["items/s", "latent_1"]
    assert "100,000" in output


@pytest.mark.slow
def test_the_scoring_step_is_measured_with_and_without_kernels(script: ModuleType, tmp_path: Path) -> None:
    """A CPU has XLA's row alone; where both are, the table has their ratio."""
    _, files = run(tmp_path / "out", "--workloads", "latent_8")
    assert [row["implementation"] for row in files["latent_8"]["implementations"]] == ["xla"]
    parts = files["latent_8"]
    xla = parts["implementations"][0]
    parts["implementations"].append(xla | {"implementation": "mosaic_gpu", "items_per_s": 1.5 * xla["items_per_s"]})
    assert script.table({"latent_8": parts}).splitlines()[-1].endswith("1.50 (target 1.25)")


@pytest.mark.slow
def test_text_is_compared_with_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    output, files = run(tmp_path / "out", "--workloads", "text_300")
    (peers,) = files["text_300"]["peers"]
    assert peers["dtype"] == "bfloat16"
    assert {row["name"].partition(",")[0] for row in peers["rows"]} == {
        "jaxslm",
        "transformers sdpa",
        "transformers eager",
    }
    assert "(target 1.5)" in output


def test_a_failing_part_and_a_part_without_time_cost_only_themselves(script: ModuleType, tmp_path: Path) -> None:
    def fails(name: str) -> dict[str, Any]:
        raise RuntimeError(f"{name}: out of memory")

    steps = script.Run(tmp_path, 80, {"date": "today"})
    steps.add("summary", "sizes", fails)
    steps.add("summary", "sizes", lambda name: {"items_per_s": 7.0})
    steps.add("summary", "peers", fails)
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert saved["date"] == "today"
    assert saved["sizes"][0]["error"] == "RuntimeError: summary: out of memory"
    assert saved["sizes"][1]["items_per_s"] == 7
    assert "left out" in saved["peers"][0]["error"]
    steps.add("full_text", "sizes", fails)
    rows = script.table(steps.results).splitlines()[1:]
    assert rows[0].split()[:2] == ["summary", "7"]
    assert rows[1].split()[:2] == ["full_text", "nan"]


def test_missing_packages_are_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "NEEDED", ["json", "no_such_package"])
    monkeypatch.setattr(sys, "argv", ["bench_gpu"])
    assert script.main() == 2
    assert capsys.readouterr().err.splitlines() == [
        "bench_gpu: missing Python packages: no_such_package; see the head of this file"
    ]


def test_a_machine_without_an_accelerator_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")
    monkeypatch.setattr(sys, "argv", ["bench_gpu"])
    assert script.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no accelerator" in line
