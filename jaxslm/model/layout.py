"""How tokens see one another and which of them are read: the only part of a forward pass that knows about rows.

A layout gives the decoder each token's position, the attention of all layers, and the attention of the last one, in
which only the tokens that are read need queries, an output projection and an MLP.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@runtime_checkable
class Layout(Protocol):
    """Positions, attention and reading of one batch; built inside the traced function from its index arrays."""

    @property
    def positions(self) -> Int[Array, "*n"]:
        """Position of each token in its own row, from 0, prefix included."""
        ...

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        """Attention of all tokens: q [*n, K, G, H], k and v [*n, K, H] -> [*n, K, G, H]."""
        ...

    def read(self, x: Array) -> Array:
        """Picks the tokens whose final states are wanted: [*n, ...] -> [*m, ...]."""
        ...

    def attend_read(self, q: Array, k: Array, v: Array) -> Array:
        """Attention of the picked tokens only: q [*m, K, G, H], k and v [*n, K, H] -> [*m, K, G, H]."""
        ...


def masked_attention(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "#B T S"],
) -> Float[Array, "B T K G H"]:
    """Softmax(q k / sqrt(H)) v over the keys that the mask keeps; logits, softmax and sum in float32.

    A query without any key to see gets the mean of all values: finite, and never read.
    """
    scale = q_BTKGH.shape[-1] ** -0.5
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH * scale, k_BSKH, preferred_element_type=jnp.float32)
    logits = jnp.where(mask_BTS[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSKH.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH, preferred_element_type=jnp.float32)
    return out.astype(q_BTKGH.dtype)


class Rows:
    """Padded causal rows [B, T]; padding may stand anywhere and is never seen.

    Args:
        valid_BT: True at real tokens. Their positions count real tokens only.
        last_only: read each row's last real token ([B, ...]); otherwise every token ([B, T, ...]).
    """

    def __init__(self, valid_BT: Bool[Array, "B T"], *, last_only: bool = True) -> None:
        self._valid_BT = valid_BT
        self._last_only = last_only
        self.positions = jnp.maximum(jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1, 0)
        T = valid_BT.shape[1]
        self._last_B = jnp.max(jnp.where(valid_BT, jnp.arange(T, dtype=jnp.int32)[None], 0), axis=1)

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        """Causal attention over the real tokens of each row."""
        T = self._valid_BT.shape[1]
        causal_TS = jnp.tril(jnp.ones((T, T), bool))
        return masked_attention(q, k, v, causal_TS[None] & self._valid_BT[:, None, :])

    def read(self, x: Array) -> Array:
        """[B, T, ...] -> [B, ...] (or unchanged, when every token is read)."""
        return x[jnp.arange(x.shape[0]), self._last_B] if self._last_only else x

    def attend_read(self, q: Array, k: Array, v: Array) -> Array:
        """The last real token sees every real token of its row, so no causal mask is needed."""
        if not self._last_only:
            return self.attend(q, k, v)
        return masked_attention(q[:, None], k, v, self._valid_BT[:, None, :])[:, 0]


class SharedPrefix:
    """Requests packed flat: each request's prefix once, then its items, which see the prefix and, causally, themselves.

    Tokens of all requests lie end to end in one axis M, so linear maps touch no padding; only attention unfolds them.
    Every item's positions go on where its prefix ends. Items never see one another, and prefixes never see items.
    This is exact: each item's states equal those of the row prefix + item.

    Args:
        prefix_RP: index in 0..M-1 of each prefix token, M where there is none. Real tokens come first.
        items_RJT: index of each item token, M where there is none. Real tokens come first; an item may be empty.
        num_tokens: M.

    Reads the last token of each item: [M, ...] -> [R, J, ...] (an empty item's values are finite and mean nothing).
    """

    def __init__(self, prefix_RP: Int[Array, "R P"], items_RJT: Int[Array, "R J T"], num_tokens: int) -> None:
        (R, P), (_, J, T) = prefix_RP.shape, items_RJT.shape
        self._prefix_RP, self._items_RJT, self._num_tokens = prefix_RP, items_RJT, num_tokens
        self._prefix_valid_RP, self._items_valid_RJT = prefix_RP < num_tokens, items_RJT < num_tokens
        prefix_length_R = jnp.sum(self._prefix_valid_RP, axis=1, dtype=jnp.int32)
        item_length_RJ = jnp.sum(self._items_valid_RJT, axis=2, dtype=jnp.int32)
        self._last_RJ = jnp.maximum(item_length_RJ - 1, 0)
        # Where each flat token stands in the unfolded prefixes and items, laid end to end; padding tokens take place 0.
        places = jnp.concatenate([prefix_RP.reshape(-1), items_RJT.reshape(-1)])
        self._unfolded_M = (
            jnp.zeros(num_tokens, jnp.int32).at[places].set(jnp.arange(places.size, dtype=jnp.int32), mode="drop")
        )
        in_prefix = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None], (R, P))
        in_items = prefix_length_R[:, None, None] + jnp.arange(T, dtype=jnp.int32)[None, None]
        in_items = jnp.broadcast_to(in_items, (R, J, T))
        self.positions = jnp.concatenate([in_prefix.reshape(-1), in_items.reshape(-1)])[self._unfolded_M]

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        """[M, K, G, H] -> [M, K, G, H]: causal in each prefix; items over their prefix and, causally, themselves."""
        k_RPKH, v_RPKH = self._unfold(k, self._prefix_RP), self._unfold(v, self._prefix_RP)
        P, T = self._prefix_RP.shape[1], self._items_RJT.shape[2]
        prefix_mask = jnp.tril(jnp.ones((P, P), bool))[None]
        prefix_out = masked_attention(self._unfold(q, self._prefix_RP), k_RPKH, v_RPKH, prefix_mask)
        item_out = prefix_item_attention(
            self._unfold(q, self._items_RJT),
            k_RPKH,
            v_RPKH,
            self._prefix_valid_RP,
            self._unfold(k, self._items_RJT),
            self._unfold(v, self._items_RJT),
            jnp.tril(jnp.ones((T, T), bool))[None, None],
        )
        unfolded = jnp.concatenate([prefix_out.reshape(-1, *q.shape[1:]), item_out.reshape(-1, *q.shape[1:])])
        return unfolded[self._unfolded_M]

    def read(self, x: Array) -> Array:
        """[M, ...] -> [R, J, ...]: the last token of each item."""
        index_RJ = jnp.take_along_axis(self._items_RJT, self._last_RJ[..., None], axis=2)[..., 0]
        return jnp.take(x, index_RJ, axis=0, mode="clip")

    def attend_read(self, q: Array, k: Array, v: Array) -> Array:
        """[R, J, K, G, H] -> [R, J, K, G, H]: the last tokens see their whole prefix and item."""
        out = prefix_item_attention(
            q[:, :, None],
            self._unfold(k, self._prefix_RP),
            self._unfold(v, self._prefix_RP),
            self._prefix_valid_RP,
            self._unfold(k, self._items_RJT),
            self._unfold(v, self._items_RJT),
            self._items_valid_RJT[:, :, None, :],
        )
        return out[:, :, 0]

    @staticmethod
    def _unfold(x: Array, index: Array) -> Array:
        return jnp.take(x, index, axis=0, mode="clip")


def prefix_item_attention(
    q_RJTKGH: Float[Array, "R J T K G H"],
    k_RPKH: Float[Array, "R P K H"],
    v_RPKH: Float[Array, "R P K H"],
    prefix_valid_RP: Bool[Array, "R P"],
    k_RJSKH: Float[Array, "R J S K H"],
    v_RJSKH: Float[Array, "R J S K H"],
    mask_RJTS: Bool[Array, "#R #J T S"],
) -> Float[Array, "R J T K G H"]:
    """Attention of item tokens over the request's prefix and, through the mask, over their own item.

    The two parts share one softmax: exponents relative to the larger of their maxima, sums added, then one division,
    so the result equals attention over the concatenated keys. Cost: 4 N H (P + S) FLOP per query.
    """
    scale = q_RJTKGH.shape[-1] ** -0.5
    q_RJTKGH = q_RJTKGH * scale
    lowest = jnp.finfo(jnp.float32).min
    on_prefix = jnp.einsum("RJTKGH,RPKH->RKGJTP", q_RJTKGH, k_RPKH, preferred_element_type=jnp.float32)
    on_prefix = jnp.where(prefix_valid_RP[:, None, None, None, None], on_prefix, lowest)
    on_item = jnp.einsum("RJTKGH,RJSKH->RKGJTS", q_RJTKGH, k_RJSKH, preferred_element_type=jnp.float32)
    on_item = jnp.where(mask_RJTS[:, None, None], on_item, lowest)
    highest = jnp.maximum(jnp.max(on_prefix, axis=-1), jnp.max(on_item, axis=-1))[..., None]
    highest = jax.lax.stop_gradient(highest)
    on_prefix, on_item = jnp.exp(on_prefix - highest), jnp.exp(on_item - highest)
    total = jnp.sum(on_prefix, axis=-1) + jnp.sum(on_item, axis=-1)
    dtype = v_RPKH.dtype
    out = jnp.einsum("RKGJTP,RPKH->RJTKGH", on_prefix.astype(dtype), v_RPKH, preferred_element_type=jnp.float32)
    out += jnp.einsum("RKGJTS,RJSKH->RJTKGH", on_item.astype(dtype), v_RJSKH, preferred_element_type=jnp.float32)
    return (out / jnp.transpose(total, (0, 3, 4, 1, 2))[..., None]).astype(q_RJTKGH.dtype)
