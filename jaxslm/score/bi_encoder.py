"""The bi-encoder that a contrastively trained decoder is: texts as mean states, relevance as their cosine."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jaxslm.compress.encoder import pad_items, pooled_states
from jaxslm.config import ModelConfig
from jaxslm.data_files import Item, with_item_id
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder, Params
from jaxslm.prompt import Prompt

# So many items are encoded together, or as many as make so many tokens: a query often brings only a dozen new items,
# and a CPU is fastest at about a thousand tokens. Lengths are rounded up to so many, those of queries to more, as each
# length is a program to compile.
_ROWS = 64
_TOKENS = 1024
_STEP = 16
_QUERY_STEP = 64


class BiEncoder:
    """Scores items by the cosine of mean states, as the contrastive stage sees texts. Items are encoded once.

    An item is read behind `Prompt.item_prefix_ids`.
    """

    def __init__(self, config: ModelConfig, prompt: Prompt, dtype: jnp.dtype, *, max_item_tokens: int) -> None:
        """Args: dtype: compute dtype. max_item_tokens: longer texts lose their end."""
        self._prompt, self._max_item_tokens = prompt, max_item_tokens
        prefix, after_item = prompt.item_prefix_ids, prompt.words_around[1] - len(prompt.suffix_ids)
        self._longest = -(-(max_item_tokens + after_item) // _STEP) * _STEP
        self._rows = max(1, min(_ROWS, (_TOKENS - len(prefix)) // self._longest))
        decoder = Decoder(config, dtype)
        self._of_items = jax.jit(partial(pooled_states, decoder, prefix))
        self._of_query = jax.jit(partial(pooled_states, decoder, ()))
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
            ids = self._item_ids(new)
            for start in range(0, len(new), self._rows):
                part = slice(start, start + self._rows)
                states = self._mean_states(self._of_items, ids[part], 0, self._rows, self._longest)
                self._items |= {item.id: state for item, state in zip(new[part], states, strict=True)}
        longest = -(-len(query_ids) // _QUERY_STEP) * _QUERY_STEP
        first = self._prompt.query_from % len(query_ids)
        query_D = self._mean_states(self._of_query, [query_ids], first, 1, longest)[0]
        return np.stack([self._items[item.id] for item in items]) @ query_D

    def check(self, query: str, items: Sequence[Item]) -> None:
        """Raises InputError as `score`, without computing anything."""
        self._prompt.encode_query(query)
        self._item_ids(items)

    def _item_ids(self, items: Sequence[Item]) -> list[list[int]]:
        suffix = len(self._prompt.suffix_ids)
        try:
            encoded = self._prompt.encode(self._prompt.config.instruction, items, self._max_item_tokens).item_ids
        except InputError as error:  # not every item of a request is encoded, so its number would mislead
            raise InputError(with_item_id(error, items)) from None
        return [each[:-suffix] for each in encoded]

    def _mean_states(
        self, states_of: Callable[..., Array], ids: Sequence[Sequence[int]], first: int, rows: int, longest: int
    ) -> np.ndarray:
        """Returns unit vectors [len(ids), D], computed as [rows, longest]; the mean leaves out the first tokens."""
        places = np.array([[[first, len(each)]] for each in ids] + [[[0, 1]]] * (rows - len(ids)), np.int32)
        states = np.asarray(states_of(self._params, *pad_items(ids, rows, longest), places))[: len(ids), 0]
        return states / np.linalg.norm(states, axis=1, keepdims=True)
