"""The compiled scoring function and the engine that feeds it: packed requests in, label logits out."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float32

from jaxslm.compress.splice import override, splice
from jaxslm.config import Bucket, BucketConfig, RankerConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.head import label_logits, label_rows, log_probabilities
from jaxslm.model.layout import Layout, Rows, SharedPrefix
from jaxslm.score.buckets import default_buckets
from jaxslm.score.flat import FlatBatch
from jaxslm.score.forward import MAX_LABEL_IDS, Forward, PackRequest, empty_forward, values_per_item
from jaxslm.score.packing import Packer
from jaxslm.score.parallel import parallelise, replicate, scoring_devices
from pallas_kernels.dispatch import XLA

Batch = Mapping[str, Any]
"""Arrays by name, on the host or on the device."""

Result = tuple[Array, ...]
"""Logits, and log-probabilities of those items that ask for some, LABEL_ROWS at a time; all on the device."""

LABEL_ROWS = 32
"""Items whose log-probabilities are computed together."""

COMPUTE_DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))
"""What a ranker may compute in; `--dtype` and settings offer the first two."""

ScoreFn = jax.stages.Wrapped
"""A jitted function of `(params, batch)`: call it, or `lower` it."""


def compute_dtype(platform: str | None = None) -> jnp.dtype:
    """The number type of a platform, JAX's default one if None: bfloat16 on GPU and TPU, float32 on CPU."""
    return jnp.dtype(jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16)


def checked_dtype(dtype: DTypeLike | None, platform: str) -> jnp.dtype:
    """Returns the compute dtype asked for, the platform's if None; raises InputError for one that holds no logits."""
    try:
        used = compute_dtype(platform) if dtype is None else jnp.dtype(dtype)
    except TypeError:
        used = None
    if used not in COMPUTE_DTYPES:
        known = ", ".join(each.name for each in COMPUTE_DTYPES)
        raise InputError(f"dtype {dtype if used is None else used.name}: scores are computed in {known}")
    return used


def make_score_fn(
    config: RankerConfig,
    devices: Sequence[jax.Device] | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
    *,
    with_states: bool = False,
) -> ScoreFn:
    """Returns the jitted, pure `score_fn(params, batch) -> logits`, which compiles once per shape.

    A packed batch is `{"tokens": int [M], "prefix": int [R, P], "items": int [R, J, T]}` as `jaxslm.score.packing`
    makes it, and `"vectors": float [R, J, C, D]` if items begin with embedding tokens, or if vectors replace the tokens
    at `"vector_places": int [R, J, C]`; the logits are float32 [R, J, 2] of (no, yes) after each item's last token. A
    padded batch is `{"tokens": int [B, T], "valid": bool [B, T]}`, rows of a whole prompt each; the logits are [B, 2].
    An item's logits do not depend on what else is in the batch, on its slot or on where padding stands.

    Args:
        devices: with n > 1 of them, every array of the batch and the logits have a leading axis [n], one part for each
            device, and the parameters must be on all of them (`jaxslm.score.parallel.replicate`). All local
            accelerators if None; on a CPU one device, which uses all cores.
        dtype: compute dtype, one of COMPUTE_DTYPES (InputError otherwise); `compute_dtype` of the devices' platform if
            None.
        implementation: of the ops that have kernels: "xla", "mosaic_gpu", or None for the fastest one measured on this
            device (`pallas_kernels.dispatch.explain` says which). Tracing raises ValueError if it cannot run.
        with_states: returns `(logits, states)`: beside the logits the final states [R, J, D] or [B, D] that they are
            read from, in the compute dtype; what `make_log_prob_fn` takes.
    """
    used = tuple(scoring_devices(devices))
    platform = used[0].platform
    if implementation is None and platform == "cpu" and jax.default_backend() != "cpu":
        implementation = XLA  # kernels are chosen for the default device, which runs nothing of this
    return _make_score_fn(config, used, checked_dtype(dtype, platform), implementation, with_states)


@cache
def _make_score_fn(
    config: RankerConfig,
    devices: tuple[jax.Device, ...],
    dtype: jnp.dtype,
    implementation: str | None,
    with_states: bool,
) -> ScoreFn:
    decoder = Decoder(config.model, dtype, implementation=implementation)

    def score(params: Params, batch: Batch) -> Array | tuple[Array, Array]:
        x: Array = decoder.apply({"params": params}, jnp.asarray(batch["tokens"]), method=Decoder.embed)  # type: ignore[assignment]
        layout: Layout
        if "valid" in batch:
            layout = Rows(jnp.asarray(batch["valid"]))
        else:
            items_RJT = jnp.asarray(batch["items"])
            layout = SharedPrefix(jnp.asarray(batch["prefix"]), items_RJT, x.shape[0], implementation)
            if "vector_places" in batch:
                x = override(x, jnp.asarray(batch["vectors"]), jnp.asarray(batch["vector_places"]))
            elif "vectors" in batch:
                x = splice(x, jnp.asarray(batch["vectors"]), items_RJT)
        hidden: Array = decoder.apply({"params": params}, x, layout, method=Decoder.decode)  # type: ignore[assignment]
        hidden_BD = hidden.reshape(-1, hidden.shape[-1])
        logits = label_logits(hidden_BD, label_rows(params, config.label_token_ids)).reshape(*hidden.shape[:-1], 2)
        return (logits, hidden) if with_states else logits

    return parallelise(score, devices)


@cache
def make_log_prob_fn(devices: tuple[jax.Device, ...]) -> ScoreFn:
    """Returns the jitted, pure `log_prob_fn(params, states, asked) -> log-probabilities among the whole vocabulary`.

    States are [R, J, D], of a score function `with_states`; `asked` is `{"places": int [N], "label_ids": int [N, L]}`:
    of which of them and of which tokens. The result is float32 [N, L]. With several devices all arrays have a leading
    axis, as those of `make_score_fn`.
    """

    def log_probs(params: Params, states: Array, asked: Batch) -> Array:
        states_ND = states.reshape(-1, states.shape[-1])[asked["places"]]
        return log_probabilities(states_ND, asked["label_ids"], params)

    return parallelise(log_probs, devices)


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
    ) -> None:
        """Returns a scorer; nothing is compiled yet.

        Args:
            devices: all local accelerators if None.
            buckets: `default_buckets` of the platform if None.
            dtype, implementation: as in `make_score_fn`.
        """
        self.config = config
        self.devices = tuple(scoring_devices(devices))
        self.dtype = checked_dtype(dtype, self.devices[0].platform)
        self.buckets = buckets or default_buckets(self.devices[0].platform)
        self.params: Params = replicate(jax.tree.map(lambda leaf: leaf.astype(self.dtype), params), self.devices)
        self.score_fn = make_score_fn(config, self.devices, self.dtype, implementation, with_states=True)
        self._log_prob_fn = make_log_prob_fn(self.devices)
        self.packer = Packer(self.buckets, self.dtype)  # so that one program serves, whatever vectors are stored in

    def logits(self, requests: Sequence[PackRequest]) -> Float32[np.ndarray, "n C"]:
        """Returns the logits of (no, yes) of every item of every request, in order. Requests share forward passes.

        If a request has `label_ids`, MAX_LABEL_IDS columns of their log-probabilities follow, which mean nothing where
        an item asks for fewer or none.

        Raises:
            InputError: an item without tokens, or one that no bucket holds.
        """
        logits = np.empty((sum(len(request.item_ids) for request in requests), values_per_item(requests)), np.float32)
        # Dispatch is asynchronous: the device computes one pass while the host packs the next, and nothing is waited
        # for until all are queued.
        queued = [(group, self.dispatch(group)) for group in self.packer.pack(requests, len(self.devices))]
        for group, result in queued:
            self.collect(group, result, logits)
        return logits

    def dispatch(self, group: Sequence[Forward]) -> Result:
        """Queues passes of one bucket, one per device, and returns their result to come."""
        empty = [empty_forward(group[0].bucket, group[0].vectors)] * (len(self.devices) - len(group))
        forwards = [*group, *empty]
        logits, states = self._score(forwards)
        asking = max(len(forward.asking) for forward in forwards)
        return logits, *(self._log_probs(states, forwards, start) for start in range(0, asking, LABEL_ROWS))

    def collect(self, group: Sequence[Forward], result: Result, logits: np.ndarray) -> None:
        """Waits for a result of `dispatch` and puts its rows where they belong in `logits` [n, 2 or more]."""
        pairs = np.asarray(result[0]).reshape(len(self.devices), -1, 2)
        chunks = [np.asarray(chunk).reshape(len(self.devices), LABEL_ROWS, -1) for chunk in result[1:]]
        for number, forward in enumerate(group):
            logits[forward.indices, :2] = pairs[number][forward.places]
            if len(forward.asking):
                values = np.concatenate([chunk[number] for chunk in chunks])[: len(forward.asking)]
                logits[forward.indices[forward.asking], 2:] = values

    def run_empty(self, bucket: Bucket) -> None:
        """Runs all that a bucket's passes may need, without any item: what warm-up compiles with."""
        shape = (bucket.rows, bucket.items_per_row, bucket.vector_places, self.config.model.width)
        forward = empty_forward(bucket, np.zeros(shape, self.dtype) if bucket.vector_places else None)
        forwards = [forward] * len(self.devices)
        logits, states = self._score(forwards)
        jax.block_until_ready((logits, self._log_probs(states, forwards, 0)))

    def _score(self, forwards: Sequence[Forward]) -> tuple[Array, Array]:
        """Queues a pass for each device; returns logits and states to come."""
        logits, states = self.score_fn(self.params, FlatBatch.of([forward.batch for forward in forwards]))
        return logits, states

    def _log_probs(self, states: Array, forwards: Sequence[Forward], start: int) -> Array:
        """Queues what the next LABEL_ROWS asking items of each pass ask for; returns it to come."""
        asked = FlatBatch.of([_asked(forward, start) for forward in forwards])
        log_probs: Array = self._log_prob_fn(self.params, states, asked)
        return log_probs


def _asked(forward: Forward, start: int) -> dict[str, np.ndarray]:
    """Places and tokens of LABEL_ROWS items that ask for log-probabilities; zeros, any answer, behind the last one."""
    asking = forward.asking[start : start + LABEL_ROWS]
    places, label_ids = np.zeros(LABEL_ROWS, np.int32), np.zeros((LABEL_ROWS, MAX_LABEL_IDS), np.int32)
    places[: len(asking)] = forward.places[asking]
    if forward.label_ids is not None:
        label_ids[: len(asking)] = forward.label_ids[asking]
    return {"places": places, "label_ids": label_ids}
