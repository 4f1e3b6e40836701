"""`jaxslm calibrate`: the fit is measured on queries it has not seen, travels in the checkpoint and can be applied."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from jaxslm.checkpoint import load_checkpoint, load_manifest
from jaxslm.data_files import Item, Judged, Query
from jaxslm.errors import InputError
from jaxslm.evaluate.calibrate import calibrate_checkpoint, held_out_pairs
from jaxslm.evaluate.calibration import calibration_report, fit_platt
from jaxslm.evaluate.reliability import reliability, write_plot
from jaxslm.score.files import score_file
from jaxslm.score.scorer import load
from tests.tiny import tiny_checkpoint, tiny_config

GENERATOR = np.random.default_rng(0)
ITEMS = {f"i{n}": Item(id=f"i{n}", text=" ".join(GENERATOR.choice(["red", "blue", "job"], 4))) for n in range(30)}
QUERIES = [
    Query(
        query_id=f"q{n}",
        query="red job",
        items=tuple(Judged(id=f"i{row}", label=float(GENERATOR.integers(2))) for row in range(n, n + 8)),
    )
    for n in range(20)
]


def by_words(query: str, items: list[Item]) -> np.ndarray:
    return np.array([len(item.text) / 4.0 for item in items])


def test_every_query_is_on_one_side_whatever_the_order() -> None:
    sides = held_out_pairs(by_words, QUERIES, ITEMS, k=0)
    assert sum(len(side.labels) for side in sides) == 20 * 8
    assert all(len(side.labels) % 8 == 0 for side in sides)
    again = held_out_pairs(by_words, QUERIES[::-1], ITEMS, k=0)
    for one, other in zip(sides, again, strict=True):
        assert sorted(zip(one.logits, one.labels, strict=True)) == sorted(zip(other.logits, other.labels, strict=True))
    with_bm25 = held_out_pairs(by_words, QUERIES, ITEMS, k=12)
    assert all(len(more.labels) > len(few.labels) for more, few in zip(with_bm25, sides, strict=True))
    assert [more.labels.sum() for more in with_bm25] == [few.labels.sum() for few in sides]
    with pytest.raises(InputError, match="1 do not make two halves"):
        held_out_pairs(by_words, QUERIES[:1], ITEMS, k=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranker, and data that it scores."""
    folder = tmp_path_factory.mktemp("calibrate")
    tiny_checkpoint(folder / "ckpt", tiny_config("llama", num_layers=1), template="yes-no", instruction="Match")
    (folder / "items.jsonl").write_text(
        "".join(item.model_dump_json(exclude_none=True) + "\n" for item in ITEMS.values())
    )
    (folder / "dev.jsonl").write_text("".join(query.model_dump_json() + "\n" for query in QUERIES))
    return folder


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> tuple[Path, dict[str, Any]]:
    out = folder / "calibrated"
    return out, calibrate_checkpoint(folder / "ckpt", folder, out, "dev", k=0, plot=folder / "reliability.svg")


def test_the_calibration_travels_in_the_checkpoint(folder: Path, calibrated: tuple[Path, dict[str, Any]]) -> None:
    out, told = calibrated
    before, after = load_checkpoint(folder / "ckpt").manifest, load_checkpoint(out).manifest
    assert after.calibration is not None
    assert after.calibration.model_dump() == told["calibration"]
    assert after.params_sha256 == before.params_sha256
    assert after.metrics["calibrated_ece"] == told["after"]["ece"]
    assert told["pairs_fitted"] + told["pairs_measured"] == 160
    assert told["after"]["nll"] < told["before"]["nll"]
    changed = {name for name in vars(after) if getattr(after, name) != getattr(before, name)}
    assert changed == {"calibration", "metrics"}
    plot = ET.fromstring((folder / "reliability.svg").read_text())
    assert plot.tag.endswith("svg")


def test_scores_can_be_calibrated(folder: Path, calibrated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = calibrated
    ranker = load(out)
    scores = ranker.score_request("red job", ["blue job", "red"])
    assert scores.calibration is not None
    expected = scores.calibration.apply(scores.log_odds)
    np.testing.assert_allclose(scores.calibrated, expected, rtol=1e-6)
    requests = tmp_path / "in.jsonl"
    requests.write_text(json.dumps({"query": "red job", "items": [{"text": "blue job"}, {"text": "red"}]}) + "\n")
    score_file(out, requests, tmp_path / "out.jsonl", calibrated=True)
    line = json.loads((tmp_path / "out.jsonl").read_text())
    np.testing.assert_allclose(line["calibrated"], expected, rtol=1e-5)
    np.testing.assert_allclose(line["scores"], scores.probabilities, rtol=1e-5)
    with pytest.raises(InputError, match="ckpt: carries no calibration"):
        score_file(folder / "ckpt", requests, tmp_path / "other.jsonl", calibrated=True)
    assert not (tmp_path / "other.jsonl").exists()
    with pytest.raises(InputError, match="carries no calibration"):
        _ = load(folder / "ckpt").score_request("red job", ["blue job"]).calibrated


def test_what_cannot_be_calibrated_leaves_nothing(folder: Path, calibrated: Any, tmp_path: Path) -> None:
    out, _ = calibrated
    before = load_manifest(out)
    ckpt = folder / "ckpt"
    for options, message in (
        ((ckpt, folder, out, "dev"), "calibrated exists"),
        ((ckpt, folder, tmp_path / "new", "nowhere"), "holds neither nowhere.jsonl"),
        ((tmp_path / "none", folder, tmp_path / "new", "dev"), "not a checkpoint"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate_checkpoint(*options)
    for plot, message in (
        (folder / "reliability.svg", "exists"),
        (tmp_path / "plot.pdf", "must end in .svg or .png"),
        (folder / "dev.jsonl" / "plot.svg", "cannot create it"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate_checkpoint(ckpt, folder, tmp_path / "new", "dev", plot=plot)
    assert list(tmp_path.iterdir()) == []
    assert load_manifest(out) == before


def test_a_reliability_plot_is_the_same_file_every_time(tmp_path: Path) -> None:
    logits = GENERATOR.normal(size=500)
    labels = (GENERATOR.random(500) < 0.4).astype(float)
    reports = {
        name: calibration_report(probabilities, labels)
        for name, probabilities in (
            ("before", 1 / (1 + np.exp(-logits))),
            ("after", fit_platt(logits, labels).apply(logits)),
        )
    }
    for name in ("one.svg", "two.svg", "one.png"):
        write_plot(tmp_path / name, reliability(reports))
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert f"before: ECE {reports['before'].ece:.3f}" in (tmp_path / "one.svg").read_text()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
