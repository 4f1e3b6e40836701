"""Which parameters train: all, or all but the embedding tables and perhaps lower layers, the label rows kept apart."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxslm.config import RankerConfig
from jaxslm.model.decoder import Params
from jaxslm.model.head import label_rows, vocab_rows

TABLES = ("embedding", "head")
LABEL_ROWS = "label_rows"

Frozen = dict[str, Params]
"""`{"tables": frozen tables and layers, "teacher": a teacher's parameters}`, either may be empty."""


def split_params(
    params: Params, config: RankerConfig, *, freeze_embeddings: bool, train_layers: int | None = None
) -> tuple[Params, Params]:
    """Returns (trainable, frozen tables and layers). `join_params` of them is `params`.

    With frozen embeddings the two rows of the vocabulary head that are the labels stay trainable, as `label_rows`
    [2, D]: a ranker is scored by these rows alone. When the tables are tied they are input rows of the labels too.
    """
    if not freeze_embeddings:
        return dict(params), {}
    count = config.model.num_layers
    lower = [f"layers_{index}" for index in range(count - (count if train_layers is None else train_layers))]
    frozen = {name: params[name] for name in (*TABLES, *lower) if name in params}
    trainable = {name: leaf for name, leaf in params.items() if name not in frozen}
    trainable[LABEL_ROWS] = vocab_rows(params)[jnp.asarray(config.label_token_ids)]
    return trainable, frozen


@dataclass(frozen=True)
class Partition:
    """How whole parameters are taken apart for training.

    Attributes:
        split: whole parameters -> (trainable, frozen). join: the inverse.
    """

    split: Callable[[Params], tuple[Params, Params]]
    join: Callable[[Params, Params], Params]


def partition_of(config: RankerConfig, *, freeze_embeddings: bool, train_layers: int | None = None) -> Partition:
    """Returns the partition of a decoder: `split_params` and `join_params`."""
    return Partition(
        split=partial(split_params, config=config, freeze_embeddings=freeze_embeddings, train_layers=train_layers),
        join=partial(join_params, config=config),
    )


def join_params(trainable: Params, tables: Params, config: RankerConfig) -> Params:
    """Returns the whole tree: what is frozen, with the trained label rows in their places.

    These carry no gradient: where the tables are tied, the few label words among the inputs would draw one through
    every layer, for nothing that training needs. `head_rows` have it.
    """
    if not tables:
        return trainable
    joined = {name: leaf for name, leaf in trainable.items() if name != LABEL_ROWS} | tables
    table = "embedding" if config.model.tie_embeddings else "head"
    joined[table] = (
        joined[table].at[jnp.asarray(config.label_token_ids)].set(jax.lax.stop_gradient(trainable[LABEL_ROWS]))
    )
    return joined


def head_rows(trainable: Params, params: Params, config: RankerConfig) -> Float[Array, "2 D"]:
    """Returns the head rows of (no, yes) of joined parameters in float32, with their gradient."""
    return trainable[LABEL_ROWS] if LABEL_ROWS in trainable else label_rows(params, config.label_token_ids)
