"""Growth curves: every point is measured and plotted, and its arithmetic is that of the cost card."""

import json
from pathlib import Path

import pytest

from jaxslm.bench import growth, workloads
from jaxslm.bench.growth import Curve, bench_growth
from jaxslm.bench.workloads import Workload
from jaxslm.errors import InputError
from jaxslm.model.cost import scoring_flops
from tests.tiny import tiny_config

CURVES = (
    Curve("items", "items per request", (1, 40), (Workload("short", 6, 5, 0), Workload("long", 6, 20, 0))),
    Curve("prefix_tokens", "prefix tokens", (8, 70), (Workload("short", 0, 5, 4),)),
)


@pytest.fixture(autouse=True)
def tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads.MODELS, "tiny", tiny_config(num_layers=3))


@pytest.mark.slow
def test_every_point_is_measured_and_plotted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "growth"
    answer = bench_growth("tiny", out, layers=1, repeats=2, curves=CURVES)
    found = json.loads((out / "growth.json").read_text())
    rows = {(row["axis"], row["line"], row["at"]): row for row in found["rows"]}
    expected = {("items", line, at) for line in ("short", "long") for at in (1, 40)}
    assert rows.keys() == expected | {("prefix_tokens", "short", at) for at in (8, 70)}
    one_layer = tiny_config(num_layers=1)
    for (axis, line, at), row in rows.items():
        T, J, P = {"short": 5, "long": 20}[line], at if axis == "items" else 4, at if axis == "prefix_tokens" else 6
        assert row["gflop_per_item"] * 1e9 * J == pytest.approx(scoring_flops(one_layer, P, T, J, shared=True))
        assert row["items_per_s_p5"] <= row["items_per_s"] <= row["items_per_s_p95"]
        assert row["timings"] == 2
    for axis, line in (("items", "short"), ("items", "long"), ("prefix_tokens", "short")):
        shares = [row["of_fastest"] for key, row in rows.items() if key[:2] == (axis, line)]
        assert max(shares) == 1
        assert min(shares) > 0
    assert answer["points"] == 6
    assert found["conditions"]["layers"] == 1
    assert {file.name for file in out.iterdir()} == {
        "growth.json",
        *(f"{axis}.{suffix}" for axis in ("items", "prefix_tokens") for suffix in ("svg", "png")),
    }
    svg = (out / "items.svg").read_text()
    assert "prefers-color-scheme: dark" in svg
    assert all(name in svg for name in ("short", "long", "items per request"))
    with pytest.raises(InputError, match="exists"):
        bench_growth("tiny", out)


def test_slow_points_are_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(growth, "ENOUGH_S", 1.0)
    monkeypatch.setattr(growth, "timed", lambda call: 2.0 if call() is not None else 0.0)
    bench_growth("tiny", tmp_path / "growth", layers=1, curves=CURVES[1:])
    rows = json.loads((tmp_path / "growth" / "growth.json").read_text())["rows"]
    assert [row["items_per_s"] for row in rows] == [2.0, 2.0]
