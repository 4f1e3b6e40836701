"""Attention of packed scoring: items see the prefix that they share and, causally, themselves; all in one flat axis."""

from collections.abc import Callable, Mapping

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dispatch import INTERPRETED, XLA, Choice, choose
from pallas_kernels.prefix_item_attention import reference
from pallas_kernels.prefix_item_attention.reference import KeySpans

__all__ = ["KeySpans", "choice_for", "prefix_item_attention"]


def prefix_item_attention(
    q_QNH: Float[Array, "Q N H"],
    k_MKH: Float[Array, "M K H"],
    v_MKH: Float[Array, "M K H"],
    spans: KeySpans,
    *,
    longest: tuple[int, int],
    implementation: str | None = None,
    xla: Callable[[], Array] | None = None,
) -> Float[Array, "Q N H"]:
    """Returns softmax(q k / sqrt(H)) v over the keys that each query sees, in the dtype of q.

    One form serves every attention of packed scoring. A token of an item sees its request's prefix and its item up to
    itself; a token of a prefix has no prefix and the prefix for its item; in the last layer the queries are the answer
    tokens alone. Query head n reads key/value head n // (N / K).

    The kernel works on 64 consecutive queries at a time and visits only the keys between the first and the last that
    one of them sees in its prefix, and likewise in its item. So it is fast where neighbouring queries see neighbouring
    keys, which is so if requests, and the items of each, lie end to end. Logits, softmax and sums are float32. Cost:
    4 N H FLOP per query and key seen, more for tiles that are seen in part; no gather, no mask in memory. Only XLA's
    implementations have a gradient.

    Args:
        longest: most tokens of a prefix and of an item; by these the table of measurements tells workloads apart.
        implementation: a name of `pallas_kernels.dispatch.IMPLEMENTATIONS`, or None for the fastest one measured here.
        xla: computes the same result where XLA is chosen, for callers that know more about their layout. The default
            makes all Q M N logits.

    Raises:
        ValueError: the named implementation cannot run on this device or these arguments.
    """
    choice = choice_for(q_QNH.shape, k_MKH.shape, q_QNH.dtype, longest, implementation)
    if choice.implementation == XLA:
        return reference.attention(q_QNH, k_MKH, v_MKH, spans) if xla is None else xla()
    from pallas_kernels.interpret import interpret_params
    from pallas_kernels.prefix_item_attention import mosaic_gpu

    return mosaic_gpu.attention(
        q_QNH,
        k_MKH,
        v_MKH,
        spans,
        tiles=mosaic_gpu.tiles_for(choice.tiles, choice.shape),
        interpret=interpret_params() if choice.implementation == INTERPRETED else None,
    )


def choice_for(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    dtype: DTypeLike,
    longest: tuple[int, int],
    implementation: str | None,
) -> Choice:
    """Returns what runs for queries [Q, N, H] and keys [M, K, H], which `explain` then lists; the rest as above."""
    (Q, N, H), (M, K, _) = queries, keys
    shape = {"Q": Q, "M": M, "N": N, "K": K, "H": H, "P": longest[0], "T": longest[1]}
    return choose("prefix_item_attention", shape, dtype, _unsupported, implementation)


def _unsupported(shape: Mapping[str, int], dtype: DTypeLike, tiles: Mapping[str, int]) -> str | None:
    from pallas_kernels.prefix_item_attention import mosaic_gpu  # Pallas takes over a second to import

    return mosaic_gpu.unsupported(shape, dtype, tiles)
