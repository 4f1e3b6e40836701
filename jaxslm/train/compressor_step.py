"""The loss of a compressor and its ranker, which of their parameters train, and at which rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxslm.compress.encoder import pooled_states
from jaxslm.compress.projector import project
from jaxslm.compress.splice import override
from jaxslm.config import CompressorConfig, RankerConfig
from jaxslm.model.cost import attention_flops_per_pair, linear_flops_per_token
from jaxslm.model.decoder import Decoder, Params
from jaxslm.train import losses
from jaxslm.train.compressor_data import MIXED, TEXT
from jaxslm.train.compressor_settings import CompressorLosses, CompressorTraining
from jaxslm.train.partition import LABEL_ROWS, TABLES, Frozen, Partition, head_rows, join_params, split_params
from jaxslm.train.ranker import list_log_odds, lists, ranking_terms, weighted_sum
from jaxslm.train.speed import BACKWARD, Work, ranker_work, total
from jaxslm.train.step import DATA, Batch, ItemStates, LossFn, decode_items, gather, item_states, learning_rates
from jaxslm.train.teacher import Teacher

TAUGHT = ("distillation", "list_distillation", "hidden")
"""Terms that compare with a teacher."""
INT8_LARGEST = 127.0


@dataclass(frozen=True)
class Models:
    """The two decoders of a compressor and what they are."""

    config: RankerConfig
    compressor: CompressorConfig
    ranker: Decoder
    encoder: Decoder


def rounded_to_int8(vectors: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """Returns what an int8 record gives back: multiples of a 127th of each vector's largest value."""
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    scale = jnp.maximum(largest / INT8_LARGEST, jnp.finfo(jnp.float32).tiny)
    return jnp.round(vectors / scale) * scale


def mixed_states(models: Models, params: Params, batch: Batch, mesh: Mesh, *, every: bool) -> ItemStates:
    """Returns `item_states` of items that are vectors; each device encodes and reads its own part.

    Args:
        params: `{"ranker", "encoder", "projector"}`. batch: `MixedLists.collate`, "k" and "noise".
    """
    encoded = ("pooled",) if "pooled" in batch else ("item_tokens", "item_valid", "segments")

    def local(params: Params, part: Batch) -> ItemStates:
        part = {name: array[0] for name, array in part.items()}
        tokens, prefix, items = (part[name] for name in MIXED)
        R, J, _ = items.shape
        inputs = [part[name] for name in encoded]
        pooled = inputs[0]
        if "pooled" not in part:
            pooled = pooled_states(models.encoder, models.compressor.prefix_ids, params["encoder"], *inputs)
        vectors = project(models.compressor, params["projector"], pooled)
        # Rounding has no gradient: the vectors get that of what was stored.
        vectors += part["noise"] * jax.lax.stop_gradient(rounded_to_int8(vectors) - vectors)
        x_MD = jnp.asarray(models.ranker.apply({"params": params["ranker"]}, tokens, method=Decoder.embed))
        C = vectors.shape[1]
        places_RJC = jnp.where(jnp.arange(C) < part["k"], items[..., :C], len(tokens))  # a smaller k leaves some out
        x_MD = override(x_MD, vectors.reshape(R, J, *vectors.shape[1:]), places_RJC)
        return decode_items(models.ranker, params["ranker"], x_MD, prefix, items, every=every)

    part = {name: batch[name] for name in (*MIXED, *encoded, "k", "noise")}
    states: ItemStates = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(DATA))(params, part)
    return states


def compressor_loss(
    models: Models, weights: CompressorLosses, partition: Partition, mesh: Mesh, teacher: Teacher | None
) -> LossFn:
    """Returns the loss of one micro-batch as a function of (trainable, frozen, batch).

    On text it is a ranker's. On vectors it is that, with the teacher's terms times "teach", plus the alignment with the
    same ranker on text times "align". The terms come back without these factors, and with "k", vectors an item, 0 on
    text.
    """

    def loss_fn(trainable: Params, frozen: Frozen, batch: Batch) -> tuple[Array, dict[str, Array]]:
        params = gather(partition.join(trainable, frozen["tables"]), models.ranker.dtype, mesh)
        rows_2D = head_rows(trainable.get("ranker", {}), params["ranker"], models.config)
        taught = teacher.states(frozen["teacher"], batch) if teacher is not None else None
        every = weights.mean_state > 0
        on_vectors = MIXED[0] in batch
        if on_vectors:
            joint = jnp.all(batch["joint"])
            params |= trained_if(joint, {name: params[name] for name in ("ranker", "encoder")})
            rows_2D = trained_if(joint, rows_2D)
            states = mixed_states(models, params, batch, mesh, every=every)
        else:
            states = item_states(models.ranker, params["ranker"], batch, mesh, every=every)
        terms = ranking_terms(states, rows_2D, batch, weights, taught)
        factors = dict.fromkeys(terms, jnp.float32(1))
        if on_vectors:
            factors |= {name: jnp.mean(batch["teach"]) for name in TAUGHT if name in terms}
            if weights.aligns:
                aligned = _alignment(models, params["ranker"], states.last, rows_2D, batch, weights, mesh)
                terms |= aligned
                factors |= dict.fromkeys(aligned, jnp.mean(batch["align"]))
        loss = weighted_sum({name: factors[name] * term for name, term in terms.items()}, weights)
        return loss, terms | {"k": jnp.mean(batch["k"]) if on_vectors else jnp.float32(0)}

    return loss_fn


def trained_if(condition: Array, tree: Any) -> Any:
    """Returns the tree as it is; it gets no gradient unless the condition holds."""
    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, jax.lax.stop_gradient(leaf)), tree)


def _alignment(
    models: Models,
    ranker: Params,
    states: Array,
    rows_2D: Array,
    batch: Batch,
    weights: CompressorLosses,
    mesh: Mesh,
) -> dict[str, Array]:
    """Terms between the last tokens' states on vectors and those of the same ranker on text, which get no gradient."""
    text = item_states(models.ranker, jax.lax.stop_gradient(ranker), batch, mesh).last
    valid_RJ = lists(batch["valid"])
    terms = {}
    if weights.alignment:
        frozen_rows = jax.lax.stop_gradient(rows_2D)
        terms["alignment"] = losses.distillation_kl(
            list_log_odds(states, rows_2D), list_log_odds(text, frozen_rows), valid_RJ
        )
    if weights.hidden_alignment:
        terms["hidden_alignment"] = losses.hidden_cosine(lists(states), lists(text), valid_RJ)
    return terms


def compressor_work(models: Models, batch: Mapping[str, np.ndarray]) -> Work:
    """Returns the work of a batch; a text that vectors are compared with is read forward alone."""
    ranker, encoder = models.config.model, models.compressor.encoder
    if MIXED[0] not in batch:
        return ranker_work(ranker, batch)
    works = [ranker_work(ranker, {name: batch[source] for name, source in zip(TEXT, MIXED, strict=True)})]
    if TEXT[0] in batch:
        text = ranker_work(ranker, batch)
        works.append(text._replace(flops=text.flops // (1 + BACKWARD)))
    if "item_valid" in batch:
        lengths = np.sum(batch["item_valid"], axis=-1, dtype=np.int64)
        before = len(models.compressor.prefix_ids)  # read once for all items
        encoded = before + int(lengths.sum())
        pairs = before * (before + 1) // 2 + int(np.sum(lengths * (before + (lengths + 1) / 2)))
        forward = linear_flops_per_token(encoder) * encoded + attention_flops_per_pair(encoder) * pairs
        passes = 1 + BACKWARD if np.all(batch["joint"]) else 1
        works.append(Work(encoded, before + batch["item_valid"].size, passes * forward))
    return total(works)


def compressor_partition(settings: CompressorTraining, config: RankerConfig) -> Partition:
    """Returns the partition of `{"ranker", "encoder", "projector"}`: parts of factor 0 and frozen tables stay."""
    optimiser, freeze = settings.optimiser, settings.freeze_embeddings

    def split(params: Params) -> tuple[Params, Params]:
        trainable, frozen = {"projector": params["projector"]}, {}
        if optimiser.ranker_factor:
            trainable["ranker"], frozen["ranker"] = split_params(
                params["ranker"], config, freeze_embeddings=freeze, train_layers=settings.train_layers
            )
        else:
            frozen["ranker"] = params["ranker"]
        stays = {*params["encoder"]} if not optimiser.encoder_factor else {*TABLES} if freeze else set()
        frozen["encoder"] = {name: leaf for name, leaf in params["encoder"].items() if name in stays}
        if rest := {name: leaf for name, leaf in params["encoder"].items() if name not in stays}:
            trainable["encoder"] = rest
        return trainable, frozen

    def join(trainable: Params, frozen: Params) -> Params:
        ranker = frozen["ranker"]
        if "ranker" in trainable:
            ranker = join_params(trainable["ranker"], ranker, config)
        encoder = frozen["encoder"] | trainable.get("encoder", {})
        return {"ranker": ranker, "encoder": encoder, "projector": trainable["projector"]}

    return Partition(split, join)


def compressor_rates(settings: CompressorTraining, part: str) -> optax.Schedule:
    """Returns the schedule of "projector", "encoder" or "ranker": the first updates are the projector's alone."""
    optimiser, curriculum = settings.optimiser, settings.curriculum
    factors = {"projector": 1.0, "encoder": optimiser.encoder_factor, "ranker": optimiser.ranker_factor}
    warm_up = curriculum.projector_steps
    joint = learning_rates(optimiser, settings.steps - warm_up)
    first = curriculum.projector_rate if part == "projector" else 0.0
    later = lambda step: factors[part] * joint(step)  # noqa: E731
    return optax.join_schedules([optax.constant_schedule(first), later], [warm_up]) if warm_up else later


def compressor_optimiser(settings: CompressorTraining) -> optax.GradientTransformation:
    """Returns clipping, then AdamW by `compressor_rates`; it decays layers' matrices, label rows have their rate."""
    optimiser = settings.optimiser

    def keys(path: tuple[jax.tree_util.DictKey, ...]) -> list[str]:
        return [str(key.key) for key in path]

    def decays(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.ndim > 1 and any(key.startswith("layers_") for key in keys(path)), params
        )

    def is_label_rows(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: LABEL_ROWS in keys(path), params)

    parts = {
        part: optax.chain(
            optax.adamw(compressor_rates(settings, part), b2=0.95, weight_decay=optimiser.weight_decay, mask=decays),
            optax.masked(optax.scale(optimiser.label_head_factor), is_label_rows),
        )
        for part in ("projector", "encoder", "ranker")
    }
    return optax.chain(
        optax.clip_by_global_norm(optimiser.clip_norm),
        optax.partition(parts, lambda params: jax.tree_util.tree_map_with_path(lambda path, _: keys(path)[0], params)),
    )
