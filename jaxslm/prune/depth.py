"""Which layers go: the last ones, those that change their states least, or one by one by the quality of the ranking."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from jaxslm.config import ModelConfig, RankerConfig
from jaxslm.errors import InputError
from jaxslm.evaluate.agreement import kendall_tau
from jaxslm.evaluate.metrics import Estimate, Run, evaluate_run
from jaxslm.model.decoder import Params
from jaxslm.prune.calibrate import Calibration, embed, layer_functions, masked_log_odds
from jaxslm.prune.masks import keep_all

DepthCriterion = Literal["last", "keep-last-1", "keep-last-2", "block-influence", "greedy"]
"""last: the last layers go; keep-last-n: those before the n last, for the very last one reads the answer, above all one
that `comparison_layer` made (docs/results/pruning.md); block-influence: those that turn their states least;
greedy: again and again the one without which nDCG@10 on the calibration lists is best."""

Layers = Bool[np.ndarray, " L"]

ORDER_TOKENS = 8192
"""Calibration tokens on which the orders before and after are compared."""


def choose_layers(
    criterion: DepthCriterion, config: RankerConfig, params: Params, calibration: Calibration, drop: int
) -> Layers:
    """Returns the layers that stay when `drop` of them go.

    Raises:
        InputError: there are not that many, or greedy removal of a calibration set without labels.
    """
    if drop == 0:
        return np.ones(config.model.num_layers, bool)
    match criterion:
        case "block-influence":
            return drop_least(block_influence(config.model, params, calibration), drop)
        case "greedy":
            return drop_greedily(config.model.num_layers, drop, ndcg_measure(config, params, calibration))[0]
        case "last":
            return drop_last(config.model.num_layers, drop)
        case _:
            return drop_last(config.model.num_layers, drop, int(criterion.removeprefix("keep-last-")))


def drop_last(layers: int, drop: int, keep_last: int = 0) -> Layers:
    """Returns the layers without `drop` neighbours that end just before the `keep_last` final ones.

    Raises:
        InputError: there are not that many.
    """
    if drop + keep_last > layers or drop >= layers:
        raise InputError(f"cannot drop {drop} layers before the last {keep_last}: the model has {layers}")
    keep = np.ones(layers, bool)
    keep[layers - keep_last - drop : layers - keep_last] = False
    return keep


def block_influence(config: ModelConfig, params: Params, calibration: Calibration) -> Float[np.ndarray, " L"]:
    """Returns each layer's mean of 1 - cos(state before, state after) over real tokens, in [0, 2].

    Men et al., "ShortGPT" (2403.03853).
    """
    states = embed(params, calibration)
    influence = np.zeros(config.num_layers)
    for layer in range(config.num_layers):
        functions, layer_params = layer_functions(config, layer), params[f"layers_{layer}"]
        for number, batch in enumerate(calibration.batches()):
            influence[layer] += float(functions.influence(layer_params, states[number], batch))
            states[number] = functions.forward(layer_params, states[number], batch)
    return influence / calibration.tokens


def drop_least(importance: Float[np.ndarray, " L"], drop: int) -> Layers:
    """Returns the layers without the `drop` of least importance; of equals the later one goes."""
    order = np.lexsort((-np.arange(len(importance)), importance))
    keep = np.ones(len(importance), bool)
    keep[order[:drop]] = False
    return keep


def drop_greedily(layers: int, drop: int, measure: Callable[[Layers], float]) -> tuple[Layers, Sequence[float]]:
    """Removes the layer whose removal measures best, `drop` times.

    The idea is SLEB's (Song et al., 2402.09025), with the caller's own measure. Cost: about `drop * layers` measures.

    Args:
        measure: from the layers that are kept, a number; larger is better.

    Returns:
        The layers that stay, and the measure after each removal. Of equals the later layer goes.
    """
    keep, values = np.ones(layers, bool), []
    for _ in range(drop):
        candidates = []
        for layer in np.flatnonzero(keep):
            trial = keep.copy()
            trial[layer] = False
            candidates.append((float(measure(trial)), layer))
        value, layer = max(candidates)
        keep[layer] = False
        values.append(value)
    return keep, values


def ndcg_measure(config: RankerConfig, params: Params, calibration: Calibration) -> Callable[[Layers], float]:
    """Returns the mean nDCG@10 over the calibration's lists as a function of the layers that are kept.

    Raises:
        InputError: the calibration set has no labels.
    """
    if calibration.labels is None:
        raise InputError("depth criterion greedy: needs labels: calibrate with queries and their items (--items)")
    labels = {str(query): _by_place(row) for query, row in enumerate(calibration.labels)}
    everything = keep_all(config.model)

    def measure(keep: Layers) -> float:
        rows = masked_log_odds(config, params, replace(everything, keep_layers=keep), calibration)
        run = {str(query): _by_place(row.tolist()) for query, row in enumerate(rows)}
        return evaluate_run(labels, run, resamples=1).estimates["ndcg_at_10"].mean

    return measure


def order_kept(
    dense: RankerConfig, dense_params: Params, small: RankerConfig, small_params: Params, calibration: Calibration
) -> Estimate | None:
    """Returns Kendall's tau of the pruned model's order of the calibration lists to that of the model before.

    1 is the same order, 0 one that has nothing to do with it; None if no list has two items. What a layer's errors
    do not say: layers that go can take all of a ranking with them.
    """
    some = calibration.first(ORDER_TOKENS)

    def run(config: RankerConfig, params: Params) -> Run:
        rows = masked_log_odds(config, params, keep_all(config.model), some)
        return {str(query): _by_place(row[~np.isnan(row)].tolist()) for query, row in enumerate(rows)}

    return kendall_tau(run(dense, dense_params), run(small, small_params))


def _by_place(values: Sequence[float]) -> dict[str, float]:
    return {str(place): value for place, value in enumerate(values)}
