"""One checkpoint in service: ranker, queue and item store together, which a reload replaces as a whole."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxslm.checkpoint import load_checkpoint
from jaxslm.compress.encoder import load_encoder
from jaxslm.config import BucketConfig, load_toml
from jaxslm.errors import InputError
from jaxslm.items.store import Store
from jaxslm.score.forward import PackRequest
from jaxslm.score.scorer import Ranker
from jaxslm.serve.batcher import Batcher, DeadlineError
from jaxslm.serve.buckets import PASS_TOKENS, serving_buckets
from jaxslm.serve.cache import ScoreCache
from jaxslm.serve.catalogue import Catalogue
from jaxslm.serve.metrics import Metrics
from jaxslm.serve.prepare import Preparer
from jaxslm.serve.settings import ServeSettings

WARM_UP_SEED = 0

logger = logging.getLogger(__name__)


class ServedModel:
    """A checkpoint on its devices with a queue of its own.

    Attributes:
        name: what answers call it. ranker, batcher, preparer: see their classes.
        catalogue: the item store as this checkpoint reads it, if the server has a store.
        users: requests that hold it; a model that was replaced ends when nobody does. Counted on the event loop.
    """

    def __init__(
        self,
        path: str,
        settings: ServeSettings,
        metrics: Metrics,
        devices: list[jax.Device],
        store: Store | None,
        cache: ScoreCache | None,
    ) -> None:
        """Loads the checkpoint; nothing is compiled yet.

        Raises:
            InputError: the checkpoint or the buckets break a rule, or there is a store and no compressor to read it.
        """
        self.name = settings.model_name or Path(path).resolve().name
        self.users = 0
        checkpoint = load_checkpoint(Path(path))
        platform = devices[0].platform
        if settings.buckets is not None:
            buckets = load_toml(Path(settings.buckets), BucketConfig)
        else:
            buckets = serving_buckets(checkpoint.config, platform, checkpoint.manifest.compressor)
        self.ranker = Ranker(checkpoint, settings.dtype, devices, buckets)
        if not self.ranker.scorer.packer.longest_item:
            raise InputError("buckets: none takes text, which a server scores whatever else it does")
        max_batch_tokens = settings.max_batch_tokens or PASS_TOKENS[platform][-1] * len(devices)
        self.batcher = Batcher(self.ranker.scorer, metrics, max_batch_tokens, settings.max_wait_ms / 1000)
        self.catalogue: Catalogue | None = None
        if store is not None:
            compiled = {bucket.vectors_per_item for bucket in self.ranker.scorer.buckets.buckets}
            self.catalogue = Catalogue(store, load_encoder(path), settings.store_dtype, metrics, compiled)
        self.preparer = Preparer(self.ranker, metrics, settings.max_items, self.catalogue, cache)
        self._first_pass_s = settings.stall_s

    def warm_up(self, *, encodes: bool, done: Callable[[int, int], None] | None = None) -> None:
        """Compiles everything that serving runs, starts the queue and scores a full batch.

        Args:
            encodes: whether items may be put. done: called after each bucket with the number done and their total.

        Raises:
            InputError: the checkpoint scores no numbers.
            DeviceError, DeadlineError: the device did not score the batch.
        """
        if encodes and self.catalogue is not None:
            self.catalogue.encoder.warm_up()
        self.ranker.warm_up(done)
        self.batcher.start()
        job = self.batcher.submit(self._full_request(), time.monotonic() + self._first_pass_s, trial=True)
        try:
            logits = job.future.result(self._first_pass_s)
        except TimeoutError:  # the queue forgets late jobs, but not what a device that hangs has taken
            raise DeadlineError from None
        if not np.isfinite(logits).all():
            raise InputError("the checkpoint's scores are no finite numbers")

    def _full_request(self) -> PackRequest:
        """A request that fills a batch, so that the speed of the device is known before the first one comes."""
        vocab_size = self.ranker.config.model.vocab_size
        number = max(1, self.batcher.max_batch_tokens // 32)
        ids = np.random.default_rng(WARM_UP_SEED).integers(vocab_size, size=(number, 16)).tolist()
        return PackRequest(ids[0], ids)

    def stop(self) -> None:
        """Scores what waits and ends the queue."""
        self.batcher.stop()
