"""Masks: which neurons, KV groups, layers and vocabulary rows of a model stay. True keeps."""

from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from jaxslm.config import ModelConfig
from jaxslm.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masks:
    """What stays of a model with L layers of at most F neurons and K KV groups: a pytree of booleans.

    Attributes:
        keep_neurons: [L, F], keep_kv_groups: [L, K]. A layer that has fewer has False behind its last one.
        keep_layers: [L].
        keep_vocab: [V], None where the vocabulary stays whole.
    """

    keep_neurons: np.ndarray
    keep_kv_groups: np.ndarray
    keep_layers: np.ndarray
    keep_vocab: np.ndarray | None = None

    def tree(self) -> dict[str, np.ndarray]:
        """Returns the masks by name, without those that are None: what a checkpoint stores as `masks`."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: mask for name, mask in named.items() if mask is not None}

    def variables(self, config: ModelConfig) -> dict[str, Any]:
        """Returns the model's variable collection "masks"; the vocabulary's mask has no part in a forward pass."""
        return {
            f"layers_{layer}": {
                "mlp": {"keep_neurons": self.keep_neurons[layer, :F]},
                "attention": {"keep_kv_groups": self.keep_kv_groups[layer, :K]},
                "keep_layer": self.keep_layers[layer],
            }
            for layer, (F, K) in enumerate(zip(config.mlp_width_by_layer, config.kv_heads_by_layer, strict=True))
        }


def keep_all(config: ModelConfig) -> Masks:
    """Returns the masks that keep everything."""
    widths, groups = np.array(config.mlp_width_by_layer), np.array(config.kv_heads_by_layer)
    return Masks(
        np.arange(widths.max()) < widths[:, None],
        np.arange(groups.max()) < groups[:, None],
        np.ones(config.num_layers, bool),
    )


def check_masks(config: ModelConfig, masks: Masks) -> None:
    """Raises InputError if the masks are of another shape, keep what there is not, or leave nothing of a part."""
    everything = keep_all(config)
    for each in ("keep_neurons", "keep_kv_groups", "keep_layers"):
        mask, there = getattr(masks, each), getattr(everything, each)
        if mask.shape != there.shape or mask.dtype != bool:
            raise InputError(f"{each}: must be booleans of shape {there.shape}, is {mask.dtype} of shape {mask.shape}")
        if (mask & ~there).any():
            raise InputError(f"{each}: keeps what layer {int(np.argwhere(mask & ~there)[0][0])} does not have")
    if not masks.keep_layers.any():
        raise InputError("keep_layers: leaves no layer")
    for each, what in (("keep_neurons", "neuron"), ("keep_kv_groups", "KV group")):
        empty = masks.keep_layers & ~getattr(masks, each).any(axis=1)
        if empty.any():
            raise InputError(f"{each}: leaves no {what} in layer {int(np.argmax(empty))}; drop the layer instead")
    if masks.keep_vocab is not None and masks.keep_vocab.shape != (config.vocab_size,):
        raise InputError(f"keep_vocab: must have {config.vocab_size} rows, has {masks.keep_vocab.shape}")
