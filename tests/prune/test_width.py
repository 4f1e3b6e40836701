"""Layer by layer: Gram matrices over real tokens only, pruned inputs, and what comes out."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.layout import Rows
from jaxslm.prompt import EncodedRequest
from jaxslm.prune.calibrate import (
    ITEMS_PER_REQUEST,
    embed,
    gather_statistics,
    layer_functions,
    pack_calibration,
    read_calibration,
)
from jaxslm.prune.model import PruneSettings, prune_model
from jaxslm.prune.shrink import shrink
from jaxslm.prune.width import WidthTarget, prune_widths
from tests.prune.made import PROMPT, prompt, requests_calibration, write_queries, write_requests
from tests.tiny import TINY_CONFIGS, tiny_config, tiny_params, tiny_ranker_config

CONFIG = tiny_config()


def requests() -> list[EncodedRequest]:
    return [prompt().encode(query, [text]) for query, text in (("python developer", "a job"), ("nurse", "the baker"))]


def captured(config: Any, params: Params, encoded: list[EncodedRequest]) -> tuple[dict[str, Any], np.ndarray]:
    """What the decoder sows on plain rows, and where real tokens stand."""
    rows = [request.prefix_ids + request.item_ids[0] for request in encoded]
    valid = np.arange(max(map(len, rows))) < np.array([[len(row)] for row in rows])
    tokens = np.zeros(valid.shape, np.int32)
    tokens[valid] = np.concatenate(rows)

    def apply(params: Params) -> Any:
        layout = Rows(jnp.asarray(valid), last_only=False)
        return Decoder(config).apply({"params": params}, jnp.asarray(tokens), layout, mutable=["intermediates"])

    return jax.jit(apply)(params)[1]["intermediates"], valid


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("part", "name", "inputs"), [("mlp", "neurons", 48), ("attention", "heads", 32)])
def test_gram_matrices_are_sums_over_real_tokens(layer: int, part: str, name: str, inputs: int) -> None:
    params, calibration = tiny_params(CONFIG), pack_calibration(requests())
    seen, valid = captured(CONFIG, params, requests())
    x = np.asarray(seen[f"layers_{layer}"][part][name][0]).reshape(*valid.shape, inputs)[valid].astype(np.float64)
    functions, states = layer_functions(CONFIG, layer), embed(params, calibration)
    for before in range(layer):
        layer_params = params[f"layers_{before}"]
        states = [
            functions.forward(layer_params, x, batch) for x, batch in zip(states, calibration.batches(), strict=True)
        ]
    add = functions.add_neurons if part == "mlp" else functions.add_heads
    gram, total = gather_statistics(add, inputs, params[f"layers_{layer}"], states, calibration)
    assert calibration.tokens == len(x)
    np.testing.assert_allclose(gram, x.T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(total, x.sum(axis=0), rtol=1e-4, atol=1e-4)


def test_shared_prefixes_count_once(tmp_path: Path) -> None:
    together = prompt().encode("python developer", ["a job", "the baker"])
    calibration = pack_calibration([together])
    assert calibration.tokens == len(together.prefix_ids) + sum(map(len, together.item_ids))
    assert calibration.sizes == (2,)


def test_the_first_batches_are_as_many_as_have_so_many_tokens(tmp_path: Path) -> None:
    write_requests(tmp_path / "many.jsonl", requests=120)
    calibration = read_calibration(tmp_path / "many.jsonl", None, prompt(), max_tokens=100_000)
    real = [forward.real_tokens for forward in calibration.forwards]
    assert len(real) > 2
    for wanted, batches in ((1, 1), (sum(real[:2]), 2), (sum(real[:3]) - 1, 2), (10**9, len(real))):
        part = calibration.first(wanted)
        assert (len(part.forwards), part.tokens) == (batches, sum(real[:batches]))


@pytest.mark.parametrize("name", ["qwen3", "llama-three-queries-per-kv"])
def test_pruned_parameters_are_the_smaller_model(tmp_path: Path, name: str) -> None:
    """Removed rows of re-fitted projections are zero, so the masks change nothing any more; shrunk = pruned."""
    config = TINY_CONFIGS[name]
    dense, calibration = tiny_params(config), requests_calibration(tmp_path)
    before = jax.tree.map(np.array, dense)
    pruned, masks, reports = prune_widths(config, dense, calibration, WidthTarget(mlp_keep=24, kv_groups_keep=1))
    jax.tree.map(np.testing.assert_array_equal, dense, before)
    assert masks.keep_neurons.sum(axis=1).tolist() == [24, 24]
    assert masks.keep_kv_groups.sum(axis=1).tolist() == [1, 1]
    for layer, report in enumerate(reports):
        down, o = pruned[f"layers_{layer}"]["mlp"]["down"], pruned[f"layers_{layer}"]["attention"]["o"]
        assert (np.asarray(down)[~masks.keep_neurons[layer]] == 0).all()
        assert (np.asarray(o).reshape(2, -1)[~masks.keep_kv_groups[layer]] == 0).all()
        assert report.layer == layer
        assert report.mlp_error is not None
        assert report.attention_error is not None
        assert 0 < report.mlp_error < 1
    smaller, shrunk = shrink(config, pruned, masks)
    assert (smaller.mlp_width, smaller.num_kv_heads) == (24, 1)
    (wide, _), (narrow, _) = captured(config, pruned, requests()), captured(smaller, shrunk, requests())
    kept = np.asarray(wide["layers_1"]["mlp"]["neurons"][0])[..., masks.keep_neurons[1]]
    np.testing.assert_allclose(kept, narrow["layers_1"]["mlp"]["neurons"][0], rtol=0, atol=1e-4)


def test_later_layers_are_fitted_to_pruned_inputs(tmp_path: Path) -> None:
    """The error of layer 1 that is reported is that of the model as it is pruned, on calibration tokens."""
    params, calibration = tiny_params(CONFIG), pack_calibration(requests() * 8)
    pruned, _, reports = prune_widths(CONFIG, params, calibration, WidthTarget(mlp_keep=12))
    seen, valid = captured(CONFIG, pruned, requests())
    neurons = np.asarray(seen["layers_1"]["mlp"]["neurons"][0])[valid].astype(np.float64)
    dense, fitted = (np.asarray(each["layers_1"]["mlp"]["down"], np.float64) for each in (params, pruned))
    expected = np.sum((neurons @ (dense - fitted)) ** 2) / np.sum((neurons @ dense) ** 2)
    assert reports[1].mlp_error == pytest.approx(expected, rel=1e-3)


def test_dtype_of_the_parameters_stays(tmp_path: Path) -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_params(CONFIG))
    pruned, _, _ = prune_widths(CONFIG, params, requests_calibration(tmp_path), WidthTarget(mlp_keep=24))
    assert {leaf.dtype for leaf in jax.tree.leaves(pruned)} == {jnp.dtype(jnp.bfloat16)}


def test_dead_neurons_are_counted_and_go_first(tmp_path: Path) -> None:
    params, dead = tiny_params(CONFIG), np.array([1, 7, 40])
    for layer in range(2):
        mlp = params[f"layers_{layer}"]["mlp"]
        mlp["up"] = mlp["up"].at[:, dead].set(0)
        mlp["down"] = mlp["down"].at[dead].multiply(100)
    _, masks, reports = prune_widths(CONFIG, params, requests_calibration(tmp_path), WidthTarget(mlp_keep=45))
    assert (masks.keep_neurons == ~np.isin(np.arange(48), dead)).all()
    assert [report.dead_neurons for report in reports] == [3, 3]
    assert all(report.mlp_error == pytest.approx(0, abs=1e-9) for report in reports)


def test_layers_first_then_widths(tmp_path: Path) -> None:
    """Masks and reports speak of the dense model's layers."""
    config = tiny_ranker_config(tiny_config(num_layers=3, mlp_width=(48, 40, 32)), **PROMPT)
    settings = PruneSettings(mlp_keep=16, drop_layers=1, depth_criterion="keep-last-1", width_multiple=16)
    pruned = prune_model(config, tiny_params(config.model), requests_calibration(tmp_path), settings)
    assert (pruned.config.num_layers, pruned.config.mlp_width) == (2, 16)
    assert pruned.masks.keep_layers.tolist() == [True, False, True]
    assert [report.layer for report in pruned.layers] == [0, 2]
    assert pruned.masks.keep_neurons.sum(axis=1).tolist() == [16, 40, 16]
    assert not pruned.masks.keep_neurons[2, 32:].any()


def test_the_calibration_set(tmp_path: Path) -> None:
    """A seeded part of the file; long lists give some of their items, the relevant one among them."""
    path = write_requests(tmp_path / "requests.jsonl")
    whole, part, again, other = (
        read_calibration(path, None, prompt(), max_tokens=most, seed=seed)
        for most, seed in ((100_000, 0), (300, 0), (300, 0), (300, 1))
    )
    assert len(whole.sizes) == 12
    assert 300 <= part.tokens < whole.tokens
    assert part.sha256 == again.sha256
    assert len({whole.sha256, part.sha256, other.sha256}) == 3
    queries, items = write_queries(tmp_path)
    judged = read_calibration(queries, items, prompt(), max_tokens=100_000)
    assert judged.sizes == (ITEMS_PER_REQUEST,) * 12
    assert judged.labels is not None
    assert all(max(row) == 1 for row in judged.labels)


def test_calibration_files_that_break_a_rule(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    for content, message in (
        ("", "holds no records"),
        ('{"query": "nurse", "items": [{"id": "i1"}]}', "request 1: every item needs a text"),
        ('{"query": "nurse", "items": []}', "line 1: items"),
        ('{"query": "nurse"', "line 1: broken JSON"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_calibration(path, None, prompt(), max_tokens=100)
    queries, items = write_queries(tmp_path)
    content = items.read_text()
    items.write_text(re.sub(r'"(title|text)": "[^"]*"', r'"\1": ""', content))
    with pytest.raises(InputError, match=r"queries\.jsonl: request \d+: item 'i\d+': has no text"):
        read_calibration(queries, items, prompt(), max_tokens=100)
    items.write_text(content.splitlines()[0])
    with pytest.raises(InputError, match="is not among the items"):
        read_calibration(queries, items, prompt(), max_tokens=100)
