"""The study's parts: arms, stages, speed in turns, recovery in stages."""

from pathlib import Path
from typing import Any

import pytest

from jaxslm.bench.workloads import MODELS
from jaxslm.checkpoint import load_checkpoint, load_manifest
from jaxslm.data_files import Item, Judged, Query
from jaxslm.errors import InputError
from jaxslm.evaluate.rerank import evaluate_ranker
from jaxslm.prune.model import PruneSettings
from jaxslm.prune.study import Calibrated, arms, changed, prune_gradually, row, speed_in_turns, stages
from tests.prune.made import PROMPT
from tests.tiny import tiny_checkpoint, tiny_config, tiny_ranker
from tests.train.toy import toy_folder, toy_ranker


def test_arms_are_all_criteria_with_and_without_refitting() -> None:
    found = arms(PruneSettings(mlp_keep=1536, seed=3))
    assert len(found) == 12
    assert found["osscar"] == PruneSettings(mlp_keep=1536, seed=3)
    assert found["wanda, not re-fitted"] == PruneSettings(mlp_keep=1536, seed=3, criterion="wanda", refit=False)


def test_an_arm_changes_some_settings_and_keeps_the_others() -> None:
    base = PruneSettings(mlp_keep=1536, calibration_tokens=500)
    found = changed(base, ("depth_criterion=keep-last-1", "drop_layers=2"))
    assert found == PruneSettings(mlp_keep=1536, calibration_tokens=500, depth_criterion="keep-last-1", drop_layers=2)
    assert changed(base, ()) == base
    shared_out = changed(base, ("by_layer=true",))
    assert shared_out == changed(shared_out, ()) == base.model_copy(update={"by_layer": True})
    with pytest.raises(InputError, match="drop_layer: Extra inputs"):
        changed(base, ("drop_layer=2",))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"mlp_keep": 1536, "drop_layers": 8}, [(2304, 0), (1536, 0), (None, 4), (None, 4)]),
        ({"mlp_keep": 2944, "drop_layers": 1}, [(2944, 0), (None, 1)]),
        ({"mlp_keep": 1536}, [(2304, 0), (1536, 0)]),
        ({"drop_layers": 3}, [(None, 1), (None, 2)]),
    ],
)
@pytest.mark.parametrize("by_layer", [False, True])
def test_stages(target: dict[str, Any], expected: list[tuple[int | None, int]], by_layer: bool) -> None:
    found = stages(MODELS["qwen3-0.6b"], PruneSettings(**target, by_layer=by_layer and "mlp_keep" in target))
    assert [(settings.mlp_keep, settings.drop_layers) for settings, _ in found] == expected
    assert sum(share for _, share in found) == pytest.approx(1)
    assert {settings.mlp_keep for settings, _ in found if settings.by_layer} == {
        keep for keep, _ in expected if keep and by_layer
    }


def test_speed_in_turns(tmp_path: Path) -> None:
    rankers = {name: tiny_ranker(tmp_path / name, seed=seed, **PROMPT) for seed, name in enumerate("ab")}
    items = {name: Item(id=name, text=name) for name in ("nurse", "baker", "pilot")}
    queries = [Query(query_id="1", query="a nurse", items=(Judged(id="nurse", label=1.0),))]
    speed = speed_in_turns(rankers, queries, items, k=2, rounds=2)
    assert speed.keys() == {"a", "b"}
    assert min(speed.values()) > 0


def test_a_row_says_what_a_ranker_loses_against_the_dense_one(tmp_path: Path) -> None:
    dense, other = (tiny_ranker(tmp_path / name, seed=seed, **PROMPT) for seed, name in enumerate("ab"))
    items = {name: Item(id=name, text=name) for name in ("nurse", "baker", "pilot", "welder")}
    queries = [Query(query_id=name, query=f"a {name}", items=(Judged(id=name, label=1.0),)) for name in items]
    reports = [evaluate_ranker(each.log_odds, queries, items, k=4, name="any") for each in (dense, other)]
    same, changed_row = row("dense", reports[0], reports[0], dense), row("other", reports[1], reports[0], other)
    assert same["ndcg_minus_dense_ci95"] == [0, 0]
    assert same["kendall_tau_to_dense"] == 1
    expected = reports[1].ranker.estimates["ndcg_at_10"].mean - reports[0].ranker.estimates["ndcg_at_10"].mean
    assert changed_row["ndcg_minus_dense"] == pytest.approx(expected)
    assert changed_row["kendall_tau_to_dense"] < 1


@pytest.mark.slow
def test_pruning_and_recovering_in_stages(tmp_path: Path) -> None:
    """Each stage starts from the last one's result and is taught by the dense model; what is there is not redone."""
    toy = toy_folder(tmp_path / "toy")
    dense = tiny_checkpoint(
        tmp_path / "dense", tiny_config("llama"), template="yes-no", instruction="Match", max_tokens=192
    )
    recovery = toy_ranker(
        toy, f"teacher.checkpoint={dense}", "losses.distillation=1.0", "steps=4", "save_every=4", "evaluation.every=4",
        "remat=false", "tensorboard=false",
    ).model_copy(update={"layers": None, "prompt": None})  # fmt: skip
    target = PruneSettings(drop_layers=1, calibration_tokens=500)
    calibrated = Calibrated(toy / "train.jsonl", toy / "items.jsonl")
    last = prune_gradually(dense, tmp_path / "stages", target, recovery, calibrated)
    assert {path.name for path in (tmp_path / "stages").glob("[0-3]-*ed")} == {"0-pruned", "0-recovered"}
    assert load_manifest(last).parent == load_manifest(tmp_path / "stages" / "0-pruned").params_sha256
    assert load_checkpoint(last).config.model.num_layers == 1
    before = load_manifest(last)
    assert prune_gradually(dense, tmp_path / "stages", target, recovery, calibrated) == last
    assert load_manifest(last) == before
    moved = recovery.model_copy(update={"save_every": 2})
    assert prune_gradually(dense, tmp_path / "stages", target, moved, calibrated) == last
    losses = recovery.losses.model_copy(update={"list_softmax": 0.5})
    other = recovery.model_copy(update={"losses": losses, "steps": 8})
    with pytest.raises(InputError, match=r"0-recovered: made with another losses, steps \(0-recovered.made-with"):
        prune_gradually(dense, tmp_path / "stages", target, other, calibrated)
    (tmp_path / "stages" / "0-pruned.made-with.json").unlink()
    with pytest.raises(InputError, match=r"0-pruned: no 0-pruned\.made-with\.json says with what it was made"):
        prune_gradually(dense, tmp_path / "stages", target, recovery, calibrated)
