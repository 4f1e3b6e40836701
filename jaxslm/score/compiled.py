"""The compiled scoring function and the engine that feeds it: packed requests in, label logits out."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float32

from jaxslm.compress.splice import splice
from jaxslm.config import BucketConfig, RankerConfig
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.head import label_logits, label_rows, log_normalisers
from jaxslm.model.layout import Layout, Rows, SharedPrefix
from jaxslm.score.buckets import default_buckets
from jaxslm.score.packing import Forward, Packer, PackRequest, empty_forward
from jaxslm.score.parallel import parallelise, replicate, scoring_devices

Batch = Mapping[str, Any]
"""Arrays by name, on the host or on the device."""

ScoreFn = jax.stages.Wrapped
"""A jitted `(params, batch) -> logits`: call it, or `lower` it."""


def compute_dtype() -> jnp.dtype:
    """The number type of this machine's accelerator: bfloat16 on GPU and TPU, float32 on CPU."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def make_score_fn(
    config: RankerConfig,
    devices: Sequence[jax.Device] | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
    *,
    whole_vocabulary: bool = False,
) -> ScoreFn:
    """Returns the jitted, pure `score_fn(params, batch) -> logits`, which compiles once per shape.

    A packed batch is `{"tokens": int [M], "prefix": int [R, P], "items": int [R, J, T]}` as `jaxslm.score.packing`
    makes it, and `"vectors": float [R, J, C, D]` if items begin with embedding tokens; the logits are float32
    [R, J, 2] of (no, yes) after each item's last token. A padded batch is `{"tokens": int [B, T], "valid": bool
    [B, T]}`, rows of a whole prompt each; the logits are [B, 2]. An item's logits do not depend on what else is in the
    batch, on its slot or on where padding stands.

    Args:
        devices: with n > 1 of them, every array of the batch and the logits have a leading axis [n], one part for each
            device, and the parameters must be on all of them (`jaxslm.score.parallel.replicate`). One device if None.
        dtype: compute dtype; `compute_dtype()` if None.
        implementation: of the ops that have kernels: "xla", "mosaic_gpu", or None for the fastest one measured on this
            device (`pallas_kernels.dispatch.explain` says which). Tracing raises ValueError if it cannot run.
        whole_vocabulary: the logits are log-probabilities among all tokens: their difference is the same up to
            rounding, and each costs 2 D V FLOP more.
    """
    used = tuple(devices) if devices is not None else tuple(jax.local_devices()[:1])
    return _make_score_fn(config, used, jnp.dtype(dtype or compute_dtype()), implementation, whole_vocabulary)


@cache
def _make_score_fn(
    config: RankerConfig,
    devices: tuple[jax.Device, ...],
    dtype: jnp.dtype,
    implementation: str | None,
    whole_vocabulary: bool,
) -> ScoreFn:
    decoder = Decoder(config.model, dtype, implementation=implementation)

    def score(params: Params, batch: Batch) -> Array:
        x: Array = decoder.apply({"params": params}, jnp.asarray(batch["tokens"]), method=Decoder.embed)  # type: ignore[assignment]
        layout: Layout
        if "valid" in batch:
            layout = Rows(jnp.asarray(batch["valid"]))
        else:
            items_RJT = jnp.asarray(batch["items"])
            layout = SharedPrefix(jnp.asarray(batch["prefix"]), items_RJT, x.shape[0], implementation)
            if "vectors" in batch:
                x = splice(x, jnp.asarray(batch["vectors"]), items_RJT)
        hidden: Array = decoder.apply({"params": params}, x, layout, method=Decoder.decode)  # type: ignore[assignment]
        hidden_BD = hidden.reshape(-1, hidden.shape[-1])
        logits = label_logits(hidden_BD, label_rows(params, config.label_token_ids))
        if whole_vocabulary:
            logits -= log_normalisers(hidden_BD, params)[:, None]
        return logits.reshape(*hidden.shape[:-1], 2)

    return parallelise(score, devices)


class CompiledScorer:
    """Parameters on their devices, a bucket configuration, and the compiled function for each bucket.

    Attributes:
        params: the parameters in the compute dtype, a copy on each device.
    """

    def __init__(
        self,
        config: RankerConfig,
        params: Params,
        *,
        dtype: DTypeLike | None = None,
        devices: Sequence[jax.Device] | None = None,
        buckets: BucketConfig | None = None,
        implementation: str | None = None,
        whole_vocabulary: bool = False,
    ) -> None:
        """Returns a scorer; nothing is compiled yet.

        Args:
            devices: all local accelerators if None.
            buckets: `default_buckets` of the platform if None.
            dtype, implementation, whole_vocabulary: as in `make_score_fn`.
        """
        self.config = config
        self.devices = tuple(devices) if devices is not None else tuple(scoring_devices())
        self.dtype = jnp.dtype(dtype or compute_dtype())
        self.buckets = buckets or default_buckets(self.devices[0].platform)
        self.params: Params = replicate(jax.tree.map(lambda leaf: leaf.astype(self.dtype), params), self.devices)
        self.score_fn = make_score_fn(
            config, self.devices, self.dtype, implementation, whole_vocabulary=whole_vocabulary
        )
        self.packer = Packer(self.buckets)

    def logits(self, requests: Sequence[PackRequest]) -> Float32[np.ndarray, "n 2"]:
        """Returns the logits of (no, yes) of every item of every request, in order. Requests share forward passes.

        Raises:
            InputError: an item without tokens, or one that no bucket holds.
        """
        logits = np.empty((sum(len(request.item_ids) for request in requests), 2), np.float32)
        # Dispatch is asynchronous: the device computes one pass while the host packs the next, and nothing is waited
        # for until all are queued.
        queued = [(group, self.dispatch(group)) for group in self.packer.pack(requests, len(self.devices))]
        for group, result in queued:
            self.collect(group, result, logits)
        return logits

    def dispatch(self, group: Sequence[Forward]) -> Array:
        """Queues passes of one bucket, one per device, and returns their logits to come."""
        if len(self.devices) == 1:
            return self.score_fn(self.params, self._arrays(group[0]))
        empty = [empty_forward(group[0].bucket, group[0].vectors)] * (len(self.devices) - len(group))
        batches = [self._arrays(forward) for forward in (*group, *empty)]
        return self.score_fn(self.params, {name: np.stack([batch[name] for batch in batches]) for name in batches[0]})

    def _arrays(self, forward: Forward) -> dict[str, np.ndarray]:
        """The pass's arrays; vectors in the compute dtype, whatever they are stored in, so that one program serves."""
        batch = forward.batch
        return batch | {"vectors": batch["vectors"].astype(self.dtype)} if "vectors" in batch else batch

    def collect(self, group: Sequence[Forward], result: Array, logits: np.ndarray) -> None:
        """Waits for a result of `dispatch` and puts its rows where they belong in `logits` [n, 2]."""
        parts = np.asarray(result).reshape(len(self.devices), -1, 2)
        for forward, part in zip(group, parts, strict=False):
            logits[forward.indices] = part[forward.places]

    def empty_batches(self) -> Iterable[tuple[Forward, ...]]:
        """Yields one empty group per bucket: what warm-up compiles with."""
        for bucket in self.buckets.buckets:
            shape = (bucket.rows, bucket.items_per_row, bucket.vectors_per_item, self.config.model.width)
            vectors = np.zeros(shape, np.float32) if bucket.vectors_per_item else None
            yield (empty_forward(bucket, vectors),)
