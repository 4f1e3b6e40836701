"""What goes into a forward pass: requests in token ids, and passes as the arrays that the compiled function takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int, Int32

from jaxslm.config import Bucket

OVERRIDES = -1
"""The kind of requests whose vectors may stand anywhere."""

Vectors = Sequence[Float[np.ndarray, "_ _"]] | Float[np.ndarray, "_ _ _"]
"""The embedding tokens of each item, [C, D], in a list or an array."""

MAX_LABEL_IDS = 16
"""Tokens whose log-probabilities one item may ask for."""


@dataclass(frozen=True)
class PackRequest:
    """One request in token ids.

    Attributes:
        prefix_ids: what all items share; may be empty. item_ids: the tokens of each item, at least one each.
        vectors: embeddings that replace tokens of each item, if any; as many for each. A list of arrays costs no more
            than one array: they are copied once, to their places in a pass.
        vector_places: which of an item's tokens they replace, -1 for none; its first C if None.
        label_ids: tokens, MAX_LABEL_IDS at most, whose log-probabilities among the whole vocabulary are asked for too.
    """

    prefix_ids: Sequence[int]
    item_ids: Sequence[Sequence[int]]
    vectors: Vectors | None = None
    vector_places: Int[np.ndarray, "J C"] | None = None
    label_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """All tokens, the prefix once."""
        return len(self.prefix_ids) + sum(map(len, self.item_ids))

    @property
    def vectors_per_item(self) -> int:
        """C, 0 without vectors."""
        return 0 if self.vectors is None else len(self.vectors[0])

    @property
    def kind(self) -> int:
        """Requests of one kind can share a pass: the number of vectors per item, or OVERRIDES, however many."""
        return self.vectors_per_item if self.vector_places is None else OVERRIDES

    def items_at(self, places: Sequence[int] | Int[np.ndarray, " n"]) -> "PackRequest":
        """Returns the request with these of its items alone."""
        return replace(
            self,
            item_ids=[self.item_ids[place] for place in places],
            vectors=None if self.vectors is None else [self.vectors[place] for place in places],
            vector_places=None if self.vector_places is None else self.vector_places[places],
        )


def values_per_item(requests: Sequence[PackRequest]) -> int:
    """Returns how many numbers each item gets when these are scored together: two logits and what `label_ids` ask."""
    return 2 + (MAX_LABEL_IDS if any(request.label_ids for request in requests) else 0)


@dataclass(frozen=True)
class Forward:
    """One bucket filled with items.

    Attributes:
        bucket: the shape. tokens: [M] int32, zero where there is padding.
        prefix: [R, P], items: [R, J, T]: index of each token in `tokens`, M where there is none.
        vectors: [R, J, C, D] if the bucket has vectors. vector_places: where they go in `tokens`, M for none, unless
            they are each item's first ones.
        places: for each item held, its slot in the flattened [R, J]. indices: its number among all items of the input.
        real_tokens: how many of the M places are filled.
        label_ids: tokens that each item asks for, the last one repeated to fill the row, -1 where it asks for none;
            None if no item does.
    """

    bucket: Bucket
    tokens: Int32[np.ndarray, " M"]
    prefix: Int32[np.ndarray, "R P"]
    items: Int32[np.ndarray, "R J T"]
    vectors: Float[np.ndarray, "R J C D"] | None
    places: Int[np.ndarray, " held"]
    indices: Int[np.ndarray, " held"]
    real_tokens: int
    label_ids: Int32[np.ndarray, "held L"] | None = None
    vector_places: Int32[np.ndarray, "R J C"] | None = None

    @cached_property
    def asking(self) -> Int[np.ndarray, " asking"]:
        """Numbers, among the items held, of those that ask for log-probabilities."""
        return np.zeros(0, np.int64) if self.label_ids is None else np.flatnonzero(self.label_ids[:, 0] >= 0)

    @property
    def batch(self) -> dict[str, np.ndarray]:
        """The arrays that the compiled function takes."""
        batch = {"tokens": self.tokens, "prefix": self.prefix, "items": self.items}
        more = {"vectors": self.vectors, "vector_places": self.vector_places}
        return batch | {name: array for name, array in more.items() if array is not None}


def empty_forward(bucket: Bucket, vectors: np.ndarray | None = None) -> Forward:
    """Returns a pass without items: what a device computes when it has nothing to do, and what warm-up compiles with.

    Args:
        vectors: vectors of another pass of the bucket, whose shape and dtype the empty ones get.
    """
    M, R, J, none = bucket.tokens, bucket.rows, bucket.items_per_row, np.zeros(0, np.int64)
    return Forward(
        bucket,
        np.zeros(M, np.int32),
        np.full((R, bucket.prefix_tokens), M, np.int32),
        np.full((R, J, bucket.item_tokens), M, np.int32),
        None if vectors is None else np.zeros_like(vectors),
        none,
        none,
        0,
        vector_places=np.full((R, J, bucket.vector_places), M, np.int32) if bucket.overrides_per_item else None,
    )
