"""Scoring: a ranker loaded from a checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxslm.checkpoint import Checkpoint, load_checkpoint
from jaxslm.config import BucketConfig, Calibration
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from jaxslm.prompt import EncodedRequest
from jaxslm.score.buckets import default_buckets, few_buckets, with_vectors
from jaxslm.score.compiled import CompiledScorer, compute_dtype, make_score_fn
from jaxslm.score.compressed import VectorRequest, VectorScorer
from jaxslm.score.forward import PackRequest, Vectors
from jaxslm.score.parallel import scoring_devices
from jaxslm.score.warmup import warm_up

__all__ = ["Ranker", "Scores", "VectorRequest", "compute_dtype", "load", "load_few_shapes", "make_score_fn"]


@dataclass(frozen=True)
class Scores:
    """Scores of one request, in the order of its items: `logits` float32 [J, 2] of (no, yes), `truncated` per item.

    `calibration` is the checkpoint's, None if it has none.
    """

    logits: np.ndarray
    truncated: list[bool]
    calibration: Calibration | None = None

    @property
    def log_odds(self) -> np.ndarray:
        """z_yes - z_no, float32 [J]."""
        return self.logits[:, 1] - self.logits[:, 0]

    @property
    def probabilities(self) -> np.ndarray:
        """P(yes) = sigmoid(log-odds), float32 [J] in [0, 1]."""
        return Calibration().apply(self.log_odds).astype(np.float32)

    @property
    def calibrated(self) -> np.ndarray:
        """Calibrated P(yes), float32 [J] in [0, 1]; raises InputError if the checkpoint carries no calibration."""
        if self.calibration is None:
            raise InputError("this checkpoint carries no calibration: `jaxslm calibrate` makes one that does")
        return self.calibration.apply(self.log_odds).astype(np.float32)


class Ranker:
    """A checkpoint ready to score on this machine. Parameters are cast once to the compute dtype."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: DTypeLike | None = None,
        devices: Sequence[jax.Device] | None = None,
        buckets: BucketConfig | None = None,
    ) -> None:
        """Args as `load`."""
        self.manifest = checkpoint.manifest
        self.config = checkpoint.config
        self.prompt = checkpoint.prompt
        compressor = self.manifest.compressor
        if compressor is not None:
            platform = scoring_devices(devices)[0].platform
            shapes = buckets or default_buckets(platform)
            buckets = with_vectors(shapes, platform, compressor, self.config.prompt.max_tokens)
        self.scorer = CompiledScorer(self.config, checkpoint.params, dtype=dtype, devices=devices, buckets=buckets)
        self.vector_scorer = VectorScorer(self.scorer, self.prompt, compressor) if compressor is not None else None

    @property
    def params(self) -> Params:
        """Parameters in the compute dtype."""
        return self.scorer.params

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return self.scorer.dtype

    @property
    def required_vector_scorer(self) -> VectorScorer:
        """What scores embedding tokens; raises InputError if the checkpoint has no compressor."""
        if self.vector_scorer is None:
            raise InputError("this ranker reads no embedding tokens: `jaxslm train compressor` makes one that does")
        return self.vector_scorer

    @property
    def label_token_ids(self) -> tuple[int, int]:
        """Token ids of (no, yes)."""
        return self.config.label_token_ids

    def score(self, query: str, items: Sequence[str | Item]) -> np.ndarray:
        """Returns P(yes) for each item, float32 in [0, 1], in the order given.

        An item's score does not depend on the other items. Texts beyond the prompt's `max_tokens` are cut;
        `score_request` says which.

        Raises:
            InputError: an empty query, no items, an item without text, or a query that leaves no room for items; one
                text in place of a sequence, or something that is no text.
        """
        return self.score_request(query, items).probabilities

    def log_odds(self, query: str, items: Sequence[str | Item]) -> np.ndarray:
        """Returns z_yes - z_no for each item, float32: the order of `score` without ties near 0 and 1; raises as it."""
        return self.score_request(query, items).log_odds

    def score_request(self, query: str, items: Sequence[str | Item]) -> Scores:
        """Returns logits and truncation flags of one request; raises as `score`."""
        return self.score_encoded(self.prompt.encode(query, items))

    def score_encoded(self, request: EncodedRequest) -> Scores:
        """Returns the scores of a request that `Prompt.encode` built."""
        return self.score_many([request])[0]

    def score_many(self, requests: Sequence[EncodedRequest]) -> list[Scores]:
        """Returns the scores of several encoded requests, which share forward passes; none for none."""
        if not requests:
            return []
        logits = self.scorer.logits([PackRequest(request.prefix_ids, request.item_ids) for request in requests])
        ends = np.cumsum([len(request.item_ids) for request in requests])
        parts = np.split(logits, ends[:-1])
        calibration = self.manifest.calibration
        return [Scores(part, request.truncated, calibration) for part, request in zip(parts, requests, strict=True)]

    def score_vectors(self, query: str, vectors: Vectors, texts: Sequence[str] | None = None) -> Scores:
        """Returns the scores of items that are given as embedding tokens, [C, D] each.

        Args:
            vectors: from the compressor of this very checkpoint; `jaxslm.items.lookup` refuses others.
            texts: what stays text beside them, for compressors that have `text_fields`.

        Raises:
            InputError: as `VectorScorer.logits`, or the checkpoint has no compressor.
        """
        return self.score_vectors_many([VectorRequest(query, vectors, texts)])[0]

    def score_vectors_many(self, requests: Sequence[VectorRequest]) -> list[Scores]:
        """Returns the scores of several requests, which share forward passes; raises as `score_vectors`."""
        calibration, scorer = self.manifest.calibration, self.required_vector_scorer
        return [Scores(logits, [False] * len(logits), calibration) for logits in scorer.logits(requests)]

    def label_logits(self, rows: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Returns the last token's logits of (no, yes) for rows of token ids, float32 [rows, 2]; adds no template.

        Args:
            rows: each a sequence or array of whole numbers; lengths may differ.

        Raises:
            InputError: no rows, a row of something else, an empty or too long row, or an id outside the vocabulary.
        """
        if len(rows) == 0:
            raise InputError("rows: at least one is needed")
        vocab_size, longest = self.config.model.vocab_size, self.scorer.packer.longest_item
        checked = []
        for number, row in enumerate(rows):
            ids = _token_ids(number, row)
            if len(ids) > longest:
                raise InputError(f"row of {len(ids)} tokens: the longest that is compiled for is {longest}")
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise InputError(f"row {number}: a token id is outside 0..{vocab_size - 1}")
            checked.append(ids.tolist())
        return self.scorer.logits([PackRequest([], checked)])

    def warm_up(self, done: Callable[[int, int], None] | None = None) -> float:
        """Compiles every bucket, so that no request waits for it; see `jaxslm.score.warmup.warm_up`."""
        return warm_up(self.scorer, done)


def _token_ids(number: int, row: Any) -> np.ndarray:
    """Returns a row as an array; raises InputError unless it is a sequence of whole numbers, at least one."""
    try:
        ids = np.asarray(row)
    except ValueError:  # parts of unequal lengths
        ids = np.asarray(None)
    if ids.ndim == 1 and len(ids) == 0:
        raise InputError(f"row {number}: has no tokens")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"row {number}: must be a sequence of token ids, whole numbers")
    return ids


def load(
    path: str | Path,
    dtype: DTypeLike | None = None,
    devices: Sequence[jax.Device] | None = None,
    buckets: BucketConfig | None = None,
) -> Ranker:
    """Returns the ranker of a checkpoint folder.

    Args:
        dtype: compute dtype: float32, bfloat16 or float16; float32 on CPU and bfloat16 elsewhere if None.
        devices: where to score; all local accelerators, or the CPU, if None.
        buckets: the shapes to compile, fitted to the traffic; those of `default_buckets` if None. Shapes for embedding
            tokens are added if they have none for any and the checkpoint reads them.

    Raises:
        InputError: no checkpoint there, another format version, a damaged one, another dtype, or an empty list of
            devices.
    """
    return Ranker(load_checkpoint(Path(path)), dtype, devices, buckets)


def load_few_shapes(path: str | Path, dtype: DTypeLike | None = None) -> Ranker:
    """Returns the ranker of a checkpoint folder with the shapes of `few_buckets`, for a program that scores one run.

    Args:
        dtype: as in `load`.

    Raises:
        InputError: as `load`.
    """
    checkpoint = load_checkpoint(Path(path))
    buckets = few_buckets(jax.default_backend(), checkpoint.config, checkpoint.manifest.compressor)
    return Ranker(checkpoint, dtype, buckets=buckets)
