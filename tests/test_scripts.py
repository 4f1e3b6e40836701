"""Bad input to the scripts: one line that names the thing and the rule, exit code 2."""

import runpy
import sys
from pathlib import Path

import pytest

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
