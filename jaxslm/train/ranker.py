"""The loss of a ranker: log-odds of the label rows at each item's last token, against labels and a teacher."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxslm.checkpoint import Checkpoint
from jaxslm.config import RankerConfig
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.head import log_odds
from jaxslm.progress import console
from jaxslm.score.buckets import few_buckets
from jaxslm.score.scorer import Ranker
from jaxslm.train import losses
from jaxslm.train.comparison import add_comparison_layer
from jaxslm.train.data import ranker_batches, ranker_data
from jaxslm.train.heldout import HeldOut
from jaxslm.train.hosts import join_hosts
from jaxslm.train.loop import Task, TrainResult, dtype_of, run, saver
from jaxslm.train.partition import Frozen, head_rows, join_params, partition_of
from jaxslm.train.settings import LossWeights, RankerLosses, RankerTraining
from jaxslm.train.sources import TrainingData
from jaxslm.train.speed import ranker_work
from jaxslm.train.start import load_start
from jaxslm.train.step import Batch, ItemStates, LossFn, gather, item_states, learning_rates, make_mesh, make_optimiser
from jaxslm.train.teacher import Teacher, load_teacher

LABEL_LOSSES = {
    "binary_cross_entropy": losses.binary_cross_entropy,
    "list_softmax": losses.list_softmax,
    "pairwise_logistic": losses.pairwise_logistic,
    "regression_compatible": losses.regression_compatible,
}


def ranker_loss(
    config: RankerConfig, decoder: Decoder, weights: RankerLosses, mesh: Mesh, teacher: Teacher | None
) -> LossFn:
    """Returns the weighted sum of the losses as a function of (trainable, frozen, batch).

    The teacher's log-odds come from `teacher`, else from the batch ("teacher": NaN where there is none).
    """
    taught_every = weights.every_state > 0

    def loss_fn(trainable: Params, frozen: Frozen, batch: Batch) -> tuple[Array, dict[str, Array]]:
        params = join_params(trainable, frozen["tables"], config)
        every = taught_every or weights.mean_state > 0
        states = item_states(decoder, gather(params, decoder.dtype, mesh), batch, mesh, every=every)
        taught = teacher.states(frozen["teacher"], batch, every=taught_every) if teacher is not None else None
        terms = ranking_terms(states, head_rows(trainable, params, config), batch, weights, taught)
        if taught is not None and states.every is not None and taught[0].every is not None:
            terms["every_state"] = losses.hidden_cosine(states.every, taught[0].every, jax.vmap(_real_tokens)(batch))
        return weighted_sum(terms, weights), terms

    return loss_fn


def ranking_terms(
    states: ItemStates, rows_2D: Array, batch: Batch, weights: LossWeights, taught: tuple[ItemStates, Array] | None
) -> dict[str, Array]:
    """Returns the terms of the loss that have a weight, by name.

    Args:
        states: with means if `mean_state` has a weight.
        rows_2D: head rows of (no, yes).
        batch: "labels", "valid", and "teacher" if log-odds are stored.
        taught: the states and head rows of a teacher on the same items.
    """
    labels_RJ, valid_RJ = lists(batch["labels"]), lists(batch["valid"])
    terms = {}
    if weights.mean_state and states.mean is not None:
        mean_terms = _label_terms(list_log_odds(states.mean, rows_2D), labels_RJ, valid_RJ, weights)
        terms["mean_state"] = weighted_sum(mean_terms, weights)
    odds_RJ = list_log_odds(states.last, rows_2D)
    terms |= _label_terms(odds_RJ, labels_RJ, valid_RJ, weights)
    if taught is not None:
        taught_states, taught_rows = taught
        teacher_RJ = list_log_odds(taught_states.last, taught_rows)
        if weights.hidden:
            terms["hidden"] = losses.hidden_cosine(lists(states.last), lists(taught_states.last), valid_RJ)
    elif weights.needs_teacher:
        teacher_RJ = lists(batch["teacher"])
    if weights.needs_teacher:
        terms |= _distillation(odds_RJ, teacher_RJ, valid_RJ, weights)
    return terms


def _real_tokens(batch: Batch) -> Array:
    """Which tokens of a packed batch are some row's: bool [M]."""
    used = jnp.concatenate([batch["prefix"].reshape(-1), batch["items"].reshape(-1)])
    return jnp.zeros(batch["tokens"].shape[-1], bool).at[used].set(True, mode="drop")


def weighted_sum(terms: dict[str, Array], weights: LossWeights) -> Array:
    """Returns the sum of the terms, each times the weight of its name."""
    return sum((getattr(weights, name) * term for name, term in terms.items()), jnp.float32(0))


def list_log_odds(states: Array, rows_2D: Array) -> Array:
    """Returns the log-odds of states: [devices, R, J, D] -> [devices * R, J]."""
    flat = log_odds(states.reshape(-1, states.shape[-1]), rows_2D)
    return flat.reshape(-1, states.shape[2])


def lists(x: Array) -> Array:
    """[devices, R, ...] -> [devices * R, ...]."""
    return jax.lax.collapse(x, 0, 2)


def _label_terms(odds_RJ: Array, labels_RJ: Array, valid_RJ: Array, weights: LossWeights) -> dict[str, Array]:
    return {name: LABEL_LOSSES[name](odds_RJ, labels_RJ, valid_RJ) for name in weights.of_labels}


def _distillation(odds_RJ: Array, teacher_RJ: Array, valid_RJ: Array, weights: LossWeights) -> dict[str, Array]:
    taught_RJ = valid_RJ & jnp.isfinite(teacher_RJ)
    temperature = weights.distillation_temperature
    terms = {}
    if weights.distillation:
        terms["distillation"] = losses.distillation_kl(odds_RJ, teacher_RJ, taught_RJ, temperature)
    if weights.list_distillation:
        terms["list_distillation"] = losses.list_kl(odds_RJ, teacher_RJ, taught_RJ, temperature)
    return terms


def train_ranker(settings: RankerTraining, out: Path) -> TrainResult:
    """Trains a ranker, or goes on with it; see `jaxslm.train.loop.run`."""
    join_hosts()
    mesh, dtype = make_mesh(), dtype_of(settings)
    start = load_start(settings, mesh)
    held_out = HeldOut(settings.evaluation, start.prompt.encode)
    data = ranker_data(settings.data, start.prompt)
    if settings.comparison_layer:
        start = _with_comparison_layer(start, settings, data, mesh)
    decoder = Decoder(start.config.model, dtype, settings.remat)
    teacher = None
    if settings.teacher is not None:
        path = Path(settings.teacher.checkpoint)
        teacher = load_teacher(path, start, dtype, mesh, hidden=settings.losses.compares_states)
    batches = ranker_batches(
        settings.data, start.prompt, host=jax.process_index(), hosts=jax.process_count(), data=data
    )
    rates = learning_rates(settings.optimiser, settings.steps)

    def evaluate(params: Params) -> dict[str, float]:
        checkpoint = Checkpoint(start.manifest, params, start.tokenizer_files)
        ranker = Ranker(checkpoint, dtype, buckets=few_buckets(jax.default_backend(), start.config))
        return held_out.evaluate(ranker.log_odds)

    task = Task(
        kind="ranker",
        start=start,
        loss_fn=ranker_loss(start.config, decoder, settings.losses, mesh, teacher),
        batches=batches,
        work=lambda batch: ranker_work(start.config.model, batch, settings.train_layers),
        evaluate=evaluate,
        evaluation_sha256=held_out.sha256,
        partition=partition_of(
            start.config, freeze_embeddings=settings.freeze_embeddings, train_layers=settings.train_layers
        ),
        optimiser=make_optimiser(settings.optimiser, rates),
        rates=rates,
        save=saver(start, "ranker"),
        dtype=dtype,
        mesh=mesh,
        teacher=teacher.params if teacher is not None else {},
    )
    return run(task, settings, out)


COMPARISON_ITEMS = 640
"""Items that the comparison layer is set from; it has no more than about width unknowns a fit."""


def _with_comparison_layer(start: Checkpoint, settings: RankerTraining, data: TrainingData, mesh: Mesh) -> Checkpoint:
    """The start with `add_comparison_layer`, from the first lists of the first host's order."""
    # It is set from the items alone, and their teacher is read with the batches that train.
    chosen = settings.data.model_copy(update={"workers": 0, "teacher_requests": None, "teacher_scores": None})
    batches = ranker_batches(chosen, start.prompt, data=data)
    in_a_batch = settings.data.lists_per_batch * settings.data.items_per_list
    sample = list(itertools.islice(batches, -(-COMPARISON_ITEMS // in_a_batch)))
    local = jax.tree.map(lambda leaf: leaf.addressable_data(0), start.params)
    with console().status("setting the comparison layer"):
        model, params = add_comparison_layer(start.config, local, start.prompt, sample)
    params = jax.device_put(params, NamedSharding(mesh, P()))
    ranker = start.config.model_copy(update={"model": model})
    return Checkpoint(start.manifest.model_copy(update={"ranker": ranker}), params, start.tokenizer_files)
