"""Scoring items by their embedding tokens: from vectors of any numbers per item to packed requests and back."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from jaxslm.compress.splice import MixedPrompt
from jaxslm.config import CompressorConfig
from jaxslm.errors import InputError
from jaxslm.prompt import Prompt
from jaxslm.score.compiled import CompiledScorer
from jaxslm.score.forward import PackRequest, Vectors

Part = tuple[Sequence[int], PackRequest]
"""Items of a request that a forward pass can hold together, and their places in the request."""


@dataclass(frozen=True)
class VectorRequest:
    """A query with items as embedding tokens.

    Attributes:
        vectors: per item [C, D]; C may differ between items.
        texts: per item what stays text beside them (`jaxslm.compress.splice.text_of`), for compressors that want it.
        numbers: what messages call the items, where they are some of a request's; 0, 1, .. if None.
    """

    query: str
    vectors: Vectors
    texts: Sequence[str] | None = None
    numbers: Sequence[int] | None = None


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
            InputError: as `pack`, or vectors that are not finite: padding would carry a NaN to other items.
        """
        for request in requests:
            for number, vectors in enumerate(request.vectors):
                if not np.isfinite(vectors).all():
                    raise InputError(f"item {number}: vectors must be finite")
        return logits_of_parts(self._scorer, [(len(request.vectors), self.pack(request)) for request in requests])

    def pack(self, request: VectorRequest) -> list[Part]:
        """Returns a request in token ids, one part for each number of vectors, which must be finite.

        Raises:
            InputError: an empty query, no items, vectors of another width or of a number that was not trained,
                missing texts, or a row beyond the prompt's `max_tokens`.
        """
        ks = self._checked_ks(request)
        prefix, items = self._mixed.encode(request.query, ks, request.texts)
        parts: list[Part] = []
        for k in sorted(set(ks)):
            places = [place for place, each in enumerate(ks) if each == k]
            parts.append((places, PackRequest(prefix, items, request.vectors).items_at(places)))
        return parts

    def _checked_ks(self, request: VectorRequest) -> list[int]:
        if not len(request.vectors):
            raise InputError("items: a request needs at least one")
        numbers = range(len(request.vectors)) if request.numbers is None else request.numbers
        for number, vectors in zip(numbers, request.vectors, strict=True):
            if vectors.ndim != 2 or vectors.shape[1] != self._config.width:
                raise InputError(
                    f"item {number}: vectors {list(vectors.shape)}, the ranker reads width {self._config.width}"
                )
            if len(vectors) not in self._config.ks:
                known = ", ".join(map(str, self._config.ks))
                raise InputError(f"item {number}: {len(vectors)} vectors, the compressor was trained for {known}")
        return [len(vectors) for vectors in request.vectors]


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
