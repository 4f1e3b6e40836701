"""All arrays of a pass as one, which is copied to the device at once and cut up again within the program."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32

Field = tuple[str, tuple[int, ...], np.dtype[Any]]
"""An array's name, shape and dtype."""


@jax.tree_util.register_pytree_node_class
class FlatBatch(Mapping[str, Array]):
    """A batch of a score function in one array of 32-bit words. Its fields can be read within a jitted function.

    Attributes:
        words: [N] int32, or [n, N] for n devices, each field's bytes from a word of its own on.
        fields: what stands in them, in order; static, part of what a program is compiled for.
    """

    def __init__(self, words: Int32[np.ndarray, "*devices N"] | Array, fields: tuple[Field, ...]) -> None:
        self.words, self.fields = words, fields

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, np.ndarray]]) -> "FlatBatch":
        """Returns the batches of all devices, of the same shapes, or of one device without a leading axis."""
        fields = tuple((name, array.shape, array.dtype) for name, array in batches[0].items())
        rows = [np.concatenate([_words(array) for array in batch.values()]) for batch in batches]
        return cls(rows[0] if len(rows) == 1 else np.stack(rows), fields)

    def __getitem__(self, name: str) -> Array:
        start = 0
        for field, shape, dtype in self.fields:
            size = int(np.prod(shape))
            words = -(-size * dtype.itemsize // 4)
            if field == name:
                cut = jax.lax.bitcast_convert_type(self.words[start : start + words], dtype)
                return cut.reshape(-1)[:size].reshape(shape)
            start += words
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(field == name for field, _, _ in self.fields)

    def __iter__(self) -> Iterator[str]:
        return (field for field, _, _ in self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def tree_flatten(self) -> tuple[tuple[Any], tuple[Field, ...]]:
        """The words are the one leaf."""
        return (self.words,), self.fields

    @classmethod
    def tree_unflatten(cls, fields: tuple[Field, ...], leaves: tuple[Any]) -> "FlatBatch":
        """JAX also puts placeholders where the words stand."""
        batch = object.__new__(cls)
        batch.words, batch.fields = leaves[0], fields
        return batch


def _words(array: np.ndarray) -> Int32[np.ndarray, " N"]:
    """The array's memory as words, which one of two bytes a number may fill up with a zero."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.nbytes % 4:
        flat = np.concatenate([flat, np.zeros(1, flat.dtype)])
    return flat.view(np.int32)
