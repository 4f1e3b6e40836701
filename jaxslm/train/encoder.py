"""The contrastive warm start: query and item through the same decoder, mean-pooled, InfoNCE with in-batch negatives.

A ranker trained cold on lists of one query has little to learn from at first; from this start it has. Texts stand as
in the ranker's rows, each item behind another pair's query, so that the states mean the same there. The pooled states
also make a bi-encoder, which is what the stage is evaluated as.

The contrast alone makes tokens of query and item alike, and a ranker must tell them apart to compare them. So every
token also learns to say which it is, along one direction that the ranker will not need. Held-out order gains by it
(`docs/results/training.md`).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from jaxslm.config import RankerConfig
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.head import label_rows, log_odds
from jaxslm.model.layout import EveryToken
from jaxslm.score.bi_encoder import BiEncoder
from jaxslm.train.data import pair_batches
from jaxslm.train.heldout import HeldOut
from jaxslm.train.hosts import join_hosts
from jaxslm.train.loop import Task, TrainResult, dtype_of, run, saver
from jaxslm.train.losses import info_nce
from jaxslm.train.partition import Frozen, join_params, partition_of
from jaxslm.train.settings import EncoderTraining
from jaxslm.train.speed import pair_work
from jaxslm.train.start import load_start
from jaxslm.train.step import (
    DATA,
    Batch,
    LossFn,
    gather,
    learning_rates,
    make_mesh,
    make_optimiser,
    mean_of_items,
)

ROLE = 3.0
"""How far the state of a query's token lies along the roles' direction; that of an item's token lies as far behind."""


def encoder_loss(
    config: RankerConfig, decoder: Decoder, query_from: int, temperature: float, roles_weight: float, mesh: Mesh
) -> LossFn:
    """Returns InfoNCE over the pairs of a batch (van den Oord, 1807.03748); its negatives are the items of all devices.

    `positive` [devices, B, B] knows the pairs of its own device only; across devices nothing is taken as relevant. The
    roles' term, times its weight, is the mean over tokens of (x / ROLE - r)^2: x is the state along the direction in
    which the label rows differ, r = 1 for the query's tokens and -1 for the item's.

    Args:
        query_from: `Prompt.query_from`, of the prompt that the texts stand in.
    """
    part = P(DATA)

    def local(params: Params, tokens: Array, prefix: Array, items: Array, item_rows: Array) -> tuple[Array, ...]:
        M = tokens.shape[1]
        layout = EveryToken(prefix[0], items[0], M)
        states_MD = jnp.asarray(decoder.apply({"params": params}, tokens[0], layout)).astype(jnp.float32)
        lengths_R1 = jnp.sum(prefix[0] < M, axis=1, keepdims=True)
        own_RP = jnp.where(jnp.arange(prefix.shape[2]) >= query_from % lengths_R1, prefix[0], M)
        queries_BD = mean_of_items(states_MD, own_RP[:, None])[:, 0]
        items_BD = mean_of_items(states_MD, items[0])[item_rows[0], 0]
        roles_M = jnp.zeros(M).at[own_RP].set(1, mode="drop").at[items[0]].set(-1, mode="drop")
        rows_2D = jax.lax.stop_gradient(label_rows(params, config.label_token_ids))
        along_M = log_odds(states_MD, rows_2D) / jnp.linalg.norm(rows_2D[1] - rows_2D[0])
        error = jnp.sum(jnp.where(roles_M != 0, (along_M / ROLE - roles_M) ** 2, 0))
        return queries_BD[None], items_BD[None], error[None], jnp.sum(roles_M != 0)[None]

    pool = jax.shard_map(local, mesh=mesh, in_specs=(P(), *[part] * 4), out_specs=part)

    def loss_fn(trainable: Params, frozen: Frozen, batch: Batch) -> tuple[Array, dict[str, Array]]:
        params = gather(join_params(trainable, frozen["tables"], config), decoder.dtype, mesh)
        pooled = pool(params, *(batch[name] for name in ("tokens", "prefix", "items", "item_rows")))
        queries, items = (jax.lax.collapse(each, 0, 2) for each in pooled[:2])
        error, count = (jnp.sum(each) for each in pooled[2:])
        terms = {
            "info_nce": info_nce(queries, items, temperature, _block_diagonal(batch["positive"])),
            "roles": error / jnp.maximum(count, 1),
        }
        return terms["info_nce"] + roles_weight * terms["roles"], terms

    return loss_fn


def _block_diagonal(positive: Bool[Array, "N B B"]) -> Bool[Array, "NB NB"]:
    N, B, _ = positive.shape
    blocks = positive[:, :, None, :] & jnp.eye(N, dtype=bool)[:, None, :, None]
    return blocks.reshape(N * B, N * B)


def train_encoder(settings: EncoderTraining, out: Path) -> TrainResult:
    """Trains a decoder contrastively, or goes on with it; see `jaxslm.train.loop.run`.

    The result is an ordinary checkpoint: a start for `train ranker`, and for the compressor.
    """
    join_hosts()
    mesh, dtype = make_mesh(), dtype_of(settings)
    start = load_start(settings, mesh)
    decoder = Decoder(start.config.model, dtype, settings.remat)
    prompt, data = start.prompt, settings.data
    batches = pair_batches(data, prompt, host=jax.process_index(), hosts=jax.process_count())
    bi_encoder = BiEncoder(start.config.model, prompt, dtype, max_item_tokens=data.max_item_tokens)
    held_out = HeldOut(settings.evaluation, bi_encoder.check)
    rates = learning_rates(settings.optimiser, settings.steps)

    def evaluate(params: Params) -> dict[str, float]:
        bi_encoder.load(params)
        return held_out.evaluate(bi_encoder.score)

    task = Task(
        kind="encoder",
        start=start,
        loss_fn=encoder_loss(start.config, decoder, prompt.query_from, settings.temperature, settings.roles, mesh),
        batches=batches,
        work=lambda batch: pair_work(start.config.model, batch, settings.train_layers),
        evaluate=evaluate,
        evaluation_sha256=held_out.sha256,
        partition=partition_of(
            start.config, freeze_embeddings=settings.freeze_embeddings, train_layers=settings.train_layers
        ),
        optimiser=make_optimiser(settings.optimiser, rates),
        rates=rates,
        save=saver(start, "encoder"),
        dtype=dtype,
        mesh=mesh,
    )
    return run(task, settings, out)
