"""The contrastive warm start: query and item through the same decoder, mean-pooled, InfoNCE with in-batch negatives.

A ranker trained cold on lists of one query has little to learn from at first; from this start it has. The same pooled
states make a bi-encoder, which is what the stage is evaluated as.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from jaxslm.config import RankerConfig
from jaxslm.data_files import Item
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.layout import Rows
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

ROWS = 64
"""Items that are encoded together for evaluation."""


def mean_states(
    decoder: Decoder, params: Params, tokens_BT: Int[Array, "B T"], valid_BT: Bool[Array, "B T"]
) -> Float[Array, "B D"]:
    """Returns the mean of each row's normed final states over its real tokens, float32; 0 for a row without tokens."""
    states_BTD = jnp.asarray(decoder.apply({"params": params}, tokens_BT, Rows(valid_BT, last_only=False)))
    total_BD = jnp.einsum("BTD,BT->BD", states_BTD.astype(jnp.float32), valid_BT.astype(jnp.float32))
    return total_BD / jnp.maximum(jnp.sum(valid_BT, axis=1, keepdims=True), 1)


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


class BiEncoder:
    """Scores items by the cosine of mean states, as the contrastive stage sees texts. Items are encoded once."""

    def __init__(
        self,
        config: RankerConfig,
        tokenizer_json: str,
        dtype: jnp.dtype,
        *,
        max_query_tokens: int,
        max_item_tokens: int,
    ) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.encode_special_tokens = True
        self._max_query_tokens, self._max_item_tokens = max_query_tokens, max_item_tokens
        decoder = Decoder(config.model, dtype)
        self._pool = jax.jit(lambda params, tokens, valid: mean_states(decoder, params, tokens, valid))
        self._items: dict[str, np.ndarray] = {}
        self._params: Params = {}

    def load(self, params: Params) -> None:
        """Scores with these parameters from now on."""
        self._params, self._items = params, {}

    def score(self, query: str, items: Sequence[Item]) -> np.ndarray:
        """Returns the cosine of the query and each item, float32 in [-1, 1]."""
        new = [item for item in items if item.id not in self._items]
        if new:
            texts = [f"{(item.title or '').strip()}\n{item.text.strip()}".strip() for item in new]
            states = np.concatenate(
                [
                    self._encode(texts[start : start + ROWS], ROWS, self._max_item_tokens)
                    for start in range(0, len(texts), ROWS)
                ]
            )
            self._items |= {item.id: state for item, state in zip(new, states, strict=True)}
        query_D = self._encode([query.strip()], 1, self._max_query_tokens)[0]
        return np.stack([self._items[item.id] for item in items]) @ query_D

    def _encode(self, texts: Sequence[str], rows: int, max_tokens: int) -> np.ndarray:
        """Returns unit vectors [len(texts), D], computed in the one shape [rows, max_tokens]."""
        encodings = self._tokenizer.encode_batch_fast([" " + text for text in texts], add_special_tokens=False)
        tokens, valid = np.zeros((rows, max_tokens), np.int32), np.zeros((rows, max_tokens), bool)
        for row, encoding in enumerate(encodings):
            ids = encoding.ids[:max_tokens]
            tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
        states = np.asarray(self._pool(self._params, tokens, valid))[: len(texts)]
        return states / np.linalg.norm(states, axis=1, keepdims=True)


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
        partition=partition_of(start.config, freeze_embeddings=settings.freeze_embeddings),
        optimiser=make_optimiser(settings.optimiser, settings.steps),
        save=saver(start, "encoder"),
        dtype=dtype,
        mesh=mesh,
    )
    return run(task, settings, out)
