"""The contrastive warm start: query and item through the same decoder, mean-pooled, InfoNCE with in-batch negatives.

A ranker trained cold on lists of one query has little to learn from at first; from this start it has. The same pooled
states make a bi-encoder, which is what the stage is evaluated as.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from jaxslm.config import RankerConfig
from jaxslm.model.decoder import Decoder, Params
from jaxslm.score.bi_encoder import BiEncoder, mean_states
from jaxslm.train.data import pair_batches
from jaxslm.train.heldout import HeldOut
from jaxslm.train.hosts import join_hosts
from jaxslm.train.loop import Task, TrainResult, dtype_of, run, saver
from jaxslm.train.losses import info_nce
from jaxslm.train.partition import Frozen, join_params, partition_of
from jaxslm.train.settings import EncoderTraining
from jaxslm.train.speed import pair_work
from jaxslm.train.start import load_start
from jaxslm.train.step import DATA, Batch, LossFn, gather, make_mesh, make_optimiser


def encoder_loss(config: RankerConfig, decoder: Decoder, temperature: float, mesh: Mesh) -> LossFn:
    """Returns InfoNCE over the pairs of a batch (van den Oord, 1807.03748); its negatives are the items of all devices.

    `positive` [devices, B, B] knows the pairs of its own device only; across devices nothing is taken as relevant.
    """
    part = P(DATA)

    def local(params: Params, tokens: Array, valid: Array) -> Array:
        return mean_states(decoder, params, tokens[0], valid[0])[None]

    pool = jax.shard_map(local, mesh=mesh, in_specs=(P(), part, part), out_specs=part)

    def loss_fn(trainable: Params, frozen: Frozen, batch: Batch) -> tuple[Array, dict[str, Array]]:
        params = gather(join_params(trainable, frozen["tables"], config), decoder.dtype, mesh)
        queries = pool(params, batch["query_tokens"], batch["query_valid"])
        items = pool(params, batch["item_tokens"], batch["item_valid"])
        positive = _block_diagonal(batch["positive"])
        loss = info_nce(jax.lax.collapse(queries, 0, 2), jax.lax.collapse(items, 0, 2), temperature, positive)
        return loss, {}

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
    tokenizer_json = start.tokenizer_files["tokenizer.json"].decode()
    data = settings.data
    batches = pair_batches(data, tokenizer_json, host=jax.process_index(), hosts=jax.process_count())
    bi_encoder = BiEncoder(
        start.config,
        tokenizer_json,
        dtype,
        max_query_tokens=data.max_query_tokens,
        max_item_tokens=data.max_item_tokens,
    )
    held_out = HeldOut(settings.evaluation)

    def evaluate(params: Params) -> dict[str, float]:
        bi_encoder.load(params)
        return held_out.evaluate(bi_encoder.score)

    task = Task(
        kind="encoder",
        start=start,
        loss_fn=encoder_loss(start.config, decoder, settings.temperature, mesh),
        batches=batches,
        work=lambda batch: pair_work(start.config.model, batch),
        evaluate=evaluate,
        partition=partition_of(
            start.config, freeze_embeddings=settings.freeze_embeddings, train_layers=settings.train_layers
        ),
        optimiser=make_optimiser(settings.optimiser, settings.steps),
        save=saver(start, "encoder"),
        dtype=dtype,
        mesh=mesh,
    )
    return run(task, settings, out)
