"""Bad input to the scripts: one line that names the thing and the rule, exit code 2. What a pruning study reuses."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.train.toy import toy_folder

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (
            "prune_study.py",
            "--dense no --data no --out o --calibration-tokens 0",
            "calibration_tokens: Input should be greater",
        ),
        (
            "prune_study.py",
            "--dense no --data no --out o --arm a drop_layers",
            "setting drop_layers: must be a.b=value",
        ),
        ("prune_study.py", "--dense no --data no --out o", "no: not a checkpoint"),
        (
            "prune_study.py",
            "--dense no --data no --out o --only oscar",
            "--only oscar: no such arm; there are: osscar; ",
        ),
        (
            "prune_study.py",
            "--dense no --data no --out o --only osscar flap --recover wanda --recovery c",
            "--recover wanda: no such arm; there are: osscar; flap",
        ),
        (
            "prune_study.py",
            "--dense no --data no --out o --arm a drop_layers=1 --arm b drop_layers=2 --only c",
            "--only c: no such arm; there are: a; b",
        ),
        ("prune_study.py", "--dense no --data no --out o --recover osscar", "--recover: needs --recovery"),
        ("prune_study.py", "--dense no --data no --out o --gradual", "--gradual: needs --recovery"),
        ("quality_study.py", "--quickstart no --out o --limit 0", "queries: Input should be greater"),
        ("quality_study.py", "--quickstart no --out o", "no/encoded.json: missing"),
        ("compression_study.py", "--data no --out o arm", "no: holds neither items.jsonl"),
    ],
)
def test_bad_input_is_one_line(
    script: str,
    options: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *options.split()])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script.removesuffix('.py')}: error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_pruning_study_takes_further_arms_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy, out = toy_folder(tmp_path / "toy", num_layers=1), tmp_path / "study"
    shutil.copy(toy / "train.jsonl", toy / "train-mixed.jsonl")

    def study(options: str) -> list[str]:
        arguments = f"--dense {toy}/tiny --data {toy} --out {out} --limit 2 --candidates 2 --speed-queries 1"
        arguments += f" --width-multiple 8 --calibration-tokens 500 {options}"
        monkeypatch.setattr(sys, "argv", ["prune_study.py", *arguments.split()])
        runpy.run_path(str(SCRIPTS / "prune_study.py"), run_name="__main__")
        return [row["name"] for row in json.loads((out / "result.json").read_text())["rows"]]

    def refused(options: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            study(options)
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert study("--mlp-keep 16 --only magnitude") == ["dense, dev", "magnitude, dev"]
    made = (out / "magnitude" / "manifest.json").stat().st_mtime_ns
    assert study("--mlp-keep 16 --only magnitude random") == ["dense, dev", "magnitude, dev", "random, dev"]
    assert (out / "magnitude" / "manifest.json").stat().st_mtime_ns == made
    before = (out / "result.json").read_bytes()
    assert "magnitude: made with another mlp_keep (" in refused("--mlp-keep 24 --only magnitude")
    with (toy / "train-mixed.jsonl").open("ab") as file:
        file.write((toy / "dev.jsonl").read_bytes())
    assert "magnitude: made with another calibration (" in refused("--mlp-keep 16 --only magnitude")
    assert (out / "result.json").read_bytes() == before
