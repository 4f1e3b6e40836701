"""Where embedding tokens enter the ranker: they replace the first C tokens of an item."""

from jaxtyping import Array, Float, Int


def splice(
    x_MD: Float[Array, "M D"], vectors_RJCD: Float[Array, "R J C D"], items_RJT: Int[Array, "R J T"]
) -> Float[Array, "M D"]:
    """Returns input embeddings in which each item's first C tokens are its vectors, cast to the dtype of x.

    Args:
        x_MD: embeddings of packed tokens, placeholders included. items_RJT: index of each item token, M where none.
    """
    places_RJC = items_RJT[:, :, : vectors_RJCD.shape[2]]
    return x_MD.at[places_RJC].set(vectors_RJCD.astype(x_MD.dtype), mode="drop")
