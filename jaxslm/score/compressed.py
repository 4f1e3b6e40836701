"""Scoring items by their embedding tokens: from vectors of any numbers per item to packed requests and back."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from jaxslm.compress.splice import MixedPrompt
from jaxslm.config import CompressorConfig
from jaxslm.errors import InputError
from jaxslm.prompt import Prompt
from jaxslm.score.compiled import CompiledScorer
from jaxslm.score.forward import PackRequest

Vectors = Sequence[Float[np.ndarray, "_ _"]] | Float[np.ndarray, "J C D"]
"""The embedding tokens of each item, [C, D]; C may differ between items."""


Part = tuple[Sequence[int], PackRequest]
"""Items of a request that a forward pass can hold together, and their places in the request."""


@dataclass(frozen=True)
class VectorRequest:
    """A query with items as embedding tokens.

    Attributes:
        vectors: per item [C, D].
        texts: per item what stays text beside them (`jaxslm.compress.splice.text_of`), for compressors that want it.
    """

    query: str
    vectors: Vectors
    texts: Sequence[str] | None = None


class VectorScorer:
    """Scores vectors with a compiled scorer whose buckets have room for them."""

    def __init__(self, scorer: CompiledScorer, prompt: Prompt, config: CompressorConfig) -> None:
        """Args: scorer, prompt: the ranker's. config: of the compressor that the ranker was trained with."""
        self._scorer, self._config = scorer, config
        self._mixed = MixedPrompt(prompt, config)

    @property
    def reads_texts(self) -> bool:
        """Whether the compressor wants text beside an item's vectors."""
        return bool(self._config.text_fields)

    def logits(self, requests: Sequence[VectorRequest]) -> list[Float32[np.ndarray, "_ 2"]]:
        """Returns the logits of (no, yes) of each request's items; requests share forward passes.

        Raises:
            InputError: an empty query, no items, vectors of another width, of a number that was not trained or with
                values that are not finite, missing texts, or a row beyond the prompt's `max_tokens`.
        """
        return logits_of_parts(self._scorer, [(len(request.vectors), self.pack(request)) for request in requests])

    def pack(self, request: VectorRequest) -> list[Part]:
        """Returns a request in token ids, one part for each number of vectors.

        Raises:
            InputError: as `logits`.
        """
        ks = self._checked_ks(request)
        prefix, items = self._mixed.encode(request.query, ks, request.texts)
        parts: list[Part] = []
        for k in sorted(set(ks)):
            places = [place for place, each in enumerate(ks) if each == k]
            vectors = _finite(request.vectors, places)
            parts.append((places, PackRequest(prefix, [items[place] for place in places], vectors)))
        return parts

    def _checked_ks(self, request: VectorRequest) -> list[int]:
        if not len(request.vectors):
            raise InputError("items: a request needs at least one")
        for number, vectors in enumerate(request.vectors):
            if vectors.ndim != 2 or vectors.shape[1] != self._config.width:
                raise InputError(
                    f"item {number}: vectors {list(vectors.shape)}, the ranker reads width {self._config.width}"
                )
            if len(vectors) not in self._config.ks:
                known = ", ".join(map(str, self._config.ks))
                raise InputError(f"item {number}: {len(vectors)} vectors, the compressor was trained for {known}")
        return [len(vectors) for vectors in request.vectors]


def _finite(vectors: Vectors, places: Sequence[int]) -> Float32[np.ndarray, "n C D"]:
    """Returns the vectors of these items; raises InputError for a NaN, which padding would carry to other items."""
    stacked = np.stack([np.asarray(vectors[place], np.float32) for place in places])
    if not np.isfinite(stacked).all():
        first = int(np.argmin(np.isfinite(stacked).all(axis=(1, 2))))
        raise InputError(f"item {places[first]}: vectors must be finite")
    return stacked


def logits_of_parts(
    scorer: CompiledScorer, requests: Sequence[tuple[int, Sequence[Part]]]
) -> list[Float32[np.ndarray, "_ 2"]]:
    """Returns the logits of (no, yes) of each request's items, 0 where no part has them; requests share forward passes.

    Args:
        requests: the number of items of each, and its parts.
    """
    answers = [np.zeros((num_items, 2), np.float32) for num_items, _ in requests]
    alike: dict[int, list[tuple[int, Sequence[int], PackRequest]]] = defaultdict(list)
    for number, (_, parts) in enumerate(requests):
        for places, part in parts:
            alike[part.vectors_per_item].append((number, places, part))
    for group in alike.values():  # a forward pass has one number of vectors per item
        logits = scorer.logits([part for _, _, part in group])
        ends = np.cumsum([len(places) for _, places, _ in group])
        for (number, places, _), values in zip(group, np.split(logits, ends[:-1]), strict=True):
            answers[number][places] = values
    return answers
