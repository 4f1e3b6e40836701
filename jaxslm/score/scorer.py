"""Scoring: a ranker loaded from a checkpoint, and the pure compiled function that services import."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxslm.checkpoint import Checkpoint, load_checkpoint
from jaxslm.config import RankerConfig
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.head import label_logits, label_rows
from jaxslm.model.layout import Rows
from jaxslm.prompt import EncodedRequest
from jaxslm.score.packing import pack_rows

ScoreFn = Callable[[Params, dict[str, Array]], Array]


def compute_dtype() -> jnp.dtype:
    """The number type of this machine's accelerator: bfloat16 on GPU and TPU, float32 on CPU."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


@cache
def make_score_fn(config: RankerConfig, dtype: jnp.dtype | None = None) -> ScoreFn:
    """Returns the jitted, pure `score_fn(params, batch) -> logits`.

    The batch is `{"tokens": int [B, T], "valid": bool [B, T]}`, rows of a whole prompt each; the logits are float32
    [B, 2] of (no, yes) after each row's last real token. A row's logits do not depend on the other rows, on its slot or
    on where its padding stands. It compiles once per shape.

    Args:
        dtype: compute dtype; `compute_dtype()` if None.
    """
    decoder = Decoder(config.model, dtype or compute_dtype())

    def score_fn(params: Params, batch: dict[str, Array]) -> Array:
        hidden_BD = decoder.apply({"params": params}, batch["tokens"], Rows(batch["valid"]))
        return label_logits(hidden_BD, label_rows(params, config.label_token_ids))

    return jax.jit(score_fn)


@dataclass(frozen=True)
class Scores:
    """Scores of one request, in the order of its items: `logits` float32 [J, 2] of (no, yes), `truncated` per item."""

    logits: np.ndarray
    truncated: list[bool]

    @property
    def log_odds(self) -> np.ndarray:
        """z_yes - z_no, float32 [J]."""
        return self.logits[:, 1] - self.logits[:, 0]

    @property
    def probabilities(self) -> np.ndarray:
        """P(yes) = sigmoid(log-odds), float32 [J] in [0, 1]."""
        return (0.5 * (1.0 + np.tanh(0.5 * self.log_odds))).astype(np.float32)


class Ranker:
    """A checkpoint ready to score on this machine. Parameters are cast once to the compute dtype."""

    def __init__(self, checkpoint: Checkpoint, dtype: jnp.dtype | None = None) -> None:
        self.manifest = checkpoint.manifest
        self.config = checkpoint.config
        self.prompt = checkpoint.prompt()
        self.dtype = jnp.dtype(dtype or compute_dtype())
        self.params: Params = jax.tree.map(lambda leaf: leaf.astype(self.dtype), checkpoint.params)
        self._score_fn = make_score_fn(self.config, self.dtype)

    @property
    def label_token_ids(self) -> tuple[int, int]:
        """Token ids of (no, yes)."""
        return self.config.label_token_ids

    def score(self, query: str, items: Sequence[str | Item]) -> np.ndarray:
        """Returns P(yes) for each item, float32 in [0, 1], in the order given.

        An item's score does not depend on the other items. Texts beyond the prompt's `max_tokens` are cut;
        `score_request` says which.

        Raises:
            InputError: an empty query, no items, an item without text, or a query that leaves no room for items.
        """
        return self.score_request(query, items).probabilities

    def score_request(self, query: str, items: Sequence[str | Item]) -> Scores:
        """Returns logits and truncation flags of one request; raises as `score`."""
        return self.score_encoded(self.prompt.encode(query, items))

    def score_encoded(self, request: EncodedRequest) -> Scores:
        """Returns the scores of a request that `Prompt.encode` built."""
        rows = [request.prefix_ids + item_ids for item_ids in request.item_ids]
        return Scores(self.label_logits(rows), request.truncated)

    def label_logits(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the last token's logits of (no, yes) for rows of token ids, float32 [rows, 2]; adds no template.

        Raises:
            InputError: no rows, an empty or too long row, or an id outside the vocabulary.
        """
        if not rows:
            raise InputError("rows: at least one is needed")
        for number, row in enumerate(rows):
            if any(not 0 <= token < self.config.model.vocab_size for token in row):
                raise InputError(f"row {number}: a token id is outside 0..{self.config.model.vocab_size - 1}")
        logits = np.empty((len(rows), 2), np.float32)
        # Dispatch is asynchronous: every batch is queued before the first result is waited for.
        queued = [
            (batch.rows, self._score_fn(self.params, {"tokens": batch.tokens, "valid": batch.valid}))
            for batch in pack_rows(rows)
        ]
        for indices, result in queued:
            logits[indices] = np.asarray(result)[: len(indices)]
        return logits


def load(path: str | Path, dtype: jnp.dtype | None = None) -> Ranker:
    """Returns the ranker of a checkpoint folder.

    Args:
        dtype: compute dtype; float32 on CPU and bfloat16 elsewhere if None.

    Raises:
        InputError: no checkpoint there, another format version, or a damaged one.
    """
    return Ranker(load_checkpoint(Path(path)), dtype)
