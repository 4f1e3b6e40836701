"""What scoring is compared with: whole rows with padding, passes without the exact savings, and the slow reference."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxslm.compress.splice import splice
from jaxslm.config import RankerConfig
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.head import label_logits, label_rows, vocab_logits
from jaxslm.model.layout import Rows, SharedPrefix
from jaxslm.score.compiled import Batch
from jaxslm.score.forward import PackRequest

Cuts = Literal["all", "head", "none"]
"""What a pass leaves out: "all" as serving does; "head" computes the whole last layer; "none" also every token's
logits over the vocabulary, as a language model's plain forward pass does."""

REFERENCE_ITEMS = 8


class PaddedRunner:
    """The plain way: whole rows, padded to a power of two, in batches; no packing and no sharing.

    Attributes:
        compile_s: what compiling, and running once, took.
    """

    def __init__(
        self,
        config: RankerConfig,
        params: Params,
        requests: Sequence[PackRequest],
        max_tokens: int,
        *,
        cuts: Cuts = "all",
        implementation: str | None = None,
    ) -> None:
        rows = [[*request.prefix_ids, *item] for request in requests for item in request.item_ids]
        T = 1 << (max(map(len, rows)) - 1).bit_length()
        B = max(1, max_tokens // T)
        self._places = B * T
        padded = -(-len(rows) // B) * B
        arrays = {"tokens": np.zeros((padded, T), np.int32), "valid": np.zeros((padded, T), bool)}
        for number, row in enumerate(rows):
            arrays["tokens"][number, : len(row)], arrays["valid"][number, : len(row)] = row, True
        if requests[0].vectors is not None:
            arrays |= _vectors_of_rows(requests, padded)
        self._num_rows, self._real = len(rows), sum(map(len, rows))
        self._batches = [
            {name: array[start : start + B] for name, array in arrays.items()} for start in range(0, padded, B)
        ]
        self._params = params
        self._score_fn = padded_score_fn(config, jax.tree.leaves(params)[0].dtype, cuts, implementation)
        start = time.perf_counter()
        np.asarray(self._score_fn(params, self._batches[0]))
        self.compile_s = time.perf_counter() - start

    def __call__(self) -> np.ndarray:
        """Returns logits [all items, 2]."""
        parts = [self._score_fn(self._params, batch) for batch in self._batches]
        return np.concatenate([np.asarray(part) for part in parts])[: self._num_rows]

    def shape(self) -> tuple[int, int, int]:
        """Returns the number of forward passes, their token places and the real tokens in them."""
        return len(self._batches), len(self._batches) * self._places, self._real


def _vectors_of_rows(requests: Sequence[PackRequest], padded: int) -> dict[str, np.ndarray]:
    """Returns the vectors of each row, [B, C, D], and where in it they begin, [B]; zeros behind the rows."""
    found = np.concatenate([request.vectors for request in requests if request.vectors is not None])
    first = np.repeat(
        [len(request.prefix_ids) for request in requests], [len(request.item_ids) for request in requests]
    )
    missing = padded - len(found)
    return {"vectors": np.pad(found, ((0, missing), (0, 0), (0, 0))), "first": np.pad(first, (0, missing))}


def padded_score_fn(config: RankerConfig, dtype: jnp.dtype, cuts: Cuts, implementation: str | None) -> Any:
    """Returns a score function of whole rows: `{"tokens": [B, T], "valid": [B, T]}` -> logits [B, 2].

    With `"vectors": [B, C, D]` these replace the tokens of each row from `"first": [B]` on.
    """
    decoder = Decoder(config.model, dtype, implementation=implementation)

    def score(params: Params, batch: Batch) -> Array:
        valid_BT = jnp.asarray(batch["valid"])
        B, T = valid_BT.shape
        x: Array = decoder.apply({"params": params}, jnp.asarray(batch["tokens"]), method=Decoder.embed)  # type: ignore[assignment]
        if "vectors" in batch:
            begins_B = jnp.arange(B) * T + batch["first"]
            places_B1C = begins_B[:, None, None] + jnp.arange(batch["vectors"].shape[1])
            x = splice(x.reshape(B * T, -1), jnp.asarray(batch["vectors"])[:, None], places_B1C).reshape(x.shape)
        whole = UncutRows(valid_BT)
        layout, last = (Rows(valid_BT), lambda picked: picked) if cuts == "all" else (whole, whole.last)
        hidden: Array = decoder.apply({"params": params}, x, layout, method=Decoder.decode)  # type: ignore[assignment]
        return answers(hidden, last, config, params, cuts)[0]

    return jax.jit(score)


def uncut_score_fn(config: RankerConfig, dtype: jnp.dtype, cuts: Cuts, implementation: str | None = None) -> Any:
    """Returns a score function, `with_states`, that computes the last layer of every token, and with "none" its
    vocabulary logits.
    """
    decoder = Decoder(config.model, dtype, implementation=implementation)

    def score(params: Params, batch: Batch) -> tuple[Array, Array]:
        items = jnp.asarray(batch["items"])
        layout = Uncut(jnp.asarray(batch["prefix"]), items, batch["tokens"].shape[0], implementation)
        x: Array = decoder.apply({"params": params}, jnp.asarray(batch["tokens"]), method=Decoder.embed)  # type: ignore[assignment]
        if "vectors" in batch:
            x = splice(x, jnp.asarray(batch["vectors"]), items)
        hidden: Array = decoder.apply({"params": params}, x, layout, method=Decoder.decode)  # type: ignore[assignment]
        return answers(hidden, layout.last, config, params, cuts)

    return jax.jit(score)


class Uncut(SharedPrefix):
    """A shared prefix whose last layer is computed for every token."""

    last = SharedPrefix.read

    def read(self, x: Array) -> Array:
        """Every token."""
        return x

    def attend_read(self, q: Array, k: Array, v: Array) -> Array:
        """As in all layers."""
        return self.attend(q, k, v)


class UncutRows(Rows):
    """Padded rows whose last layer is computed for every token."""

    last = Rows.read

    def read(self, x: Array) -> Array:
        """Every token."""
        return x

    def attend_read(self, q: Array, k: Array, v: Array) -> Array:
        """As in all layers."""
        return self.attend(q, k, v)


def answers(
    hidden: Array, last: Callable[[Array], Array], config: RankerConfig, params: Params, cuts: Cuts
) -> tuple[Array, Array]:
    """Returns the logits of (no, yes) of the states that `last` picks, and these states.

    With "none" the logits are computed of all tokens, over the vocabulary, and picked then.
    """
    picked = last(hidden)
    if cuts == "none":
        return last(vocab_logits(hidden, params))[..., jnp.asarray(config.label_token_ids)], picked
    logits = label_logits(picked.reshape(-1, picked.shape[-1]), label_rows(params, config.label_token_ids))
    return logits.reshape(*picked.shape[:-1], 2), picked


def reference_logits(config: RankerConfig, params: Params, request: PackRequest) -> np.ndarray:
    """Returns the float32 logits of a request's first items as padded rows of their own: the correct, slow way."""
    float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    rows = np.array([[*request.prefix_ids, *item] for item in request.item_ids[:REFERENCE_ITEMS]], np.int32)
    P, decoder = len(request.prefix_ids), Decoder(config.model)

    @jax.jit
    def score(params: Params) -> Array:
        x_BTD: Array = decoder.apply({"params": params}, jnp.asarray(rows), method=Decoder.embed)  # type: ignore[assignment]
        if request.vectors is not None:
            vectors = np.stack(list(request.vectors[:REFERENCE_ITEMS]))
            x_BTD = x_BTD.at[:, P : P + vectors.shape[1]].set(vectors)
        layout = Rows(jnp.ones(rows.shape, bool))
        hidden_BD: Array = decoder.apply({"params": params}, x_BTD, layout, method=Decoder.decode)  # type: ignore[assignment]
        return label_logits(hidden_BD, label_rows(params, config.label_token_ids))

    with jax.default_matmul_precision("highest"):  # a GPU would round float32 to TensorFloat-32
        return np.asarray(score(float32))
