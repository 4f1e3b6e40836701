"""The bi-encoder that a contrastively trained decoder is: texts as mean states, relevance as their cosine."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxslm.config import RankerConfig
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.layout import Rows
from jaxslm.prompt import text_tokenizer

# So many items are encoded together, or as many as make so many tokens.
_ROWS = 64
_TOKENS = 8192


def mean_states(
    decoder: Decoder, params: Params, tokens_BT: Int[Array, "B T"], valid_BT: Bool[Array, "B T"]
) -> Float[Array, "B D"]:
    """Returns the mean of each row's normed final states over its real tokens, float32; 0 for a row without tokens."""
    states_BTD = jnp.asarray(decoder.apply({"params": params}, tokens_BT, Rows(valid_BT, last_only=False)))
    total_BD = jnp.einsum("BTD,BT->BD", states_BTD.astype(jnp.float32), valid_BT.astype(jnp.float32))
    return total_BD / jnp.maximum(jnp.sum(valid_BT, axis=1, keepdims=True), 1)


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
        """Args: dtype: compute dtype. max_query_tokens, max_item_tokens: longer texts lose their end."""
        self._tokenizer = text_tokenizer(tokenizer_json)
        self._max_query_tokens, self._max_item_tokens = max_query_tokens, max_item_tokens
        self._rows = max(1, min(_ROWS, _TOKENS // max_item_tokens))
        decoder = Decoder(config.model, dtype)
        self._pool = jax.jit(lambda params, tokens, valid: mean_states(decoder, params, tokens, valid))
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
        if not query.strip():
            raise InputError("query: must not be empty")
        new = list({item.id: item for item in items if item.id not in self._items}.values())
        texts = [f"{(item.title or '').strip()}\n{item.text.strip()}".strip() for item in new]
        if "" in texts:
            raise InputError(f"item {new[texts.index('')].id!r}: has no text")
        for start in range(0, len(new), self._rows):
            part = slice(start, start + self._rows)
            states = self._encode(texts[part], self._rows, self._max_item_tokens)
            self._items |= {item.id: state for item, state in zip(new[part], states, strict=True)}
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
