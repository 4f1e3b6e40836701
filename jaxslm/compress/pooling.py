"""From an item's token states to a fixed number of vectors: which tokens stand behind each, and their mean."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from jaxslm.config import Pooling


def segments(lengths: Int[np.ndarray, " n"], k: int, pooling: Pooling) -> Int32[np.ndarray, "n k 2"]:
    """Returns the tokens behind each of an item's k vectors, as (first, one past the last).

    "mean": segment i of n tokens is floor(i n / k) .. floor((i + 1) n / k), contiguous and equal up to one token; where
    that is empty (n < k) it is the one token floor(i n / k), so that a short item repeats tokens. "last": the last k
    tokens, one each; a shorter item repeats its first.
    """
    n, i = np.asarray(lengths, np.int64)[:, None], np.arange(k)[None]
    if pooling == "last":
        first = np.maximum(n - k + i, 0)
        ends = first + 1
    else:
        first = i * n // k
        ends = np.maximum(first + 1, (i + 1) * n // k)
    return np.stack([first, ends], axis=-1).astype(np.int32)


def pool(states_BTD: Float[Array, "B T D"], segments_BC2: Int[Array, "B C 2"]) -> Float[Array, "B C D"]:
    """Returns the mean of the states of each segment, float32. Cost: 2 C T D FLOP per item."""
    first_BC1, ends_BC1 = segments_BC2[..., :1], segments_BC2[..., 1:]
    t = jnp.arange(states_BTD.shape[1])[None, None]
    inside_BCT = (t >= first_BC1) & (t < ends_BC1)
    weights_BCT = inside_BCT / (ends_BC1 - first_BC1).astype(jnp.float32)
    return jnp.einsum("BCT,BTD->BCD", weights_BCT, states_BTD.astype(jnp.float32), precision="highest")
