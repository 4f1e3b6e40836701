"""A layer that compares: the start of a ranker that already scores as its contrastive stage does.

After `jaxslm train encoder` a query and a good item have similar mean states, but nothing in the decoder computes that
similarity, and a short training run does not find it: a last token that must compare two texts starts at chance. So one
ordinary decoder layer is put on top, its weights set so that the answer token computes the similarity, and training
goes on from there:

* attention: per KV head, one query head of the answer token pools the query's tokens and another the item's, both
  through the same value projection: the principal directions of pooled states. What a token is, query or item, is read
  from its state by a probe, fitted so that the softmax over a row comes nearest to the plain mean that is wanted; it
  stands in the slowest pair of RoPE's dimensions.
* MLP: silu(z) y - silu(-z) y = z y, so two neurons multiply one direction of the query by the same of the item, and
  the down projection adds the products up along one direction of the stream.
* the label rows differ by that direction, times the temperature that fits the labels best, minus an offset.

Unused heads and neurons start small and random. Nothing else is special: the result is an ordinary decoder.
Starting at the warm-up's quality is ResRank's idea (a cosine as residual of the score); here it needs no other head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxslm.config import ModelConfig, RankerConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.depth import last_layers
from jaxslm.model.head import label_rows, vocab_rows
from jaxslm.model.layout import EveryToken, SharedPrefix
from jaxslm.prompt import Prompt
from jaxslm.train.losses import list_softmax

POOLED_NORM = 3.0
"""Norm of each pooled vector as a multiple of the answer's own state, which then hardly changes the product."""
COSINE_STEP = 0.75
"""What a cosine of 1 adds to the stream, as a share of the state's norm: the score grows nearly linearly in it."""
RIDGE = 1e-2
NEWTON_STEPS = 8
PROBE_ROWS = 160
UNUSED_SCALE = 0.02
START_LOG_ODDS = -1.8
"""Mean log-odds at the start: few items of a list are relevant."""

NpBatch = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Sample:
    """States of some batches under the decoder that the layer goes on top of, float64.

    Attributes:
        rows: per item, the normed states of prefix and item [T, D], and of each token whether it is the query's,
            whether the item's, [2, T].
        answers, queries, items: float64 [items, D]; answer tokens; means over query, over own tokens.
        residuals: the answer tokens' stream before the final norm.
        streams: that of every token of each batch, [M, D].
    """

    rows: list[tuple[np.ndarray, np.ndarray]]
    answers: np.ndarray
    queries: np.ndarray
    items: np.ndarray
    residuals: np.ndarray
    streams: list[jax.Array]


def add_comparison_layer(
    config: RankerConfig, params: Params, prompt: Prompt, batches: Sequence[NpBatch]
) -> tuple[ModelConfig, Params]:
    """Returns the model with one more layer, which scores an item by the similarity of its mean state to the query's.

    The same arguments give the same result on the same machine.

    Args:
        params: float32, of a decoder whose mean states are comparable. prompt: what the ranker will read.
        batches: of `ranker_batches`; some hundred items in all. Labels choose the score's scale only.

    Raises:
        InputError: a family with q/k norm, fewer than two query heads per KV head, or an MLP too narrow.
    """
    model = config.model
    _check(model)
    sample = _sample(model, params, prompt, batches)
    layer, direction_D = _layer(model, sample)
    taller, grown = _put_on_top(model, params, layer)
    difference_D = _label_difference(taller, grown, direction_D, sample, batches)
    labels = jnp.asarray(config.label_token_ids)
    middle_D = np.asarray(label_rows(params, config.label_token_ids)).mean(axis=0)
    rows_2D = jnp.asarray(np.stack([middle_D - difference_D / 2, middle_D + difference_D / 2]), jnp.float32)
    table = "embedding" if model.tie_embeddings else "head"
    return taller, grown | {table: vocab_rows(grown).at[labels].set(rows_2D)}


def _check(model: ModelConfig) -> None:
    if model.qk_norm:
        raise InputError("comparison_layer: needs a family without q/k norm (llama), whose attention logits are free")
    if model.queries_per_kv < 2:
        raise InputError("comparison_layer: needs at least two query heads per KV head")
    needed = 2 * model.kv_heads_by_layer[-1] * model.head_dim
    if model.width <= needed or model.mlp_width_by_layer[-1] < needed:
        raise InputError(f"comparison_layer: width must be above {needed}, mlp_width at least that")


def _put_on_top(model: ModelConfig, params: Params, layer: Params) -> tuple[ModelConfig, Params]:
    """The layer takes the old final norm as its own, since pooled states are normed ones; the new one is plain."""
    count = model.num_layers
    widths = {
        "num_kv_heads": (*model.kv_heads_by_layer, model.kv_heads_by_layer[-1]),
        "mlp_width": (*model.mlp_width_by_layer, model.mlp_width_by_layer[-1]),
    }
    one_or_all = {name: each[0] if len(set(each)) == 1 else each for name, each in widths.items()}
    ones_D = jnp.ones(model.width, jnp.float32)
    layer = layer | {"attention_norm": params["final_norm"], "mlp_norm": {"scale": ones_D}}
    grown = params | {f"layers_{count}": layer, "final_norm": {"scale": ones_D}}
    return ModelConfig(**(model.model_dump() | {"num_layers": count + 1} | one_or_all)), grown


def _sample(model: ModelConfig, params: Params, prompt: Prompt, batches: Sequence[NpBatch]) -> _Sample:
    decoder, last = Decoder(model), f"layers_{model.num_layers - 1}"

    @jax.jit
    def states(params: Params, tokens_M: jax.Array, prefix_RP: jax.Array, items_RJT: jax.Array) -> Any:
        layout = EveryToken(prefix_RP, items_RJT, tokens_M.shape[0])
        normed, variables = decoder.apply(
            {"params": params},
            tokens_M,
            layout,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name == last,
        )
        stream = variables["intermediates"][last]["__call__"][0]
        return normed, layout.read_last(stream), stream

    streams: list[jax.Array] = []
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for batch in batches:
        normed, residual, stream = states(params, batch["tokens"], batch["prefix"], batch["items"])
        streams.append(stream)
        of_batch = _roles(np.asarray(normed, np.float64), batch, prompt)
        rows += of_batch
        columns[0].append(np.stack([states_TD[-1] for states_TD, _ in of_batch]))
        columns[1].append(np.stack([states_TD[roles_T[0]].mean(axis=0) for states_TD, roles_T in of_batch]))
        columns[2].append(np.stack([states_TD[roles_T[1]].mean(axis=0) for states_TD, roles_T in of_batch]))
        columns[3].append(np.asarray(residual, np.float64)[batch["valid"]])
    answers, queries, items, residuals = (np.concatenate(column) for column in columns)
    return _Sample(rows, answers, queries, items, residuals, streams)


def _roles(states_MD: np.ndarray, batch: NpBatch, prompt: Prompt) -> list[tuple[np.ndarray, np.ndarray]]:
    """`_Sample.rows` of one batch."""
    M, suffix = len(states_MD), len(prompt.suffix_ids)
    rows = []
    for prefix_P, items_JT, valid_J in zip(batch["prefix"], batch["items"], batch["valid"], strict=True):
        prefix = prefix_P[prefix_P < M]
        for item_T in items_JT[valid_J]:
            item = item_T[item_T < M]
            roles_2T = np.zeros((2, len(prefix) + len(item)), bool)
            roles_2T[0, : len(prefix)][prompt.query_from :] = True
            roles_2T[1, len(prefix) : -suffix] = True
            rows.append((states_MD[np.concatenate([prefix, item])], roles_2T))
    return rows


def _layer(model: ModelConfig, sample: _Sample) -> tuple[Params, np.ndarray]:
    """Returns attention and MLP of the layer, and the unit vector [D] of the stream that takes the similarity."""
    D, K, G, H = model.width, model.kv_heads_by_layer[-1], model.queries_per_kv, model.head_dim
    F, pooled = model.mlp_width_by_layer[-1], K * H
    random = np.random.default_rng(0)
    # Directions of the stream in which the answer's own state has least: room for the query's, the item's, the sum.
    room_DD = np.linalg.eigh(sample.residuals.T @ sample.residuals)[1]
    query_DX, item_DX, sum_D = room_DD[:, :pooled], room_DD[:, pooled : 2 * pooled], room_DD[:, 2 * pooled]
    values_DX = _principal_directions(sample, pooled)

    answer_probe = _ridge(sample.answers, np.ones(len(sample.answers)))
    query_probe, item_probe = (_probe(sample, role) * np.sqrt(H) for role in (0, 1))
    slow, slow_too = H // 2 - 1, H - 1  # one pair of RoPE: it turns by less than a thousandth per token
    w_q, w_k = random.normal(0, UNUSED_SCALE, (D, K, G, H)), np.zeros((D, K, H))
    w_q[:, :, :2] = 0
    w_q[:, :, 0, slow] = w_q[:, :, 1, slow_too] = answer_probe[:, None]
    w_k[:, :, slow], w_k[:, :, slow_too] = query_probe[:, None], item_probe[:, None]
    w_o = np.zeros((K, G, H, D))
    norm = np.linalg.norm(sample.residuals, axis=1).mean() * POOLED_NORM
    for head, means, into_DX in ((0, sample.queries, query_DX), (1, sample.items, item_DX)):
        pooled_norm = np.linalg.norm(means @ values_DX, axis=1).mean()
        w_o[:, head] = (into_DX.T * norm / pooled_norm).reshape(K, H, D)

    gate, up = random.normal(0, UNUSED_SCALE, (2, D, F))
    down = np.zeros((F, D))
    gate[:, 0 : 2 * pooled : 2], gate[:, 1 : 2 * pooled : 2] = query_DX, -query_DX
    up[:, 0 : 2 * pooled : 2] = up[:, 1 : 2 * pooled : 2] = item_DX
    # The norm before the MLP leaves a stream of norm sqrt(D), of which each pooled vector has this much:
    in_norm = np.sqrt(D) * POOLED_NORM / np.sqrt(1 + 2 * POOLED_NORM**2)
    stream_norm = norm / POOLED_NORM * np.sqrt(1 + 2 * POOLED_NORM**2)
    down[0 : 2 * pooled : 2], down[1 : 2 * pooled : 2] = sum_D, -sum_D
    down *= COSINE_STEP * stream_norm / in_norm**2

    tree = {
        "attention": {"q": w_q.reshape(D, -1), "k": w_k.reshape(D, -1), "v": values_DX, "o": w_o.reshape(-1, D)},
        "mlp": {"gate": gate, "up": up, "down": down},
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree), sum_D


def _probe(sample: _Sample, role: int) -> np.ndarray:
    """The vector w [D] whose softmax(states . w) over a row is nearest, in KL, to the mean over the tokens of a role.

    A convex problem, solved by Newton's method on PROBE_ROWS rows.
    """
    rows = sample.rows[:: -(-len(sample.rows) // PROBE_ROWS)]
    x_ND = np.concatenate([states_TD for states_TD, _ in rows])
    wanted_N = np.concatenate([roles[role] / roles[role].sum() for _, roles in rows])
    starts = np.cumsum([0] + [len(states_TD) for states_TD, _ in rows])[:-1]
    row_of_N = np.repeat(np.arange(len(rows)), np.diff([*starts, len(x_ND)]))
    damping_DD = RIDGE * np.mean(x_ND**2) * np.eye(x_ND.shape[1])
    w_D = np.zeros(x_ND.shape[1])
    for _ in range(NEWTON_STEPS):
        logits_N = x_ND @ w_D
        e_N = np.exp(logits_N - np.maximum.reduceat(logits_N, starts)[row_of_N])
        p_N = e_N / np.add.reduceat(e_N, starts)[row_of_N]
        means_RD = np.add.reduceat(p_N[:, None] * x_ND, starts)
        gradient_D = (p_N - wanted_N) @ x_ND / len(rows) + damping_DD @ w_D
        hessian_DD = ((p_N[:, None] * x_ND).T @ x_ND - means_RD.T @ means_RD) / len(rows) + damping_DD
        step_D = np.linalg.solve(hessian_DD, gradient_D)
        w_D -= step_D / max(1.0, np.abs(x_ND @ step_D).max() / 4)  # no logit moves by more than 4 at once
    return w_D


def _ridge(states_ND: np.ndarray, values_N: np.ndarray) -> np.ndarray:
    """The ridge least-squares vector [D] with state . vector = value for these states."""
    gram_DD = states_ND.T @ states_ND
    damping_DD = RIDGE * np.trace(gram_DD) / len(gram_DD) * np.eye(len(gram_DD))
    solved: np.ndarray = np.linalg.solve(gram_DD + damping_DD, states_ND.T @ values_N)
    return solved


def _units(states_ND: np.ndarray) -> np.ndarray:
    units: np.ndarray = states_ND / np.linalg.norm(states_ND, axis=1, keepdims=True)
    return units


def _principal_directions(sample: _Sample, count: int) -> np.ndarray:
    """The `count` directions [D, count] in which pooled states are largest, those that all of them share included.

    What is shared says nothing of an item, but a cosine is of whole vectors: without it the order is another.
    """
    units = np.concatenate([_units(sample.queries), _units(sample.items)])
    return np.linalg.eigh(units.T @ units)[1][:, ::-1][:, :count]


def _label_difference(
    model: ModelConfig, params: Params, direction_D: np.ndarray, sample: _Sample, batches: Sequence[NpBatch]
) -> np.ndarray:
    """Returns w_yes - w_no, for log-odds as near as may be to the cosine of the pooled states.

    The stream's similarity strays from the cosine with the norms of what else stands in the stream, and a linear map of
    the final state knows them: a ridge regression from the direction alone. The cosine's scale is that of least list
    loss, its offset gives a mean of START_LOG_ODDS.
    """
    decoder = Decoder(last_layers(model, 1))
    on_top = params | {"layers_0": params[f"layers_{model.num_layers - 1}"]}

    @jax.jit
    def read(params: Params, stream_MD: jax.Array, prefix_RP: jax.Array, items_RJT: jax.Array) -> jax.Array:
        layout = SharedPrefix(prefix_RP, items_RJT, len(stream_MD))
        return jnp.asarray(decoder.apply({"params": params}, stream_MD, layout, method=Decoder.decode))

    states_RJD = np.concatenate(
        [
            np.asarray(read(on_top, stream_MD, each["prefix"], each["items"]), np.float64)
            for stream_MD, each in zip(sample.streams, batches, strict=True)
        ]
    )
    labels_RJ, valid_RJ = (np.concatenate([each[name] for each in batches]) for name in ("labels", "valid"))
    cosine_RJ = np.zeros(valid_RJ.shape, np.float32)
    cosine_RJ[valid_RJ] = cosines = np.sum(_units(sample.queries) * _units(sample.items), axis=1)
    scales = np.geomspace(1, 100, 41)
    losses = [
        float(list_softmax(jnp.asarray(scale * cosine_RJ), jnp.asarray(labels_RJ), jnp.asarray(valid_RJ)))
        for scale in scales
    ]
    wanted_N = START_LOG_ODDS + scales[np.argmin(losses)] * (cosines - cosines.mean())
    states_ND = states_RJD[valid_RJ]
    similarity_N = states_ND @ direction_D
    slope = np.cov(similarity_N, wanted_N)[0, 1] / np.var(similarity_N)
    difference_D: np.ndarray = slope * direction_D + _ridge(states_ND, wanted_N - slope * similarity_N)
    one_D = _ridge(states_ND, np.ones(len(states_ND)))
    missing = START_LOG_ODDS - np.mean(states_ND @ difference_D)  # damping takes some of the offset
    return difference_D + missing / np.mean(states_ND @ one_D) * one_D
