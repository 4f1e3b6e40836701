"""Which layers go."""

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.layers import Layer
from jaxslm.model.layout import Rows
from jaxslm.prune import depth
from jaxslm.prune.calibrate import masked_log_odds, pack_calibration, read_calibration
from jaxslm.prune.depth import (
    block_influence,
    choose_layers,
    drop_greedily,
    drop_last,
    drop_least,
    ndcg_measure,
    order_kept,
)
from jaxslm.prune.masks import keep_all
from tests.prune.made import PROMPT, prompt, write_queries
from tests.tiny import tiny_config, tiny_params, tiny_ranker, tiny_ranker_config


def kept(mask: np.ndarray) -> list[int]:
    return [int(layer) for layer in np.flatnonzero(mask)]


def test_the_last_layers() -> None:
    assert kept(drop_last(6, 2)) == [0, 1, 2, 3]
    assert kept(drop_last(6, 2, keep_last=1)) == [0, 1, 2, 5]
    assert kept(drop_last(6, 3, keep_last=2)) == [0, 4, 5]
    for drop, keep_last in ((6, 0), (7, 0), (5, 2)):
        with pytest.raises(InputError, match=f"cannot drop {drop} layers before the last {keep_last}"):
            drop_last(6, drop, keep_last)


def test_least_important_and_the_later_of_equals() -> None:
    assert kept(drop_least(np.array([0.3, 0.1, 0.2, 0.1]), 1)) == [0, 1, 2]
    assert kept(drop_least(np.array([0.3, 0.1, 0.2, 0.1]), 3)) == [0]


def test_greedy_finds_what_single_removals_do_not() -> None:
    """Layers 1 and 2 do the same work: each alone can go, both cannot."""

    def measure(keep: np.ndarray) -> float:
        return 10 * keep[0] + 5 * (keep[1] or keep[2]) + 2 * keep[3]

    keep, values = drop_greedily(4, 2, measure)
    assert kept(keep) == [0, 1]
    assert values == [17, 15]
    best = max(combinations(range(4), 2), key=lambda pair: measure(np.isin(np.arange(4), pair)))
    assert set(best) in ({0, 1}, {0, 2})


def test_block_influence_is_one_minus_cosine_over_real_tokens(tmp_path: Path) -> None:
    """Against the states of plain rows, one item per request. A layer that adds nothing has influence zero."""
    config = tiny_config(num_layers=3)
    params = tiny_params(config)
    for part, matrix in (("attention", "o"), ("mlp", "down")):
        params["layers_1"][part][matrix] = jnp.zeros_like(params["layers_1"][part][matrix])
    requests = [prompt().encode(query, [text]) for query, text in (("python developer", "a job"), ("nurse", "baker"))]
    calibration = pack_calibration(requests)
    influence = block_influence(config, params, calibration)
    rows = [request.prefix_ids + request.item_ids[0] for request in requests]
    valid = np.arange(max(map(len, rows))) < np.array([[len(row)] for row in rows])
    tokens = np.zeros(valid.shape, np.int32)
    tokens[valid] = np.concatenate(rows)

    def is_layer(module: Any, _: str) -> bool:
        return isinstance(module, Layer)

    def apply(params: Params) -> Any:
        layout = Rows(jnp.asarray(valid), last_only=False)
        return Decoder(config).apply({"params": params}, jnp.asarray(tokens), layout, capture_intermediates=is_layer)

    _, seen = jax.jit(apply)(params)
    states = [np.asarray(params["embedding"])[tokens]]
    states += [np.asarray(seen["intermediates"][f"layers_{layer}"]["__call__"][0]) for layer in range(3)]
    for layer, (x, y) in enumerate(pairwise(states)):
        cosine = np.sum(x * y, axis=-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        assert influence[layer] == pytest.approx(np.mean(1 - cosine[valid]), abs=1e-5)
    assert influence[1] == pytest.approx(0, abs=1e-6)
    ranker = tiny_ranker_config(config, **PROMPT)
    assert kept(choose_layers("block-influence", ranker, params, calibration, 1)) == [0, 2]


def test_scores_under_masks_are_those_of_the_ranker(tmp_path: Path) -> None:
    ranker = tiny_ranker(tmp_path / "tiny", **PROMPT)
    requests = [
        prompt().encode("python developer", ["a job", "baker", "the pilot"]),
        prompt().encode("nurse", ["cook"]),
    ]
    found = masked_log_odds(ranker.config, ranker.params, keep_all(ranker.config.model), pack_calibration(requests))
    for row, scores in zip(found, ranker.score_many(requests), strict=True):
        np.testing.assert_allclose(row, scores.log_odds, rtol=0, atol=1e-4)


def test_greedy_depth_drops_the_layer_that_spoils_the_ranking(tmp_path: Path) -> None:
    """Labels are what layers 0 and 2 alone find best, so layer 1 is in the way."""
    config = tiny_ranker_config(tiny_config(num_layers=3), **PROMPT)
    params = tiny_params(config.model)
    queries, items = write_queries(tmp_path)
    calibration = read_calibration(queries, items, prompt(), max_tokens=3000)
    wanted = np.array([True, False, True])
    rows = masked_log_odds(config, params, replace(keep_all(config.model), keep_layers=wanted), calibration)
    labels = tuple(tuple(float(value == row.max()) for value in row) for row in rows)
    calibration = replace(calibration, labels=labels)
    measure = ndcg_measure(config, params, calibration)
    assert measure(wanted) == pytest.approx(1.0)
    assert measure(np.array([True, True, True])) < 1
    assert kept(choose_layers("greedy", config, params, calibration, 1)) == [0, 2]
    with pytest.raises(InputError, match="greedy: needs labels"):
        choose_layers("greedy", config, params, replace(calibration, labels=None), 1)


def test_the_order_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 for the same model, -1 for one that says no for yes, and of the first batches of a large set alone."""
    config = tiny_ranker_config(tiny_config(num_layers=2), **PROMPT)
    params = tiny_params(config.model)
    queries, items = write_queries(tmp_path)
    monkeypatch.setattr(depth, "ORDER_TOKENS", 1)
    calibration = read_calibration(queries, items, prompt(), max_tokens=60_000)
    assert len(calibration.forwards) > len(calibration.first(1).forwards)
    opposite = config.model_copy(update={"label_token_ids": config.label_token_ids[::-1]})
    for other, expected in ((config, 1.0), (opposite, -1.0)):
        found = order_kept(config, params, other, params, calibration)
        assert found is not None
        assert found.mean == pytest.approx(expected)
    alone = pack_calibration([prompt().encode("nurse", ["cook"])])
    assert order_kept(config, params, config, params, alone) is None
