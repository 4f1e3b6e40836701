"""Pruning a model in memory: settings, what is refused, layers first and then widths."""

from dataclasses import dataclass, replace
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from jaxslm.config import ModelConfig, Positive, RankerConfig, Settings
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from jaxslm.progress import progress
from jaxslm.prune.allocate import widths_by_layer
from jaxslm.prune.calibrate import Calibration
from jaxslm.prune.criteria import Criterion
from jaxslm.prune.depth import DepthCriterion, choose_layers
from jaxslm.prune.masks import Masks, keep_all
from jaxslm.prune.shrink import shrink
from jaxslm.prune.width import LayerReport, WidthTarget, prune_widths


class PruneSettings(Settings):
    """What to keep, and how to choose it.

    Attributes:
        mlp_keep, kv_groups_keep: neurons and KV groups to keep in every layer; all if None. drop_layers: how many go.
        by_layer: as many neurons in all, shared out among layers by what each would lose (`jaxslm.prune.allocate`).
        criterion: of neurons and groups (`jaxslm.prune.criteria`). refit: least squares for what stays.
        swaps: after osscar's choice, the most exchanges of a kept and a removed one, per layer and projection.
        depth_criterion: of layers (`jaxslm.prune.depth`). Layers go first; widths are fitted to the layers that stay.
        calibration_tokens: prompts are read until they have this many tokens.
        width_multiple: `mlp_keep` must be a multiple of it; GPUs multiply tiles of 128.
        seed: of the choice of prompts and of the random criterion.
    """

    mlp_keep: int | None = None
    by_layer: bool = False
    kv_groups_keep: int | None = None
    drop_layers: Annotated[int, Field(ge=0)] = 0
    criterion: Criterion = "osscar"
    refit: bool = True
    swaps: Annotated[int, Field(ge=0)] = 0
    depth_criterion: DepthCriterion = "keep-last-1"
    calibration_tokens: Positive = 65_536
    width_multiple: Positive = 128
    seed: Annotated[int, Field(ge=0)] = 0


def check_target(config: ModelConfig, settings: PruneSettings) -> None:
    """Raises InputError if the target is above what there is, leaves nothing, or is no multiple of the tile width."""
    for flag, keep, there, what in (
        ("--mlp-keep", settings.mlp_keep, _neurons_to_share(config, settings), "neurons"),
        ("--kv-groups-keep", settings.kv_groups_keep, min(config.kv_heads_by_layer), "KV groups"),
    ):
        if keep is not None and not 0 < keep <= there:
            problem = "leaves a layer without" if keep < 1 else f"is above the {there} of a layer's"
            raise InputError(f"{flag} {keep}: {problem} {what}")
    if settings.mlp_keep is not None and settings.mlp_keep % settings.width_multiple:
        raise InputError(
            f"--mlp-keep {settings.mlp_keep}: must be a multiple of {settings.width_multiple}, the width of a GPU's"
            " tiles (--width-multiple sets another)"
        )
    if settings.by_layer and (settings.criterion != "osscar" or settings.mlp_keep is None):
        raise InputError("--by-layer: shares out the neurons of --mlp-keep by the losses of --criterion osscar")
    if settings.by_layer and (narrowest := min(config.mlp_width_by_layer)) < settings.width_multiple:
        raise InputError(
            f"--by-layer: a layer of {narrowest} neurons is below --width-multiple {settings.width_multiple}"
        )
    if settings.swaps and settings.criterion != "osscar":
        raise InputError(f"--swaps {settings.swaps}: goes with --criterion osscar, not {settings.criterion}")
    if settings.drop_layers >= config.num_layers:
        raise InputError(f"--drop-layers {settings.drop_layers}: leaves nothing of {config.num_layers} layers")


def refuse_idle(settings: PruneSettings) -> None:
    """Raises InputError if a setting that is not its default changes nothing, for lack of what it goes with.

    For what a user asks of one model; the arms of a study (`jaxslm.prune.study`) share settings that not all need.
    """
    widths = settings.mlp_keep is not None or settings.kv_groups_keep is not None
    asked = settings.model_dump(exclude_defaults=True)
    for name, has_effect, partner in (
        ("criterion", widths, "--mlp-keep or --kv-groups-keep"),
        ("refit", widths, "--mlp-keep or --kv-groups-keep"),
        ("swaps", widths, "--mlp-keep or --kv-groups-keep"),
        ("width_multiple", settings.mlp_keep is not None, "--mlp-keep"),
        ("depth_criterion", settings.drop_layers > 0, "--drop-layers"),
    ):
        if name in asked and not has_effect:
            flag = "--no-refit" if name == "refit" else f"--{name.replace('_', '-')} {asked[name]}"
            raise InputError(f"{flag}: changes nothing without {partner}")


def _neurons_to_share(config: ModelConfig, settings: PruneSettings) -> int:
    """The most that `mlp_keep` can be: what every layer has, or by layer what they have on average, in whole tiles."""
    if not settings.by_layer:
        return min(config.mlp_width_by_layer)
    multiple = settings.width_multiple
    return sum(width // multiple * multiple for width in config.mlp_width_by_layer) // config.num_layers


def removes_anything(config: ModelConfig, settings: PruneSettings) -> bool:
    """Whether a target leaves less of this model than there is, its vocabulary aside."""
    widths = (_neurons_to_share(config, settings),) if settings.by_layer else config.mlp_width_by_layer
    keeps = ((settings.mlp_keep, widths), (settings.kv_groups_keep, config.kv_heads_by_layer))
    return settings.drop_layers > 0 or any(keep is not None and keep < max(there) for keep, there in keeps)


@dataclass(frozen=True)
class Pruned:
    """A pruned model in memory: `masks` are over the parts of the model it was made from."""

    config: ModelConfig
    params: Params
    masks: Masks
    layers: list[LayerReport]


def prune_model(config: RankerConfig, params: Params, calibration: Calibration, settings: PruneSettings) -> Pruned:
    """Returns the smaller model: layers are chosen on the dense model, then widths layer by layer on what is left.

    Raises:
        InputError: as `check_target`, a parameter that is not finite, fewer tokens of queries and items than a layer to
            prune has inputs, a layer whose inputs are all zero on them, or greedy depth without labels.
    """
    check_target(config.model, settings)
    _check_finite(params)
    _check_tokens(config.model, calibration, settings)
    everything = keep_all(config.model)
    keep_layers = choose_layers(settings.depth_criterion, config, params, calibration, settings.drop_layers)
    shallow, params = shrink(config.model, params, replace(everything, keep_layers=keep_layers))
    kept = np.flatnonzero(keep_layers)
    masks, layers = keep_all(shallow), list[LayerReport]()
    if settings.mlp_keep is not None or settings.kv_groups_keep is not None:
        keep, widths = settings.mlp_keep, None
        if keep is not None and settings.by_layer:
            check_target(
                shallow, settings.model_copy(update={"drop_layers": 0})
            )  # the layers that went had their share
            widths = widths_by_layer(shallow, params, calibration, keep, settings.width_multiple)
        target = WidthTarget(
            widths or keep,
            settings.kv_groups_keep,
            settings.criterion,
            settings.refit,
            settings.swaps,
            settings.seed,
        )
        with progress() as bar:
            task = bar.add_task("pruning layers", total=shallow.num_layers)
            params, masks, layers = prune_widths(
                shallow, params, calibration, target, kept.tolist(), lambda: bar.advance(task)
            )
    smaller, params = shrink(shallow, params, masks)
    for whole, part in (
        (everything.keep_neurons, masks.keep_neurons),
        (everything.keep_kv_groups, masks.keep_kv_groups),
    ):
        whole[kept, : part.shape[1]] = part
    return Pruned(smaller, params, replace(everything, keep_layers=keep_layers), layers)


def _check_finite(params: Params) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if not bool(jnp.isfinite(leaf).all()):
            raise InputError(f"parameters: {jax.tree_util.keystr(path)} holds numbers that are not finite")


def _check_tokens(config: ModelConfig, calibration: Calibration, settings: PruneSettings) -> None:
    inputs = 0
    if settings.mlp_keep is not None:
        inputs = max(config.mlp_width_by_layer)
    if settings.kv_groups_keep is not None:
        inputs = max(inputs, config.queries_per_kv * config.head_dim * max(config.kv_heads_by_layer))
    if calibration.text_tokens < inputs:
        raise InputError(
            f"calibration: {calibration.text_tokens} tokens of queries and items say too little about the {inputs}"
            " inputs of a layer's output projection: give at least one per input"
        )
