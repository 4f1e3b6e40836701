"""Which layers go: the last ones, those that change their states least, or one by one by a measure of the result."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from jaxslm.config import ModelConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from jaxslm.prune.calibrate import Calibration, embed, layer_functions

DepthCriterion = Literal["last", "keep-last-1", "keep-last-2", "block-influence", "greedy"]

Layers = Bool[np.ndarray, " L"]


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
        The layers that stay, and the measure after each removal.
    """
    keep, values = np.ones(layers, bool), []
    for _ in range(drop):
        candidates = []
        for layer in np.flatnonzero(keep):
            trial = keep.copy()
            trial[layer] = False
            candidates.append((measure(trial), layer))
        value, layer = max(candidates)
        keep[layer] = False
        values.append(value)
    return keep, values
