"""Widths by layer: as many neurons in all as an even cut keeps, each where it is missed most.

OSSCAR's removals give the loss of every width of a layer in one pass (`jaxslm.prune.osscar.removal_losses`). Layers
share the residual stream, and what reads it next reads it normed: so a layer's loss is counted as a share of the
squared norm of the states behind it, and shares are added up. The least sum for a budget is found exactly, by dynamic
programming over layers in steps of one tile.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxslm.config import ModelConfig
from jaxslm.model.decoder import Params
from jaxslm.prune.calibrate import Calibration, embed, gather_statistics, layer_functions
from jaxslm.prune.osscar import damped, removal_losses

TOKENS = 8192
"""Calibration tokens that the widths are chosen by, at most; the fit has more to find."""


def widths_by_layer(
    config: ModelConfig, params: Params, calibration: Calibration, keep: int, multiple: int
) -> tuple[int, ...]:
    """Returns how many neurons each layer keeps: multiples of `multiple`, `keep` times the number of layers in all.

    Losses are those of the dense model's layers, each pruned alone, after the survivors are re-fitted. Cost: a forward
    pass over the first calibration tokens and one OSSCAR removal per layer.

    Args:
        keep: at most what layers have on average, in whole multiples. multiple: divides `keep`.
    """
    calibration = calibration.first(TOKENS)
    states, shares = embed(params, calibration), []
    for layer, width in enumerate(config.mlp_width_by_layer):
        functions, weights = layer_functions(config, layer), params[f"layers_{layer}"]
        down = np.asarray(weights["mlp"]["down"], np.float64)
        gram, _ = gather_statistics(functions.add_neurons, width, weights, states, calibration)
        living = np.where(np.diagonal(gram)[:, None] > 0, down, 0.0)
        losses = removal_losses(damped(gram), living, 1, range(multiple, width + 1, multiple))
        squares = 0.0
        for place, batch in enumerate(calibration.batches()):
            states[place] = functions.forward(weights, states[place], batch)
            squares += float(jnp.sum(jnp.square(states[place]), where=batch["real"][:, None]))
        shares.append(2 * losses / squares if squares else losses)
    return tuple(multiple * units for units in least_sum(shares, keep // multiple * config.num_layers))


def least_sum(costs: Sequence[Float[np.ndarray, " _"]], units: int) -> list[int]:
    """Returns u with sum(u) = units and 1 <= u[l] <= len(costs[l]) of least sum of costs[l][u[l] - 1].

    Exact, by dynamic programming: best[s] is the least cost of the rows so far when they take s units.

    Args:
        units: at least the number of rows, at most what they have.
    """
    best, taken = np.full(units + 1, np.inf), []
    best[0] = 0.0
    for row in costs:
        trials = np.full((len(row), units + 1), np.inf)
        for used in range(1, min(len(row), units) + 1):
            trials[used - 1, used:] = best[: units + 1 - used] + row[used - 1]
        taken.append(np.argmin(trials, axis=0) + 1)
        best = trials.min(axis=0)
    chosen: list[int] = []
    for row_taken in reversed(taken):
        chosen.append(int(row_taken[units]))
        units -= chosen[-1]
    return chosen[::-1]
