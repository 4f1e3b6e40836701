"""Tuning keeps only tiles whose result is right, and the table it writes is checked when it is read."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxslm.bench import in_turn
from jaxslm.bench.in_turn import InTurn
from pallas_kernels import tuning
from pallas_kernels.dispatch import MOSAIC_GPU, XLA
from pallas_kernels.gated_mlp import reference
from pallas_kernels.gated_mlp.specs import SMALL
from pallas_kernels.specs import OPS, TOLERANCE, worst_row_error
from tests.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "tune_kernels.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(SCRIPT, monkeypatch)


def test_tiles_with_a_wrong_result_are_reported_and_not_written(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The wrong ones are the fastest here."""

    def run_tiles(x: Any, gate: Any, up: Any, *, tiles: dict[str, int]) -> Any:
        if tiles["f"] == 1:
            raise ValueError("does not compile")
        h = reference.gated_mlp(x, gate, up)
        return h.at[-1, :8].mul(1.5) if tiles["f"] == 2 else h

    seconds = {None: 4.0, 2: 1.0, 3: 3.0, 4: 2.0}

    class Timed(InTurn):
        def __init__(self, call: Any, arguments: tuple[Any, ...]) -> None:
            super().__init__(call, arguments)
            self._tile = getattr(call, "keywords", {}).get("tiles", {}).get("f")

        def run(self, repeats: int) -> tuple[jax.Array, float]:
            return super().run(repeats)[0], seconds[self._tile]

    monkeypatch.setattr(in_turn, "IN_TURN", 2)
    monkeypatch.setattr(script, "InTurn", Timed)
    spec = replace(SMALL[1], tiles=[{"f": f} for f in (1, 2, 3, 4)], run_tiles=run_tiles)
    row = script.Trial(spec).tune("a GPU", 1)
    assert (row.fastest, row.tiles, row.seconds) == (MOSAIC_GPU, {"f": 4}, {XLA: 4.0, MOSAIC_GPU: 2.0})
    said = capsys.readouterr().err.splitlines()
    assert "{'f': 1}: left out: does not compile" in said[0]
    assert "{'f': 2}: left out: differs from XLA's result by" in said[1]
    assert len(said) == 3
    row = script.Trial(replace(spec, tiles=[{"f": 2}])).tune("a GPU", 1)
    assert (row.fastest, row.tiles, row.seconds) == (XLA, {}, {XLA: 4.0})


def test_one_wrong_row_among_many_is_an_error() -> None:
    expected = np.random.default_rng(0).standard_normal((4096, 2, 64))
    found = expected.copy()
    assert worst_row_error(found, expected) == 0
    found[4000] = found[4001]
    assert worst_row_error(found, expected) > TOLERANCE
    assert worst_row_error(found, expected, padding=96) == 0
    found[0, 0, 0] = np.nan
    assert worst_row_error(found, expected, padding=96) == float("inf")
    assert worst_row_error(np.ones((2, 3)), np.zeros((2, 3))) > TOLERANCE


def test_without_a_gpu_one_line_says_so() -> None:
    found = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith("tune_kernels: kernels need a Hopper GPU and this is ")


def test_the_tables_size_is_checked_before_anything_is_measured(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tuning.Row("gated_mlp", "another", "bfloat16", {"M": 1, "D": 64, "F": 128}, XLA, {}, {XLA: 1.0})
    monkeypatch.setattr(tuning, "table", lambda: (row,) * tuning.MAX_ROWS)
    monkeypatch.setattr(script, "is_hopper", lambda device: True)
    monkeypatch.setattr(script, "Trial", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["tune_kernels"])
    with pytest.raises(ValueError, match="at most 50"):
        script.main()


def test_what_is_measured_stays_if_tuning_is_stopped(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And beside it the rows of other devices and ops, and what was measured before of the rest."""
    spec_rows = [tuning.Row("gated_mlp", "cpu", "bfloat16", dict(spec.shape), XLA, {}, {XLA: 1.0}) for spec in SMALL]
    another = [replace(spec_rows[0], device="another"), replace(spec_rows[0], op="prefix_item_attention")]
    file = tmp_path / "tuning.json"
    tuning.write([*another, *spec_rows], file)
    there = {"table": lambda: tuning.table(file), "write": lambda rows: tuning.write(rows, file)}
    monkeypatch.setattr(script, "tuning", SimpleNamespace(**(vars(tuning) | there)))

    class Stopped:
        def __init__(self, spec: Any) -> None:
            self.spec = spec

        def tune(self, device: str, repeats: int) -> tuning.Row:
            if self.spec is SMALL[2]:
                raise KeyboardInterrupt
            return replace(next(row for row in spec_rows if row.shape == self.spec.shape), fastest=MOSAIC_GPU)

    monkeypatch.setattr(script, "is_hopper", lambda device: True)
    monkeypatch.setattr(script, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(script, "specs", lambda op: SMALL)
    monkeypatch.setattr(script, "Trial", Stopped)
    monkeypatch.setattr(sys, "argv", ["tune_kernels", "--op", "gated_mlp"])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    new = [replace(row, fastest=MOSAIC_GPU) for row in spec_rows[:2]]
    assert tuning.table(file) == (*another, *new, *spec_rows[2:])


@pytest.mark.parametrize("op", OPS)
def test_the_names_of_tiles_are_those_of_the_kernel(op: str) -> None:
    kernel = import_module(f"pallas_kernels.{op}.mosaic_gpu")
    assert tuning.TILES[op] == tuple(field.name for field in fields(kernel.Tiles))
    assert tuple(tuning.TILES) == OPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "softmax"}, r"row 2: op 'softmax': must be one of gated_mlp, prefix_item_attention"),
        ({"fastest": "mosaic"}, r"row 2: fastest 'mosaic': must be one of xla, mosaic_gpu"),
        ({"tiles": {"f": 64, "k": 2}}, r"row 2: tiles: 'k' is none of gated_mlp's, which are f, d, stages"),
        ({"tiles": {"f": "64"}}, r"row 2: tiles: f='64' must be a whole number"),
        ({"tiles": [64]}, r"row 2: tiles must be numbers by name"),
        ({"shape": {"M": 0.5}}, r"row 2: shape: M=0.5 must be a whole number"),
    ],
)
def test_a_row_with_a_wrong_value_names_itself(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = {"op": "gated_mlp", "device": "a GPU", "dtype": "bfloat16", "shape": {"M": 1, "D": 64, "F": 128}}
    row |= {"fastest": MOSAIC_GPU, "tiles": {"f": 64, "stages": 4}, "seconds": {XLA: 1.0}}
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps({"rows": [row]}))
    assert tuning.table(file)[0].tiles == {"f": 64, "stages": 4}
    other = tmp_path / "damaged.json"
    other.write_text(json.dumps({"rows": [row, row | change]}))
    with pytest.raises(ValueError, match=rf"damaged\.json: {message}"):
        tuning.table(other)
