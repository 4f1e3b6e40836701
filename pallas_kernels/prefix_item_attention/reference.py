"""The same attention with dense masks, as XLA computes it, and in float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class KeySpans(NamedTuple):
    """The keys that each query sees: prefix_start to prefix_end - 1 and item_start to item_end - 1 of the flat axis.

    An empty span ends where it starts. Where both have keys, the prefix ends at or before the start of the item. A
    query that sees no key gets zeros.
    """

    prefix_start: Int[Array, " Q"]
    prefix_end: Int[Array, " Q"]
    item_start: Int[Array, " Q"]
    item_end: Int[Array, " Q"]

    def seen(self, num_keys: int) -> Bool[Array, "Q M"]:
        """True at the keys that a query sees."""
        key_1M = jnp.arange(num_keys)[None]
        start, end, item_start, item_end = (column[:, None] for column in self)
        return ((key_1M >= start) & (key_1M < end)) | ((key_1M >= item_start) & (key_1M < item_end))


def attention(
    q_QNH: Float[Array, "Q N H"], k_MKH: Float[Array, "M K H"], v_MKH: Float[Array, "M K H"], spans: KeySpans
) -> Float[Array, "Q N H"]:
    """Returns softmax(q k / sqrt(H)) v over the keys seen, by way of all Q M N logits."""
    (Q, N, H), (M, K, _) = q_QNH.shape, k_MKH.shape
    q_QKGH = q_QNH.reshape(Q, K, N // K, H)
    seen_QM = spans.seen(M)[None, None]
    logits = jnp.einsum("QKGH,MKH->KGQM", q_QKGH, k_MKH, preferred_element_type=jnp.float32) * H**-0.5
    weights = jax.nn.softmax(jnp.where(seen_QM, logits, jnp.finfo(jnp.float32).min), axis=-1)
    weights = jnp.where(seen_QM, weights, 0).astype(v_MKH.dtype)
    out = jnp.einsum("KGQM,MKH->QKGH", weights, v_MKH, preferred_element_type=jnp.float32)
    return out.astype(q_QNH.dtype).reshape(Q, N, H)


def exact(q_QNH: np.ndarray, k_MKH: np.ndarray, v_MKH: np.ndarray, *spans: np.ndarray) -> np.ndarray:
    """Returns the same in float64, queries of one item at a time, so that no Q x M mask is needed."""
    (Q, N, H), (_, K, _) = q_QNH.shape, k_MKH.shape
    q_QKGH = q_QNH.astype(np.float64).reshape(Q, K, N // K, H) * H**-0.5
    out_QKGH = np.zeros_like(q_QKGH)
    spans_4Q = np.stack(spans)
    beginnings = np.concatenate([[True], np.any(spans_4Q[:3, 1:] != spans_4Q[:3, :-1], axis=0)])
    for group in np.split(np.arange(Q), np.flatnonzero(beginnings)[1:]):
        prefix_start, prefix_end, item_start = spans_4Q[:3, group[0]]
        keys = np.r_[prefix_start:prefix_end, item_start : max(item_start, spans_4Q[3, group].max())]
        if len(keys) == 0:
            continue
        hidden = (keys[None] >= spans_4Q[3, group][:, None]) & (np.arange(len(keys)) >= prefix_end - prefix_start)
        logits = np.einsum("qkgh,mkh->kgqm", q_QKGH[group], k_MKH[keys].astype(np.float64))
        logits = np.where(hidden, -np.inf, logits)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-1e300))
        weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
        out_QKGH[group] = np.einsum("kgqm,mkh->qkgh", weights, v_MKH[keys].astype(np.float64))
    return out_QKGH.reshape(Q, N, H)
