"""Neurons and KV groups, layer by layer: each layer is pruned on the states that the pruned layers before it make."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxslm.config import ModelConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from jaxslm.prune.calibrate import Calibration, embed, gather_statistics, layer_functions
from jaxslm.prune.criteria import Criterion, Projection, PrunedProjection, prune_projection
from jaxslm.prune.masks import Masks, keep_all


@dataclass(frozen=True)
class WidthTarget:
    """What to keep in every layer, all where None, and how to choose it (`jaxslm.prune.criteria`).

    `mlp_keep`: one number, or one for each layer.
    """

    mlp_keep: int | Sequence[int] | None = None
    kv_groups_keep: int | None = None
    criterion: Criterion = "osscar"
    refit: bool = True
    swaps: int = 0
    seed: int = 0


@dataclass(frozen=True)
class LayerReport:
    """Relative reconstruction error of a layer's output projections, None where nothing was pruned.

    `neurons`: how many stay. `dead_neurons`: neurons that are zero on every calibration token; they go first.
    """

    layer: int
    attention_error: float | None = None
    mlp_error: float | None = None
    neurons: int | None = None
    dead_neurons: int = 0


def prune_widths(
    config: ModelConfig,
    params: Params,
    calibration: Calibration,
    target: WidthTarget,
    numbers: Sequence[int] | None = None,
    done: Callable[[], None] = lambda: None,
) -> tuple[Params, Masks, list[LayerReport]]:
    """Prunes every layer to the target, in order, KV groups before neurons.

    Args:
        params: not changed. numbers: what layers are called in reports and errors; 0, 1, ... if None.
        done: called after each layer.

    Returns:
        The parameters, their output projections re-fitted, with zero rows for what was removed, in their own dtypes;
        the masks; a report per layer. `shrink` of these is the smaller model.

    Raises:
        InputError: all inputs of a projection are zero on the calibration tokens.
    """
    states = embed(params, calibration)
    pruned, masks, reports = dict(params), keep_all(config), []
    for layer in range(config.num_layers):
        name, functions, found = f"layers_{layer}", layer_functions(config, layer), dict[str, Any]()
        number = layer if numbers is None else numbers[layer]
        neurons = target.mlp_keep[layer] if isinstance(target.mlp_keep, Sequence) else target.mlp_keep
        for part, matrix, add, size, keep, mask in (
            ("attention", "o", functions.add_heads, config.queries_per_kv * config.head_dim, target.kv_groups_keep,
             masks.keep_kv_groups[layer]),
            ("mlp", "down", functions.add_neurons, 1, neurons, masks.keep_neurons[layer]),
        ):  # fmt: skip
            if keep is None:
                continue
            projection = _projection(add, pruned[name], pruned[name][part][matrix], states, calibration, size)
            if not np.diagonal(projection.gram).any():
                raise InputError(
                    f"layer {number}: every {'neuron' if part == 'mlp' else 'head'} is zero on the calibration tokens;"
                    " drop the layer, or calibrate with texts that use it"
                )
            result = prune_projection(
                projection, target.criterion, keep, refit=target.refit, swaps=target.swaps, seed=target.seed + layer
            )
            pruned[name] = _with_weight(pruned[name], part, matrix, result)
            mask[: projection.groups] = result.keep
            found[f"{part}_error"] = result.error
            if part == "mlp":
                dead = np.diagonal(projection.gram) == 0
                found |= {"neurons": int(result.keep.sum()), "dead_neurons": int(dead.sum())}
        for place, batch in enumerate(calibration.batches()):
            states[place] = functions.forward(pruned[name], states[place], batch)
        reports.append(LayerReport(number, **found))
        done()
    return pruned, masks, reports


def _projection(
    add: Callable[..., Any], layer: Params, weight: Array, states: list[Array], calibration: Calibration, size: int
) -> Projection:
    gram, total = gather_statistics(add, weight.shape[0], layer, states, calibration)
    return Projection(np.asarray(weight, np.float64), gram, total, calibration.tokens, size)


def _with_weight(layer: Params, part: str, matrix: str, result: PrunedProjection) -> Params:
    weight = jnp.asarray(result.weight, layer[part][matrix].dtype)
    return layer | {part: layer[part] | {matrix: weight}}
