"""Which implementation runs: by name, by measurement, and never in silence."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import dispatch, tuning
from pallas_kernels.dispatch import INTERPRETED, MOSAIC_GPU, XLA, choose, explain, target_device
from pallas_kernels.tuning import Row

H200 = "NVIDIA H200"


@pytest.fixture(autouse=True)
def _no_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_choices", {})


@pytest.fixture
def on_h200() -> Any:
    device = AbstractDevice(device_kind=H200, num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def measured(monkeypatch: pytest.MonkeyPatch, *rows: Row) -> None:
    """Makes `rows` the table of measurements."""
    monkeypatch.setattr(tuning, "table", lambda: rows)


def row(fastest: str, rows: int = 1024, device: str = H200, **tiles: int) -> Row:
    return Row("op", device, "bfloat16", {"M": rows, "F": 512}, fastest, tiles, {XLA: 2e-3, fastest: 1e-3})


def supported(shape: Mapping[str, int], dtype: Any, tiles: Mapping[str, int]) -> str | None:
    return None


def pick(implementation: str | None = None, *, rows: int = 1024, unsupported: Any = supported) -> dispatch.Choice:
    return choose("op", {"M": rows, "F": 512}, "bfloat16", unsupported, implementation)


def test_without_a_measurement_xla_runs_and_a_gpu_says_so_once(on_h200: None, caplog: pytest.LogCaptureFixture) -> None:
    assert [pick(rows=rows).implementation for rows in (1, 2, 2)] == [XLA] * 3
    assert len(caplog.records) == 1
    assert [choice.shape["M"] for choice in explain()] == [1, 2]
    assert all("no kernel is measured" in str(choice) for choice in explain())


def test_on_a_cpu_xla_is_no_fall_back(caplog: pytest.LogCaptureFixture) -> None:
    assert pick().implementation == XLA
    assert pick().device == jax.devices()[0].device_kind
    assert not caplog.records


def test_the_fastest_measured_one_runs_with_its_tiles(on_h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, row(MOSAIC_GPU, d=64), row(XLA, rows=16))
    assert (pick().implementation, pick().tiles) == (MOSAIC_GPU, {"d": 64})
    assert (pick(rows=16).implementation, pick(rows=16).tiles) == (XLA, {})
    assert pick(MOSAIC_GPU).tiles == {"d": 64}
    assert pick(XLA).implementation == XLA


def test_a_measured_kernel_without_support_falls_back_and_says_why(
    on_h200: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured(monkeypatch, row(MOSAIC_GPU))
    choice = pick(unsupported=lambda shape, dtype, tiles: "F is odd")
    assert choice.implementation == XLA
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "F is odd" in caplog.text


def test_a_name_is_that_one_or_an_error_that_says_why_not(on_h200: None) -> None:
    assert pick(MOSAIC_GPU).implementation == MOSAIC_GPU
    assert pick(INTERPRETED).implementation == INTERPRETED
    with pytest.raises(ValueError, match=r"op .*M=1024 F=512.* bfloat16 on NVIDIA H200: .*: F is odd"):
        pick(MOSAIC_GPU, unsupported=lambda shape, dtype, tiles: "F is odd")
    with pytest.raises(ValueError, match=r"'triton'.* one of xla, mosaic_gpu"):
        pick("triton")


def test_a_kernel_by_name_needs_its_gpu() -> None:
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        pick(MOSAIC_GPU)


def test_the_device_is_that_which_is_compiled_for(on_h200: None) -> None:
    assert target_device() == ("gpu", H200, 132)


def test_rows_serve_the_shapes_around_them() -> None:
    rows = (row(MOSAIC_GPU, rows=1024), row(XLA, rows=2048), row(MOSAIC_GPU, device="NVIDIA H100", rows=512))

    def nearest(size: int, device: str = H200, dtype: str = "bfloat16", width: int = 512) -> int | None:
        found = tuning.nearest("op", device, dtype, {"M": size, "F": width}, rows)
        return found[0].shape["M"] if found else None

    assert [nearest(size) for size in (64, 1024, 1400, 1500, 32768)] == [1024, 1024, 1024, 2048, 2048]
    assert [nearest(size) for size in (0, 63, 32769)] == [None] * 3
    assert [nearest(1024, width=width) for width in (255, 256, 1024, 1025)] == [None, 1024, 1024, None]
    assert nearest(600, device="NVIDIA H100") == 512
    assert nearest(1024, dtype="float16") is None
    assert tuning.nearest("op", H200, "bfloat16", {"M": 1024}, rows) == []


def test_answer_tokens_alone_are_another_problem_than_all_tokens() -> None:
    def attention(queries: int, tokens: int) -> dict[str, int]:
        return {"Q": queries, "M": tokens, "H": 128}

    last = replace(row(XLA), shape=attention(100, 16384))
    lower = replace(row(MOSAIC_GPU), shape=attention(16384, 16384))

    def nearest(queries: int, tokens: int) -> list[Row]:
        return tuning.nearest("op", H200, "bfloat16", attention(queries, tokens), (last, lower))

    assert nearest(1100, 1100) == [lower]
    assert nearest(20, 8192) == [last]
    assert nearest(1024, 16384) == []


def test_tiles_that_do_not_fit_leave_it_to_the_next_row(on_h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, row(MOSAIC_GPU, d=128), row(MOSAIC_GPU, rows=4096, d=64))
    choice = pick(unsupported=lambda shape, dtype, tiles: "D" if tiles.get("d") == 128 else None)
    assert (choice.implementation, choice.tiles) == (MOSAIC_GPU, {"d": 64})


def test_where_xla_won_its_tiles_do_not_matter(on_h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, row(XLA, d=128), row(MOSAIC_GPU, rows=4096, d=64))

    def divides(shape: Mapping[str, int], dtype: Any, tiles: Mapping[str, int]) -> str | None:
        return "D" if tiles.get("d") == 128 else None

    assert pick(unsupported=divides).implementation == XLA
    assert pick(MOSAIC_GPU, unsupported=divides).tiles == {"d": 64}


def test_the_nearest_row_of_a_relative_decides(on_h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a farther one in which a kernel was faster."""
    device = "NVIDIA H100 80GB HBM3"
    near = replace(row(MOSAIC_GPU, device=device), seconds={XLA: 1.1, MOSAIC_GPU: 1.0})
    far = replace(row(MOSAIC_GPU, rows=4096, device=device), seconds={XLA: 3.0, MOSAIC_GPU: 1.0})
    measured(monkeypatch, near, far)
    assert pick().implementation == XLA


@pytest.mark.parametrize(("factor", "implementation"), [(1.6, MOSAIC_GPU), (1.4, XLA)])
def test_a_relative_is_believed_where_its_kernel_was_clearly_faster(
    on_h200: None, monkeypatch: pytest.MonkeyPatch, factor: float, implementation: str
) -> None:
    seconds = {XLA: factor, MOSAIC_GPU: 1.0}
    measured(monkeypatch, replace(row(MOSAIC_GPU, device="NVIDIA H100 80GB HBM3"), seconds=seconds))
    choice = pick()
    assert choice.implementation == implementation
    assert ("measured fastest on NVIDIA H100" in str(choice)) == (implementation == MOSAIC_GPU)
    measured(monkeypatch, replace(row(MOSAIC_GPU, device="NVIDIA B200"), seconds=seconds))
    assert pick().implementation == XLA


def test_the_table_comes_back_as_written_and_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    assert tuning.table(path) == ()
    rows = tuple(replace(each, op="gated_mlp") for each in (row(MOSAIC_GPU, d=64), row(XLA, rows=2)))
    tuning.write(rows, path)
    assert tuning.table(path) == rows
    with pytest.raises(ValueError, match="at most 50"):
        tuning.write(rows * 26, path)
    assert tuning.table(path) == rows
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"rows": [{"op": 1}]}')
    with pytest.raises(ValueError, match=r"damaged\.json"):
        tuning.table(damaged)


def test_the_table_of_the_package_is_whole() -> None:
    assert len(tuning.table()) <= tuning.MAX_ROWS
    assert all(row.fastest in (XLA, MOSAIC_GPU) for row in tuning.table())
