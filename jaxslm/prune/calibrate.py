"""Calibration: the ranker's own prompts, packed as for scoring, and what each layer makes of their real tokens.

Nothing of size tokens x F is kept: a layer's Gram matrices are summed on the device, batch by batch, so memory is
O(F^2) for the layer at hand and tokens x D for the states between layers.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxslm.config import BucketConfig, ModelConfig, RankerConfig
from jaxslm.data_files import Item, Query, Request, read_items, read_records, with_item_id
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.head import label_rows, log_odds
from jaxslm.model.layers import Layer
from jaxslm.model.layout import SharedPrefix
from jaxslm.prompt import EncodedRequest, Prompt
from jaxslm.prune.masks import Masks
from jaxslm.score.buckets import make_bucket
from jaxslm.score.forward import Forward, PackRequest
from jaxslm.score.packing import Packer
from pallas_kernels.dispatch import XLA

ITEMS_PER_REQUEST = 8
"""Items of a request that calibrate; a longer list gives every n-th, judged ones in the order of their labels. More
queries say more than more items of each: on held-out prompts of as many tokens, the re-fit errs less."""

TOKENS_PER_BATCH = 2048

Batch = dict[str, Array]
Texts = list[tuple[str, list[str | Item]]]
"""(query, items) of each request."""


@dataclass(frozen=True)
class Calibration:
    """Prompts packed into batches of one shape.

    Attributes:
        forwards: the batches on the host.
        tokens: real tokens; a prefix that several items share counts once per batch. items: scored rows.
        text_tokens: those of queries and items alone, without the prompt's words.
        labels: per request the label of each item, None where the file had no labels.
        sizes: items of each request, in order. sha256: hash of all token ids.
    """

    forwards: tuple[Forward, ...]
    sizes: tuple[int, ...]
    labels: tuple[tuple[float, ...], ...] | None
    tokens: int
    text_tokens: int
    sha256: str

    def first(self, max_tokens: int) -> "Calibration":
        """Returns the first batches, as many as have `max_tokens` tokens in all, for statistics; one at least."""
        ends = np.cumsum([forward.real_tokens for forward in self.forwards])
        count = max(1, int(np.searchsorted(ends, max_tokens, side="right")))
        return replace(self, forwards=self.forwards[:count], tokens=int(ends[count - 1]))

    def batches(self) -> Iterator[Batch]:
        """Yields {"tokens" [M], "prefix" [R, P], "items" [R, J, T], "real" bool [M]} of each batch, on the device."""
        for forward in self.forwards:
            real = np.arange(forward.bucket.tokens) < forward.real_tokens
            yield {name: jnp.asarray(array) for name, array in (forward.batch | {"real": real}).items()}


def read_calibration(path: Path, items: Path | None, prompt: Prompt, *, max_tokens: int, seed: int = 0) -> Calibration:
    """Returns prompts of a file in a seeded order, until they have `max_tokens` tokens.

    Args:
        path: requests as `jaxslm score` reads them, with texts; with `items`, queries as `jaxslm train` reads them.
        items: the items that the queries judge.

    Raises:
        InputError: a file breaks its schema, an item has no text or is unknown, or a prompt cannot be built.
    """
    requests, labels = _requests(path) if items is None else _judged(path, read_items(items))
    encoded: list[EncodedRequest] = []
    chosen, tokens = [], 0
    for index in np.random.default_rng(seed).permutation(len(requests)):
        query, texts = requests[index]
        try:
            request = prompt.encode(query, texts)
        except InputError as error:
            raise InputError(f"{path}: request {index + 1}: {with_item_id(error, texts)}") from None
        encoded.append(request)
        chosen.append(index)
        tokens += len(request.prefix_ids) + sum(map(len, request.item_ids))
        if tokens >= max_tokens:
            break
    chosen_labels = tuple(labels[index] for index in chosen) if labels is not None else None
    return pack_calibration(encoded, chosen_labels, prompt.words_around)


def request_texts(path: Path, items: Path | None) -> Iterator[str]:
    """Yields every query, title and text of a calibration file; arguments and errors as `read_calibration`."""
    requests, _ = _requests(path) if items is None else _judged(path, read_items(items))
    for query, texts in requests:
        yield query
        for text in texts:
            yield from (text,) if isinstance(text, str) else (text.title or "", text.text)


def pack_calibration(
    requests: Sequence[EncodedRequest],
    labels: tuple[tuple[float, ...], ...] | None = None,
    words_around: tuple[int, int] = (0, 0),
) -> Calibration:
    """Returns encoded requests as a calibration set. Args: words_around: `Prompt.words_around` of their prompt."""
    packed = [PackRequest(request.prefix_ids, request.item_ids) for request in requests]
    lengths = [len(item) for request in packed for item in request.item_ids]
    prefix = max(len(request.prefix_ids) for request in packed)
    tokens = max(TOKENS_PER_BATCH, prefix + max(lengths))
    bucket = make_bucket(tokens, max(prefix, 1), max(lengths), int(np.median(lengths)))
    forwards = tuple(forward for group in Packer(BucketConfig(buckets=(bucket,))).pack(packed) for forward in group)
    around_query, around_item = words_around
    text_tokens = (
        sum(len(each.prefix_ids) - around_query for each in packed) + sum(lengths) - around_item * len(lengths)
    )
    digest = hashlib.sha256()
    for request in packed:
        for ids in (request.prefix_ids, *request.item_ids):
            digest.update(np.array([len(ids), *ids], np.int64).tobytes())
    return Calibration(
        forwards,
        tuple(len(request.item_ids) for request in packed),
        labels,
        sum(forward.real_tokens for forward in forwards),
        text_tokens,
        digest.hexdigest(),
    )


def _requests(path: Path) -> tuple[Texts, None]:
    requests: Texts = []
    for number, request in enumerate(read_records(path, Request), start=1):
        chosen = _spread(request.items)
        if any(item.text is None or not item.text.strip() for item in chosen):
            raise InputError(f"{path}: request {number}: every item needs a text")
        requests.append((request.query, [item.text for item in chosen if item.text is not None]))
    return requests, None


def _judged(path: Path, items: dict[str, Item]) -> tuple[Texts, list[tuple[float, ...]]]:
    requests: Texts = []
    labels = []
    for query in read_records(path, Query):
        judged = _spread(sorted(query.items, key=lambda each: -each.label))
        for each in judged:
            if each.id not in items:
                raise InputError(f"{path}: query {query.query_id!r}: item {each.id!r} is not among the items")
        requests.append((query.query, [items[each.id] for each in judged]))
        labels.append(tuple(each.label for each in judged))
    return requests, labels


def _spread(items: Sequence[Any]) -> list[Any]:
    if len(items) <= ITEMS_PER_REQUEST:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, ITEMS_PER_REQUEST).round().astype(int)]


@dataclass(frozen=True)
class LayerFunctions:
    """Jitted functions of one layer; `params` are the layer's, compute is float32.

    Attributes:
        forward: (params, states [M, D], batch) -> states after the layer, of every token.
        influence: likewise -> sum over real tokens of 1 - cosine of the states before and after.
        add_heads, add_neurons: (statistics, params, states, batch) -> statistics with this batch's real inputs of the
            projections o and down: {"gram": [A, A], "sum": [A]}.
    """

    forward: Callable[[Params, Array, Batch], Array]
    influence: Callable[[Params, Array, Batch], Array]
    add_heads: Callable[[Any, Params, Array, Batch], Any]
    add_neurons: Callable[[Any, Params, Array, Batch], Any]


def layer_functions(config: ModelConfig, layer: int) -> LayerFunctions:
    """Returns the functions of a layer; layers of one shape share what is compiled."""
    alone = {
        "num_layers": 1,
        "num_kv_heads": config.kv_heads_by_layer[layer],
        "mlp_width": config.mlp_width_by_layer[layer],
    }
    return _layer_functions(config.model_copy(update=alone))


@cache
def _layer_functions(config: ModelConfig) -> LayerFunctions:
    layer = Layer(config, 0, jnp.dtype(jnp.float32), XLA)

    def apply(params: Params, x: Array, batch: Batch) -> tuple[Array, Any]:
        layout = SharedPrefix(batch["prefix"], batch["items"], x.shape[0])
        out, seen = layer.apply({"params": params}, x, layout.positions, layout.attend, mutable=["intermediates"])
        return out, seen["intermediates"]

    def influence(params: Params, x: Array, batch: Batch) -> Array:
        y = apply(params, x, batch)[0]
        cosine = jnp.sum(x * y, axis=-1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1))
        return jnp.sum(jnp.where(batch["real"], 1 - cosine, 0))

    def add(statistics: Any, inputs_MA: Array, batch: Batch) -> Any:
        inputs_MA = jnp.where(batch["real"][:, None], inputs_MA, 0)
        gram = jnp.matmul(inputs_MA.T, inputs_MA, precision="highest")
        return {"gram": statistics["gram"] + gram, "sum": statistics["sum"] + jnp.sum(inputs_MA, axis=0)}

    def add_heads(statistics: Any, params: Params, x: Array, batch: Batch) -> Any:
        heads = apply(params, x, batch)[1]["attention"]["heads"][0]
        return add(statistics, heads.reshape(x.shape[0], -1), batch)

    def add_neurons(statistics: Any, params: Params, x: Array, batch: Batch) -> Any:
        return add(statistics, apply(params, x, batch)[1]["mlp"]["neurons"][0], batch)

    return LayerFunctions(
        jax.jit(lambda params, x, batch: apply(params, x, batch)[0]),
        jax.jit(influence),
        jax.jit(add_heads, donate_argnums=0),
        jax.jit(add_neurons, donate_argnums=0),
    )


def gather_statistics(
    add: Callable[[Any, Params, Array, Batch], Any],
    inputs: int,
    params: Params,
    states: Sequence[Array],
    calibration: Calibration,
) -> tuple[Float[np.ndarray, "A A"], Float[np.ndarray, " A"]]:
    """Returns the Gram matrix and the sum of `inputs` projection inputs over all real tokens, float64.

    Args:
        add: `add_heads` or `add_neurons` of the layer. states: its input of each batch.
    """
    statistics = {"gram": jnp.zeros((inputs, inputs), jnp.float32), "sum": jnp.zeros(inputs, jnp.float32)}
    for x, batch in zip(states, calibration.batches(), strict=True):
        statistics = add(statistics, params, x, batch)
    return np.asarray(statistics["gram"], np.float64), np.asarray(statistics["sum"], np.float64)


def embed(params: Params, calibration: Calibration) -> list[Array]:
    """Returns the states before the first layer, float32 [M, D] of each batch."""
    table = params["embedding"]
    return [
        jnp.take(table, batch["tokens"], axis=0, mode="clip").astype(jnp.float32) for batch in calibration.batches()
    ]


@cache
def _masked_scores(config: RankerConfig) -> Callable[[Params, Any, Batch], Array]:
    decoder = Decoder(config.model)

    def scores(params: Params, masks: Any, batch: Batch) -> Array:
        layout = SharedPrefix(batch["prefix"], batch["items"], batch["tokens"].shape[0])
        hidden: Any = decoder.apply({"params": params, "masks": masks}, batch["tokens"], layout)
        return log_odds(hidden.reshape(-1, hidden.shape[-1]), label_rows(params, config.label_token_ids))

    return jax.jit(scores)


def masked_log_odds(
    config: RankerConfig, params: Params, masks: Masks, calibration: Calibration
) -> list[Float[np.ndarray, " _"]]:
    """Returns the log-odds of each request's items under masks, float32. Other masks compile nothing anew.

    Items that `Calibration.first` left out have NaN.
    """
    scores, variables = _masked_scores(config), masks.variables(config.model)
    log_odds_n = np.full(sum(calibration.sizes), np.nan, np.float32)
    for forward, batch in zip(calibration.forwards, calibration.batches(), strict=True):
        log_odds_n[forward.indices] = np.asarray(scores(params, variables, batch))[forward.places]
    return np.split(log_odds_n, np.cumsum(calibration.sizes)[:-1])
