"""Records with random vectors and a fast encoder, without JAX: processes that tests start import this too."""

import hashlib
from collections.abc import Sequence

import numpy as np

from jaxslm.compress.catalogue import source_sha256
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.items.record import Record, RecordIdentity, StorageDtype, pack_record

DTYPES: tuple[StorageDtype, ...] = ("float32", "bfloat16", "int8", "float8_e4m3")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def identity(encoder: str = "encoder", ranker: str = "ranker", template: str = "template") -> RecordIdentity:
    return RecordIdentity(sha256(encoder), sha256(ranker), sha256(template))


def record(seed: int = 0, c: int = 8, d: int = 64, of: RecordIdentity | None = None) -> Record:
    vectors = np.random.default_rng(seed).standard_normal((c, d), np.float32)
    return Record(of or identity(), vectors, sha256(f"text {seed}"))


def packed(
    seed: int = 0, c: int = 8, d: int = 64, dtype: StorageDtype = "int8", of: RecordIdentity | None = None
) -> bytes:
    return pack_record(record(seed, c, d, of), dtype)


def items(count: int, start: int = 0) -> list[Item]:
    """Items of 1 to 40 words."""
    return [
        Item(id=f"item-{n}", title=f"title {n}", text=" ".join(["word"] * (1 + n * 7 % 40)))
        for n in range(start, start + count)
    ]


class FakeEncoder:
    """Vectors drawn from the hash of an item's text; refuses the texts that `refused` names.

    Attributes:
        batches: the numbers of items of the calls of `encode_all`.
    """

    def __init__(
        self,
        of: RecordIdentity | None = None,
        width: int = 16,
        refused: str = "broken",
        ks: tuple[int, ...] = (1, 2, 4, 8, 16),
    ) -> None:
        self.identity, self.ks = of or identity(), ks
        self.width, self.refused = width, refused
        self.batches: list[int] = []

    def token_counts(self, items: Sequence[Item]) -> list[int]:
        for number, item in enumerate(items):
            if not item.text.strip():
                raise InputError(f"item {number}: has no text")
        return [len(item.text.split()) for item in items]

    def pass_shape(self, tokens: int) -> tuple[int, int]:
        length = 1 << max(2, (tokens - 1).bit_length())
        return 256 // length, length

    def encode_all(self, items: Sequence[Item]) -> dict[int, np.ndarray]:
        self.batches.append(len(items))
        if any(item.text == self.refused for item in items):
            raise InputError("it is broken")
        return {k: np.stack([self.vectors(item, k) for item in items]) for k in self.ks}

    def vectors(self, item: Item, k: int) -> np.ndarray:
        seed = int(source_sha256(item)[:8], 16)
        return np.random.default_rng([seed, k]).standard_normal((k, self.width), np.float32)
