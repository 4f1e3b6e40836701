"""`jaxslm prune`: what it writes, says and refuses; a pruned model learns from the dense one."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxslm.checkpoint import load_checkpoint, load_manifest, save_checkpoint
from jaxslm.errors import InputError
from jaxslm.prune.checkpoints import prune_checkpoint
from jaxslm.prune.masks import Masks
from jaxslm.prune.model import PruneSettings
from jaxslm.prune.report import LITTLE_TAU
from jaxslm.prune.shrink import shrunk_config
from jaxslm.score.scorer import load
from tests.prune.made import PROMPT, write_queries, write_requests
from tests.tiny import tiny_checkpoint, tiny_config, tiny_params
from tests.train.toy import toy_folder, toy_ranker

TARGET: dict[str, Any] = {"mlp_keep": 24, "drop_layers": 1, "width_multiple": 8}


def settings(**changes: Any) -> PruneSettings:
    return PruneSettings(**(TARGET | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, requests and judged queries."""
    folder = tmp_path_factory.mktemp("prune")
    tiny_checkpoint(folder / "dense", tiny_config(num_layers=3), **PROMPT)
    write_requests(folder / "requests.jsonl")
    write_queries(folder)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return prune_checkpoint(folder / "dense", folder / "requests.jsonl", folder / "pruned", settings())


def test_the_checkpoint_that_comes_out(folder: Path, result: dict[str, Any]) -> None:
    """It loads, scores, names its parent and holds the masks that lead from the parent's shape to its own."""
    dense, small = load_checkpoint(folder / "dense"), load_checkpoint(folder / "pruned", extra=["masks"])
    model = small.config.model
    assert (model.num_layers, model.mlp_width, model.num_kv_heads) == (2, 24, 2)
    assert small.manifest.parent == dense.manifest.params_sha256 == result["parent"]
    assert "osscar" in small.manifest.source
    assert result["calibration"]["token_ids_sha256"][:16] in small.manifest.source
    masks = Masks(**{name: np.asarray(mask) for name, mask in small.extra["masks"].items()})
    assert shrunk_config(dense.config.model, masks) == model
    # Whatever was kept of the producing matrices is the dense model's, bit by bit.
    gate = np.asarray(dense.params["layers_2"]["mlp"]["gate"])[:, masks.keep_neurons[2]]
    np.testing.assert_array_equal(gate, small.params["layers_1"]["mlp"]["gate"])
    scores = load(folder / "pruned").score("python developer", ["a job", "the baker"])
    assert np.isfinite(scores).all()


def test_what_is_reported(result: dict[str, Any]) -> None:
    json.dumps(result)
    assert (result["before"]["layers"], result["after"]["layers"]) == (3, 2)
    assert result["kept_layers"] == [0, 2]  # the last one stays
    assert [row["layer"] for row in result["layers"]] == [0, 2]
    assert all(0 < row["mlp_error"] < 1 and row["attention_error"] is None for row in result["layers"])
    before, after = result["before"], result["after"]
    saved = before["linear_flops_per_token"] - after["linear_flops_per_token"]
    layer = before["linear_flops_per_token"] // 3
    assert saved == layer + 2 * (2 * 3 * 32 * 24)
    assert (
        before["parameters"] - after["parameters"]
        == before["non_embedding_parameters"] - after["non_embedding_parameters"]
    )


def test_where_layers_went_the_order_that_is_left_is_told(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what it means for recovery; where only neurons went nothing is computed for it."""
    requests = folder / "requests.jsonl"
    layers = prune_checkpoint(folder / "dense", requests, tmp_path / "layers", settings())
    low, high = layers["order_tau_ci95"]
    assert -1 <= low <= layers["order_tau"] <= high <= 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"Kendall's tau {layers['order_tau']:.2f}" in told
    assert ("recovery begins from little" in told) == (layers["order_tau"] < LITTLE_TAU)
    neurons = prune_checkpoint(folder / "dense", requests, tmp_path / "neurons", settings(drop_layers=0))
    assert neurons["order_tau"] is None
    assert "Kendall" not in capsys.readouterr().err


def test_pruning_again_names_the_pruned_parent(tmp_path: Path, folder: Path, result: dict[str, Any]) -> None:
    """Other items of the checkpoint come along; the masks are those of the last step."""
    once = load_checkpoint(folder / "pruned", extra=["masks"])
    path = tmp_path / "once"
    extra = {**once.extra, "notes": {"weights": np.arange(3, dtype=np.float32)}}
    save_checkpoint(path, once.config, once.params, once.tokenizer_files, source="x", extra=extra)
    again = prune_checkpoint(path, folder / "requests.jsonl", tmp_path / "twice", settings(mlp_keep=16, drop_layers=0))
    twice = load_checkpoint(tmp_path / "twice", extra=["masks", "notes"])
    assert again["parent"] == once.manifest.params_sha256
    assert twice.extra["masks"]["keep_neurons"].shape == (2, 24)
    np.testing.assert_array_equal(twice.extra["notes"]["weights"], np.arange(3, dtype=np.float32))


@pytest.mark.slow
def test_vocabulary_and_groups_go_too(tmp_path: Path, folder: Path) -> None:
    result = prune_checkpoint(
        folder / "dense",
        folder / "queries.jsonl",
        tmp_path / "small",
        settings(kv_groups_keep=1, depth_criterion="greedy", criterion="wanda", refit=False),
        items=folder / "items.jsonl",
        vocab_keep=folder / "items.jsonl",
    )
    small = load_checkpoint(tmp_path / "small", extra=["masks"])
    assert small.config.model.num_kv_heads == 1
    assert small.config.model.vocab_size == result["after"]["vocabulary"] < 384
    assert int(small.extra["masks"]["keep_vocab"].sum()) == small.config.model.vocab_size
    assert np.isfinite(load(tmp_path / "small").score("nurse", ["a baker"])).all()


BAD_TARGETS: list[tuple[dict[str, Any], str]] = [
    ({"mlp_keep": 64}, "--mlp-keep 64: is above the 48 of a layer's neurons"),
    ({"mlp_keep": 0}, "--mlp-keep 0: leaves a layer without neurons"),
    ({"mlp_keep": 20}, "--mlp-keep 20: must be a multiple of 8"),
    ({"kv_groups_keep": 0}, "--kv-groups-keep 0: leaves a layer without KV groups"),
    ({"kv_groups_keep": 3}, "--kv-groups-keep 3: is above the 2 of a layer's KV groups"),
    ({"drop_layers": 3}, "--drop-layers 3: leaves nothing of 3 layers"),
    ({"mlp_keep": None, "drop_layers": 0}, "nothing to prune"),
    ({"mlp_keep": 48, "kv_groups_keep": 2, "drop_layers": 0}, "nothing to prune"),
    ({"swaps": 3, "criterion": "wanda"}, "--swaps 3: goes with --criterion osscar, not wanda"),
    ({"depth_criterion": "greedy"}, "greedy: needs labels"),
    ({"drop_layers": 2, "depth_criterion": "keep-last-2"}, "cannot drop 2 layers before the last 2"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_TARGETS, ids=lambda value: str(value)[:40])
def test_targets_that_are_refused(tmp_path: Path, folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune_checkpoint(folder / "dense", folder / "requests.jsonl", tmp_path / "out", settings(**changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "calibration.jsonl: holds no records"),
        (
            '{"query": "a", "items": [{"text": "b"}]}\n',
            r"calibration: [24] tokens of queries and items .* the 24 inputs",
        ),
        ('{"query": "a"}\n', "line 1: items: Field required"),
    ],
)
def test_calibration_that_is_refused(tmp_path: Path, content: str, message: str) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", tiny_config(num_layers=2, mlp_width=24), **PROMPT)
    file = tmp_path / "calibration.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        prune_checkpoint(dense, file, tmp_path / "out", settings(mlp_keep=16))
    assert not (tmp_path / "out").exists()


def test_two_tokens_are_enough_where_nothing_is_fitted(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "calibration.jsonl"
    file.write_text('{"query": "a", "items": [{"text": "b"}]}\n')
    result = prune_checkpoint(folder / "dense", file, tmp_path / "out", settings(mlp_keep=None))
    assert result["after"]["layers"] == 2


@pytest.mark.parametrize(
    ("part", "matrix", "changes", "what"),
    [("mlp", "up", {}, "neuron"), ("attention", "v", {"mlp_keep": None, "kv_groups_keep": 1}, "head")],
)
def test_a_layer_that_is_dead_on_the_calibration_is_named(
    tmp_path: Path, folder: Path, part: str, matrix: str, changes: dict[str, Any], what: str
) -> None:
    """By its number in the model that is pruned: layer 1 goes, layer 2 is the dead one."""
    dense = load_checkpoint(folder / "dense")
    params = tiny_params(dense.config.model)
    params["layers_2"][part][matrix] *= 0
    save_checkpoint(tmp_path / "dead", dense.config, params, dense.tokenizer_files, source="x")
    chosen = settings(depth_criterion="keep-last-1", **changes)
    with pytest.raises(InputError, match=rf"^layer 2: every {what} is zero on the calibration tokens; [^\n]*$"):
        prune_checkpoint(tmp_path / "dead", folder / "requests.jsonl", tmp_path / "out", chosen)
    assert not (tmp_path / "out").exists()


def test_swaps_fit_better_and_are_on_record(tmp_path: Path, folder: Path, result: dict[str, Any]) -> None:
    swapped = prune_checkpoint(folder / "dense", folder / "requests.jsonl", tmp_path / "out", settings(swaps=10))
    assert swapped["layers"][0]["mlp_error"] <= result["layers"][0]["mlp_error"]
    assert "swaps 10" in load_manifest(tmp_path / "out").source
    assert "swaps" not in load_manifest(folder / "pruned").source


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path: Path, folder: Path, value: float) -> None:
    dense = load_checkpoint(folder / "dense")
    params = tiny_params(dense.config.model)
    params["layers_1"]["mlp"]["up"] = params["layers_1"]["mlp"]["up"].at[3, 4].set(value)
    save_checkpoint(tmp_path / "broken", dense.config, params, dense.tokenizer_files, source="x")
    with pytest.raises(InputError, match=r"parameters: .*layers_1.*up.* holds numbers that are not finite"):
        prune_checkpoint(tmp_path / "broken", folder / "requests.jsonl", tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_told_first(folder: Path) -> None:
    with pytest.raises(InputError, match="dense exists"):
        prune_checkpoint(folder / "absent", folder / "absent.jsonl", folder / "dense", settings())


@pytest.mark.slow
def test_the_dense_model_teaches_the_pruned_one(tmp_path: Path) -> None:
    """`jaxslm train ranker` takes a pruned checkpoint as student and its parent as teacher, hidden states too."""
    from jaxslm.train.ranker import train_ranker

    toy = toy_folder(tmp_path / "toy")
    prune_checkpoint(
        toy / "tiny", toy / "train.jsonl", toy / "pruned", settings(drop_layers=1), items=toy / "items.jsonl"
    )
    recovery = toy_ranker(
        toy, f"model={toy}/pruned", f"teacher.checkpoint={toy}/tiny", "losses.distillation=1.0", "losses.hidden=0.5",
        "data.max_prefix_tokens=128", "steps=4", "save_every=4", "evaluation.every=4", "remat=false",
        "tensorboard=false",
    )  # fmt: skip
    recovery = recovery.model_copy(update={"layers": None, "prompt": None})
    result = train_ranker(recovery, tmp_path / "recovered")
    assert result.finished
    recovered = load_checkpoint(tmp_path / "recovered")
    pruned = load_manifest(toy / "pruned")
    assert recovered.config.model == pruned.ranker.model
    assert recovered.manifest.parent == pruned.params_sha256
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(recovered.params))
