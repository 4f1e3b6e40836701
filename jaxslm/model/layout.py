"""How tokens see one another and which of them are read: the only part of a forward pass that knows about rows.

A layout gives the decoder each token's position, the attention of all layers, and the attention of the last one, in
which only the tokens that are read need queries, an output projection and an MLP.
"""

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import prefix_item_attention as packed
from pallas_kernels.dispatch import XLA

_LOWEST = float(jnp.finfo(jnp.float32).min)


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


LONG_PREFIX = 128
"""From so many tokens on, rows attend one by one on a CPU: a prefix that several name to itself only once, and rows
without items not at all. A GPU would wait for the host to decide it."""


class SharedPrefix:
    """Requests packed flat: each request's prefix once, then its items, which see the prefix and, causally, themselves.

    Tokens of all requests lie end to end in one axis M, so linear maps touch no padding; only attention unfolds them.
    Every item's positions go on where its prefix ends. Items never see one another, and prefixes never see items.
    This is exact: each item's states equal those of the row prefix + item. Two of the R rows may name the same prefix
    tokens: a request with more than J items takes several rows and still computes its prefix's linear maps once.

    Args:
        prefix_RP: index in 0..M-1 of each prefix token, M where there is none. Real tokens come first.
        items_RJT: index of each item token, M where there is none. Real tokens come first; an item may be empty.
        num_tokens: M.
        implementation: of attention, as `pallas_kernels.dispatch.choose` takes it. All but XLA's need what
            `jaxslm.score.packing` makes: each prefix and each item end to end, a prefix before its items.

    Reads the last token of each item: [M, ...] -> [R, J, ...] (an empty item's values are finite and mean nothing).
    """

    def __init__(
        self,
        prefix_RP: Int[Array, "R P"],
        items_RJT: Int[Array, "R J T"],
        num_tokens: int,
        implementation: str | None = XLA,
    ) -> None:
        (R, P), (_, J, T) = prefix_RP.shape, items_RJT.shape
        self._implementation = implementation
        self._prefix_RP, self._items_RJT, self._num_tokens = prefix_RP, items_RJT, num_tokens
        self._prefix_valid_RP = prefix_RP < num_tokens
        prefix_length_R = jnp.sum(self._prefix_valid_RP, axis=1, dtype=jnp.int32)
        item_length_RJ = jnp.sum(items_RJT < num_tokens, axis=2, dtype=jnp.int32)
        self._prefix_length_R, self._item_length_RJ = prefix_length_R, item_length_RJ
        self._last_RJ = jnp.maximum(item_length_RJ - 1, 0)
        starts_R = self._prefix_starts()
        repeats_R = jnp.any(jnp.tril(starts_R[:, None] == starts_R[None], k=-1) & (prefix_length_R > 0), axis=1)
        self._new_R = (prefix_length_R > 0) & ~repeats_R
        # Where each flat token stands in the unfolded prefixes and items, laid end to end; padding tokens take place 0.
        first_RP = jnp.where(self._new_R[:, None], prefix_RP, num_tokens)
        places = jnp.concatenate([first_RP.reshape(-1), items_RJT.reshape(-1)])
        self._unfolded_M = (
            jnp.zeros(num_tokens, jnp.int32).at[places].set(jnp.arange(places.size, dtype=jnp.int32), mode="drop")
        )
        in_prefix = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None], (R, P))
        in_items = prefix_length_R[:, None, None] + jnp.arange(T, dtype=jnp.int32)[None, None]
        in_items = jnp.broadcast_to(in_items, (R, J, T))
        self.positions = jnp.concatenate([in_prefix.reshape(-1), in_items.reshape(-1)])[self._unfolded_M]

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        """[M, K, G, H] -> [M, K, G, H]: causal in each prefix; items over their prefix and, causally, themselves."""
        return self._dispatch(q, k, v, self._spans, lambda: self._attend_unfolded(q, k, v))

    def _attend_unfolded(self, q: Array, k: Array, v: Array) -> Array:
        k_RKPH, v_RKPH = self._prefixes(k), self._prefixes(v)
        prefix_out = self._of_rows(self._new_R, causal_attention, self._prefixes(q), k_RKPH, v_RKPH)
        item_out = self._of_rows(
            jnp.any(self._item_length_RJ > 0, axis=1),
            prefix_item_attention,
            self._items(q),
            k_RKPH,
            v_RKPH,
            self._prefix_valid_RP,
            self._items(k),
            self._items(v),
        )
        heads = q.shape[1:]
        prefix_out = jnp.moveaxis(prefix_out, 1, 2).reshape(-1, *heads)
        item_out = jnp.moveaxis(item_out, 1, 3).reshape(-1, *heads)
        return jnp.concatenate([prefix_out, item_out])[self._unfolded_M]

    def _of_rows(self, wanted_R: Array, attend: Callable[..., Array], q: Array, *others: Array) -> Array:
        """`attend(q, *others)`, arrays with an axis R in front; any values in rows that are not wanted."""
        R, P = self._prefix_RP.shape
        if R == 1 or P < LONG_PREFIX:
            return attend(q, *others)

        def one_by_one(wanted_R: Array, *arrays: Array) -> Array:
            def of_row(row: tuple[Array, ...]) -> Array:
                wanted, *parts = row
                return jax.lax.cond(
                    wanted, lambda: attend(*(part[None] for part in parts))[0], lambda: jnp.zeros_like(parts[0])
                )

            return jnp.asarray(jax.lax.map(of_row, (wanted_R, *arrays)))

        def all_rows(_: Array, *arrays: Array) -> Array:
            return attend(*arrays)

        # Chosen by the platform that is compiled for, so that a program exported on one holds what others need.
        return jax.lax.platform_dependent(wanted_R, q, *others, cpu=one_by_one, default=all_rows)

    def read(self, x: Array) -> Array:
        """[M, ...] -> [R, J, ...]: the last token of each item."""
        index_RJ = jnp.take_along_axis(self._items_RJT, self._last_RJ[..., None], axis=2)[..., 0]
        return jnp.take(x, index_RJ, axis=0, mode="clip")

    def attend_read(self, q: Array, k: Array, v: Array) -> Array:
        """[R, J, K, G, H] -> [R, J, K, G, H]: the last tokens see their whole prefix and item."""
        return self._dispatch(q, k, v, self._spans_read, lambda: self._attend_read_unfolded(q, k, v))

    def _attend_read_unfolded(self, q: Array, k: Array, v: Array) -> Array:
        out = prefix_item_attention(
            jnp.moveaxis(q, 2, 1)[:, :, :, None],
            self._prefixes(k),
            self._prefixes(v),
            self._prefix_valid_RP,
            self._items(k),
            self._items(v),
            self._last_RJ,
        )
        return jnp.moveaxis(out[:, :, :, 0], 1, 2)

    def _dispatch(
        self, q: Array, k: Array, v: Array, spans: Callable[[], packed.KeySpans], unfolded: Callable[[], Array]
    ) -> Array:
        *queries, K, G, H = q.shape
        longest = self._prefix_RP.shape[1], self._items_RJT.shape[2]
        if self._implementation == XLA:  # needs no spans; it is listed all the same
            packed.choice_for((math.prod(queries), K * G, H), k.shape, q.dtype, longest, XLA)
            return unfolded()
        out = packed.prefix_item_attention(
            q.reshape(-1, K * G, H),
            k,
            v,
            spans(),
            longest=longest,
            implementation=self._implementation,
            xla=lambda: unfolded().reshape(-1, K * G, H),
        )
        return out.reshape(*queries, K, G, H)

    def _spans(self) -> packed.KeySpans:
        """The keys that each flat token sees: a prefix token those of its prefix, as its item; padding none."""
        (R, P), (_, J, T), starts_R = self._prefix_RP.shape, self._items_RJT.shape, self._prefix_starts()
        first = jnp.broadcast_to(starts_R[:, None], (R, P))
        of_prefixes = packed.KeySpans(first, first, first, self._prefix_RP + 1)
        places = (R, J, T)
        of_items = packed.KeySpans(
            jnp.broadcast_to(starts_R[:, None, None], places),
            jnp.broadcast_to((starts_R + self._prefix_length_R)[:, None, None], places),
            jnp.broadcast_to(self._items_RJT[..., :1], places),
            self._items_RJT + 1,
        )
        columns = [jnp.concatenate([a.reshape(-1), b.reshape(-1)]) for a, b in zip(of_prefixes, of_items, strict=True)]
        used = jnp.concatenate([self._prefix_RP.reshape(-1), self._items_RJT.reshape(-1)])
        real_M = jnp.zeros(self._num_tokens, bool).at[used].set(True, mode="drop")
        return packed.KeySpans(*(jnp.where(real_M, column[self._unfolded_M], 0) for column in columns))

    def _prefix_starts(self) -> Int[Array, " R"]:
        """First token of each row's prefix, 0 where it has none."""
        R, P = self._prefix_RP.shape
        first_R = self._prefix_RP[:, 0] if P else jnp.zeros(R, jnp.int32)
        return jnp.where(self._prefix_length_R > 0, first_R, 0)

    def _spans_read(self) -> packed.KeySpans:
        """The keys that the last token of each item sees; none if the item is empty."""
        R, J, _ = self._items_RJT.shape
        starts_R, begin_RJ = self._prefix_starts(), self._items_RJT[..., 0]
        columns = (
            jnp.broadcast_to(starts_R[:, None], (R, J)),
            jnp.broadcast_to((starts_R + self._prefix_length_R)[:, None], (R, J)),
            begin_RJ,
            begin_RJ + self._item_length_RJ,
        )
        return packed.KeySpans(*(jnp.where(self._item_length_RJ > 0, column, 0).reshape(-1) for column in columns))

    def _prefixes(self, x: Array) -> Array:
        """[M, K, ...] -> [R, K, P, ...]; heads before tokens make every product of attention a plain batched one."""
        return jnp.moveaxis(jnp.take(x, self._prefix_RP, axis=0, mode="clip"), 2, 1)

    def _items(self, x: Array) -> Array:
        """[M, K, ...] -> [R, K, J, T, ...]."""
        return jnp.moveaxis(jnp.take(x, self._items_RJT, axis=0, mode="clip"), 3, 1)


class EveryToken(SharedPrefix):
    """The same rows, with every token read: [M, ...] -> [M, ...]."""

    def read_last(self, x: Array) -> Array:
        """[M, ...] -> [R, J, ...]: the last token of each item."""
        return super().read(x)

    def read(self, x: Array) -> Array:
        """Every token."""
        return x

    def attend_read(self, q: Array, k: Array, v: Array) -> Array:
        """Every token sees what it sees in the other layers."""
        return self.attend(q, k, v)


QUERY_BLOCK = 128
"""Queries of a causal product are cut into blocks of at most this many, so that keys above the diagonal are skipped."""


def _blocks(T: int) -> list[tuple[int, int]]:
    """Cuts 0..T into equal blocks (the last may be shorter) of at most QUERY_BLOCK: pairs of start and end."""
    step = -(-T // -(-T // QUERY_BLOCK))
    return [(start, min(T, start + step)) for start in range(0, T, step)]


def _products(a: Array, b: Array, *, contract_b: int) -> Array:
    """Batched matrix product over all leading axes: a [..., t, c] with axis `contract_b` (-1 or -2) of b; float32."""
    batch = tuple(range(a.ndim - 2))
    dimensions = (((a.ndim - 1,), (b.ndim + contract_b,)), (batch, batch))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _blockwise_attention(
    q_RKTGH: Float[Array, "R K T G H"],
    k_RKSH: Float[Array, "R K S H"],
    v_RKSH: Float[Array, "R K S H"],
    mask_RTS: Bool[Array, "#R T S"],
    before: int,
) -> Float[Array, "R K T G H"]:
    """Softmax(q k / sqrt(H)) v over the keys that the mask keeps, none of them beyond `before + t` for query t."""
    R, K, T, G, H = q_RKTGH.shape
    q_RKTGH = q_RKTGH * H**-0.5
    outputs = []
    for start, end in _blocks(T):
        t, S = end - start, before + end
        logits = _products(q_RKTGH[:, :, start:end].reshape(R, K, t * G, H), k_RKSH[:, :, :S], contract_b=-1)
        mask = mask_RTS[:, None, start:end, None, :S]
        logits = jnp.where(mask, logits.reshape(R, K, t, G, S), _LOWEST).reshape(R, K, t * G, S)
        highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - highest)
        out = _products(weights.astype(v_RKSH.dtype), v_RKSH[:, :, :S], contract_b=-2)
        outputs.append((out / jnp.sum(weights, axis=-1, keepdims=True)).reshape(R, K, t, G, H))
    return jnp.concatenate(outputs, axis=2).astype(q_RKTGH.dtype)


def causal_attention(
    q_RKTGH: Float[Array, "R K T G H"], k_RKTH: Float[Array, "R K T H"], v_RKTH: Float[Array, "R K T H"]
) -> Float[Array, "R K T G H"]:
    """Softmax(q k / sqrt(H)) v over the keys up to each query. Cost: half of 4 N H T FLOP per query, plus a block."""
    T = k_RKTH.shape[2]
    return _blockwise_attention(q_RKTGH, k_RKTH, v_RKTH, jnp.tril(jnp.ones((1, T, T), bool)), before=0)


def prefix_item_attention(
    q_RKJTGH: Float[Array, "R K J T G H"],
    k_RKPH: Float[Array, "R K P H"],
    v_RKPH: Float[Array, "R K P H"],
    prefix_valid_RP: Bool[Array, "R P"],
    k_RKJSH: Float[Array, "R K J S H"],
    v_RKJSH: Float[Array, "R K J S H"],
    last_RJ: Int[Array, "R J"] | None = None,
) -> Float[Array, "R K J T G H"]:
    """Attention of item tokens over the request's prefix and over their own item.

    The two parts share one softmax: exponents relative to the larger of their maxima, sums added, then one division,
    so the result equals attention over the concatenated keys. Cost: 4 N H (P + S) FLOP per query, and for causal items
    half of S is skipped, block by block.

    Args:
        last_RJ: if given, the queries (T = 1) see their item's keys 0..last; else S = T and token t sees keys 0..t.
    """
    R, K, J, T, G, H = q_RKJTGH.shape
    P = k_RKPH.shape[2]
    if J == 1:  # one product over all keys of a row costs less than two
        keys = jnp.concatenate([k_RKPH, k_RKJSH[:, :, 0]], axis=2)
        values = jnp.concatenate([v_RKPH, v_RKJSH[:, :, 0]], axis=2)
        S = k_RKJSH.shape[3]
        last_RT = jnp.arange(T)[None] if last_RJ is None else last_RJ
        seen_RTS = jnp.arange(S) <= last_RT[..., None]
        seen_prefix_RTP = jnp.broadcast_to(prefix_valid_RP[:, None], (R, T, P))
        seen = jnp.concatenate([seen_prefix_RTP, jnp.broadcast_to(seen_RTS, (R, T, S))], axis=2)
        out = _blockwise_attention(q_RKJTGH[:, :, 0], keys, values, seen, before=P + S - T)
        return out[:, :, None]
    q_RKJTGH = q_RKJTGH * H**-0.5
    outputs = []
    for start, end in _blocks(T):
        t, S = end - start, end if last_RJ is None else k_RKJSH.shape[3]
        q = q_RKJTGH[:, :, :, start:end]
        on_prefix = _products(q.reshape(R, K, J * t * G, H), k_RKPH, contract_b=-1)
        on_prefix = jnp.where(prefix_valid_RP[:, None, None], on_prefix, _LOWEST).reshape(R, K, J, t * G, P)
        on_item = _products(q.reshape(R, K, J, t * G, H), k_RKJSH[:, :, :, :S], contract_b=-1)
        last = jnp.arange(start, end)[None, None] if last_RJ is None else last_RJ[:, :, None]
        mask = (jnp.arange(S)[None, None, None] <= last[..., None])[:, None, :, :, None]
        on_item = jnp.where(mask, on_item.reshape(R, K, J, t, G, S), _LOWEST).reshape(R, K, J, t * G, S)
        highest = jnp.maximum(jnp.max(on_prefix, axis=-1), jnp.max(on_item, axis=-1))[..., None]
        highest = jax.lax.stop_gradient(highest)
        on_prefix, on_item = jnp.exp(on_prefix - highest), jnp.exp(on_item - highest)
        total = jnp.sum(on_prefix, axis=-1) + jnp.sum(on_item, axis=-1)
        dtype = v_RKPH.dtype
        out = _products(on_prefix.astype(dtype).reshape(R, K, J * t * G, P), v_RKPH, contract_b=-2)
        out = out.reshape(R, K, J, t * G, H) + _products(on_item.astype(dtype), v_RKJSH[:, :, :, :S], contract_b=-2)
        outputs.append((out / total[..., None]).reshape(R, K, J, t, G, H))
    return jnp.concatenate(outputs, axis=3).astype(q_RKJTGH.dtype)
