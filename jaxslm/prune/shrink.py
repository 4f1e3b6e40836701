"""From masks to an ordinary smaller model that loads anywhere: rows and columns gathered, layers renumbered."""

from typing import Any

import numpy as np

from jaxslm.config import ModelConfig
from jaxslm.model.decoder import Params
from jaxslm.model.depth import config_of_layers
from jaxslm.prune.masks import Masks, check_masks


def shrunk_config(config: ModelConfig, masks: Masks) -> ModelConfig:
    """Returns the shape that the masks leave; widths are one number where all layers agree. Ignores `keep_vocab`."""
    kept = np.flatnonzero(masks.keep_layers)
    return config_of_layers(
        config,
        [int(masks.keep_kv_groups[layer].sum()) for layer in kept],
        [int(masks.keep_neurons[layer].sum()) for layer in kept],
    )


def shrink(config: ModelConfig, params: Params, masks: Masks) -> tuple[ModelConfig, Params]:
    """Returns the model that computes what `config` computes under the masks (float32: to rounding).

    Shrinking under masks that keep everything changes nothing. The vocabulary stays: cutting it takes a tokenizer too
    (`jaxslm.prune.vocab`). Works on abstract parameters inside `jax.eval_shape`.

    Raises:
        InputError: as `check_masks`.
    """
    check_masks(config, masks)
    smaller = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    for new, old in enumerate(np.flatnonzero(masks.keep_layers)):
        smaller[f"layers_{new}"] = shrink_layer(
            config, params[f"layers_{old}"], masks.keep_neurons[old], masks.keep_kv_groups[old]
        )
    return shrunk_config(config, masks), smaller


def shrink_layer(
    config: ModelConfig, layer: dict[str, Any], keep_neurons: np.ndarray, keep_kv_groups: np.ndarray
) -> dict[str, Any]:
    """Returns a layer's parameters with the kept neurons and KV groups (with their query heads) only."""
    neurons, groups = np.flatnonzero(keep_neurons), np.flatnonzero(keep_kv_groups)
    keys, queries = _places(groups, config.head_dim), _places(groups, config.queries_per_kv * config.head_dim)
    attention, mlp = layer["attention"], layer["mlp"]
    return layer | {
        "attention": attention
        | {
            "q": attention["q"][:, queries],
            "k": attention["k"][:, keys],
            "v": attention["v"][:, keys],
            "o": attention["o"][queries],
        },
        "mlp": mlp | {"gate": mlp["gate"][:, neurons], "up": mlp["up"][:, neurons], "down": mlp["down"][neurons]},
    }


def _places(groups: np.ndarray, size: int) -> np.ndarray:
    """The rows of these groups when group g has rows g * size to (g + 1) * size."""
    return (groups[:, None] * size + np.arange(size)).reshape(-1)
