"""The bi-encoder that a contrastively trained decoder is: texts as mean states, relevance as their cosine."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxslm.config import ModelConfig
from jaxslm.data_files import Item
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.layout import Rows
from jaxslm.prompt import Prompt

# So many items are encoded together, or as many as make so many tokens: a query often brings only a dozen new items,
# and a CPU is fastest at about a thousand tokens. Lengths are rounded up to so many, those of queries to more, as each
# length is a program to compile.
_ROWS = 64
_TOKENS = 1024
_STEP = 16
_QUERY_STEP = 64


def mean_states(
    decoder: Decoder,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
    pooled_BT: Bool[Array, "B T"],
) -> Float[Array, "B D"]:
    """Returns the mean of each row's normed final states over its pooled tokens, float32; 0 for a row without any.

    Args:
        valid_BT: real tokens. pooled_BT: those of them that the mean is over.
    """
    states_BTD = jnp.asarray(decoder.apply({"params": params}, tokens_BT, Rows(valid_BT, last_only=False)))
    total_BD = jnp.einsum("BTD,BT->BD", states_BTD.astype(jnp.float32), pooled_BT.astype(jnp.float32))
    return total_BD / jnp.maximum(jnp.sum(pooled_BT, axis=1, keepdims=True), 1)


class BiEncoder:
    """Scores items by the cosine of mean states, as the contrastive stage sees texts. Items are encoded once.

    An item is read behind `Prompt.item_prefix_ids`.
    """

    def __init__(self, config: ModelConfig, prompt: Prompt, dtype: jnp.dtype, *, max_item_tokens: int) -> None:
        """Args: dtype: compute dtype. max_item_tokens: longer texts lose their end."""
        self._prompt, self._max_item_tokens = prompt, max_item_tokens
        self._longest = -(-(len(prompt.item_prefix_ids) + max_item_tokens + 1) // _STEP) * _STEP
        self._rows = max(1, min(_ROWS, _TOKENS // self._longest))
        decoder = Decoder(config, dtype)
        self._pool = jax.jit(lambda params, tokens, valid, pooled: mean_states(decoder, params, tokens, valid, pooled))
        self._items: dict[str, np.ndarray] = {}
        self._params: Params = {}

    def load(self, params: Params) -> None:
        """Scores with these parameters from now on."""
        self._params, self._items = params, {}

    def score(self, query: str, items: Sequence[Item]) -> Float32[np.ndarray, " J"]:
        """Returns the cosine of the query and each item, in [-1, 1].

        Raises:
            InputError: an empty query, or an item without text.
        """
        query_ids = self._prompt.encode_query(query)
        new = list({item.id: item for item in items if item.id not in self._items}.values())
        if new:
            suffix = len(self._prompt.suffix_ids)
            encoded = self._prompt.encode(self._prompt.config.instruction, new, self._max_item_tokens).item_ids
            prefix = self._prompt.item_prefix_ids
            rows = [prefix + ids[:-suffix] for ids in encoded]
            for start in range(0, len(new), self._rows):
                part = slice(start, start + self._rows)
                states = self._encode(rows[part], len(prefix), self._rows, self._longest)
                self._items |= {item.id: state for item, state in zip(new[part], states, strict=True)}
        longest = -(-len(query_ids) // _QUERY_STEP) * _QUERY_STEP
        query_D = self._encode([query_ids], self._prompt.query_from % len(query_ids), 1, longest)[0]
        return np.stack([self._items[item.id] for item in items]) @ query_D

    def _encode(self, ids: Sequence[Sequence[int]], skipped: int, rows: int, longest: int) -> np.ndarray:
        """Returns unit vectors [len(ids), D], computed as [rows, longest]; the mean leaves out the first tokens."""
        tokens, valid = np.zeros((rows, longest), np.int32), np.zeros((rows, longest), bool)
        for row, row_ids in enumerate(ids):
            tokens[row, : len(row_ids)], valid[row, : len(row_ids)] = row_ids, True
        pooled = valid.copy()
        pooled[:, :skipped] = False
        states = np.asarray(self._pool(self._params, tokens, valid, pooled))[: len(ids)]
        return states / np.linalg.norm(states, axis=1, keepdims=True)
