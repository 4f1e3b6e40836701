"""The arrays of a pass as one, which is copied to the device at once and cut up again within the program."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32

Field = tuple[str, tuple[int, ...], np.dtype[Any]]
"""An array's name, shape and dtype."""


APART_BYTES = 1 << 20
"""An array of so many bytes stays by itself: a copy of it on the host takes longer than one transfer more (10 ms for 30
MB of vectors on two cores, and dispatching eight arrays in place of one takes 0.1)."""


@jax.tree_util.register_pytree_node_class
class FlatBatch(Mapping[str, Array]):
    """A batch of a score function in one array of 32-bit words. Its fields can be read within a jitted function.

    Attributes:
        words: [N] int32, or [n, N] for n devices, each field's bytes from a word of its own on.
        fields: what stands in them, in order; static, part of what a program is compiled for.
        apart: large arrays, by name, which do not stand in them.
    """

    def __init__(
        self, words: Int32[np.ndarray, "*devices N"] | Array, fields: tuple[Field, ...], apart: Mapping[str, Any]
    ) -> None:
        self.words, self.fields, self.apart = words, fields, apart

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, np.ndarray]]) -> "FlatBatch":
        """Returns the batches of all devices, of the same shapes, or of one device without a leading axis."""
        large = [name for name, array in batches[0].items() if array.nbytes >= APART_BYTES]
        fields = tuple((name, array.shape, array.dtype) for name, array in batches[0].items() if name not in large)
        rows = [np.concatenate([_words(batch[name]) for name, _, _ in fields]) for batch in batches]
        return cls(_stacked(rows), fields, {name: _stacked([batch[name] for batch in batches]) for name in large})

    def __getitem__(self, name: str) -> Array:
        if name in self.apart:
            return self.apart[name]
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
        return any(each == name for each in self)

    def __iter__(self) -> Iterator[str]:
        return iter([*(field for field, _, _ in self.fields), *self.apart])

    def __len__(self) -> int:
        return len(self.fields) + len(self.apart)

    def tree_flatten(self) -> tuple[tuple[Any, Mapping[str, Any]], tuple[Field, ...]]:
        """The words and what is apart from them are the leaves."""
        return (self.words, self.apart), self.fields

    @classmethod
    def tree_unflatten(cls, fields: tuple[Field, ...], leaves: tuple[Any, Any]) -> "FlatBatch":
        """JAX also puts placeholders where the arrays stand."""
        batch = object.__new__(cls)
        batch.words, batch.apart, batch.fields = *leaves, fields
        return batch


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Those of all devices as one; of one device as it is."""
    return arrays[0] if len(arrays) == 1 else np.stack(arrays)


def _words(array: np.ndarray) -> Int32[np.ndarray, " N"]:
    """The array's memory as words, which one of two bytes a number may fill up with a zero."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.nbytes % 4:
        flat = np.concatenate([flat, np.zeros(1, flat.dtype)])
    return flat.view(np.int32)
