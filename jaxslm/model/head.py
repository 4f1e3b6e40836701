"""Heads over normed final states. Scoring reads two rows of the vocabulary head, never all V of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxslm.model.decoder import Params

_ROWS_AT_ONCE = 256


def vocab_rows(params: Params) -> Float[Array, "V D"]:
    """The vocabulary head: `head`, or the embedding table when they are tied."""
    return params["head"] if "head" in params else params["embedding"]


def label_rows(params: Params, label_token_ids: tuple[int, int]) -> Float[Array, "2 D"]:
    """Returns the head rows of (no, yes) in float32."""
    return vocab_rows(params)[jnp.asarray(label_token_ids)].astype(jnp.float32)


def label_logits(hidden_BD: Float[Array, "B D"], rows_2D: Float[Array, "2 D"]) -> Float[Array, "B 2"]:
    """Returns the logits of (no, yes) in float32. Cost: 4 D FLOP per row."""
    return jnp.einsum("BD,LD->BL", hidden_BD.astype(jnp.float32), rows_2D, precision="highest")


def log_odds(hidden_BD: Float[Array, "B D"], rows_2D: Float[Array, "2 D"]) -> Float[Array, " B"]:
    """Returns z_yes - z_no = h . (w_yes - w_no) in float32; P(yes) is its sigmoid. Cost: 2 D FLOP per row."""
    return jnp.einsum("BD,D->B", hidden_BD.astype(jnp.float32), rows_2D[1] - rows_2D[0], precision="highest")


def vocab_logits(hidden: Float[Array, "*n D"], params: Params) -> Float[Array, "*n V"]:
    """Returns the logits of every token in float32, for training on text. Cost: 2 D V FLOP per state."""
    rows_VD = vocab_rows(params).astype(hidden.dtype)
    return jnp.einsum("...D,VD->...V", hidden, rows_VD, preferred_element_type=jnp.float32)


def log_probabilities(hidden_BD: Float[Array, "B D"], ids_BL: Int[Array, "B L"], params: Params) -> Float[Array, "B L"]:
    """Returns the log-probabilities of each row's own tokens among the whole vocabulary, float32.

    Cost: 2 D V FLOP per row.
    """
    rows_BLD = vocab_rows(params)[ids_BL].astype(jnp.float32)
    logits_BL = jnp.einsum("BD,BLD->BL", hidden_BD.astype(jnp.float32), rows_BLD, precision="highest")
    return logits_BL - log_normalisers(hidden_BD, params)[:, None]


def log_normalisers(hidden_BD: Float[Array, "B D"], params: Params) -> Float[Array, " B"]:
    """Returns log sum_v exp(z_v) over the whole vocabulary, float32: z less this is a token's log-probability.

    Cost: 2 D V FLOP per row; logits of a few hundred rows exist at a time.
    """

    def normaliser(hidden_D: Float[Array, " D"]) -> Float[Array, ""]:
        with jax.default_matmul_precision("highest"):  # as the logits that it is taken from
            return jax.nn.logsumexp(vocab_logits(hidden_D, params))

    return jnp.asarray(jax.lax.map(normaliser, hidden_BD, batch_size=_ROWS_AT_ONCE))
