"""The parts of a server, put together: ranker, batcher, health, item store, score cache."""

import logging
import time
from pathlib import Path

import numpy as np

from jaxslm.checkpoint import load_checkpoint
from jaxslm.compress.encoder import ItemEncoder, load_encoder
from jaxslm.config import BucketConfig, load_toml
from jaxslm.items.store import open_store
from jaxslm.score.packing import PackRequest
from jaxslm.score.parallel import scoring_devices
from jaxslm.score.scorer import Ranker
from jaxslm.serve.batcher import Batcher
from jaxslm.serve.buckets import PASS_TOKENS, serving_buckets
from jaxslm.serve.cache import open_cache
from jaxslm.serve.catalogue import Catalogue
from jaxslm.serve.health import Health
from jaxslm.serve.metrics import Metrics
from jaxslm.serve.prepare import Preparer
from jaxslm.serve.settings import Keys, ServeSettings

WARM_UP_SEED = 0

logger = logging.getLogger(__name__)


class Engine:
    """One checkpoint, ready to be warmed up and served.

    Attributes:
        ranker, batcher, health, metrics, preparer: see their classes.
        catalogue: the item store, if the settings name one. cache: the score cache, likewise.
    """

    def __init__(self, settings: ServeSettings, keys: Keys) -> None:
        """Loads the checkpoint and opens store and cache.

        Raises:
            InputError: the checkpoint, the buckets or a URL breaks a rule, or a store is given to a checkpoint without
                compressor.
            StoreUnavailable: store or cache does not answer.
        """
        self.settings, self.keys = settings, keys
        self.metrics = Metrics()
        checkpoint = load_checkpoint(Path(settings.model))
        devices = scoring_devices()
        platform = devices[0].platform
        if settings.buckets is not None:
            buckets = load_toml(Path(settings.buckets), BucketConfig)
        else:
            buckets = serving_buckets(checkpoint.config, platform, checkpoint.manifest.compressor)
        self.ranker = Ranker(checkpoint, devices=devices, buckets=buckets)
        max_batch_tokens = settings.max_batch_tokens or PASS_TOKENS[platform][-1] * len(devices)
        self.batcher = Batcher(self.ranker.scorer, self.metrics, max_batch_tokens, settings.max_wait_ms / 1000)
        self.health = Health(self.batcher, settings.watchdog_s, settings.stall_s)
        self.catalogue: Catalogue | None = None
        if settings.store is not None:
            self.catalogue = self._open_catalogue(settings.store, load_encoder(settings.model))
        self.cache = None if settings.cache is None else open_cache(settings.cache)
        self.preparer = Preparer(self.ranker, self.metrics, settings.max_items, self.catalogue, self.cache)
        self._watch()

    def _open_catalogue(self, url: str, encoder: ItemEncoder) -> Catalogue:
        # Without an admin key nothing can be written, and then nothing need be.
        store = open_store(url, read_only=self.keys.admin is None)
        return Catalogue(store, encoder, self.settings.store_dtype, self.metrics)

    def _watch(self) -> None:
        batcher, health = self.batcher, self.health
        watch = self.metrics.watch
        watch("ready", "Whether requests are welcome.", lambda: float(health.status == "ready"))
        watch("compilations_after_ready", "Programs compiled while serving.", lambda: float(health.compilations))
        watch("queued_tokens", "Tokens that wait for the device.", lambda: float(batcher.queued_tokens))
        watch("running_batches", "Batches on the device or next.", lambda: float(batcher.running_batches))
        watch("tokens_per_second", "Speed of the device of late.", lambda: batcher.tokens_per_s or 0.0)

    def warm_up(self) -> None:
        """Compiles everything that serving runs, scores a full batch, and says that the server is ready."""
        start = time.monotonic()

        def log(done: int, total: int) -> None:
            logger.info("compiled", extra={"fields": {"done": done, "buckets": total}})

        if self.catalogue is not None and self.keys.admin is not None:
            self.catalogue.encoder.warm_up()
        self.ranker.warm_up(log)
        self.batcher.start()
        request = self._full_request()
        self.batcher.submit(request, time.monotonic() + self.settings.stall_s).future.result()
        self.health.ready()
        logger.info("ready", extra={"fields": {"warm_up_s": round(time.monotonic() - start, 3)}})

    def _full_request(self) -> PackRequest:
        """A request that fills a batch, so that the speed of the device is known before the first one comes."""
        vocab_size = self.ranker.config.model.vocab_size
        number = max(1, self.batcher.max_batch_tokens // 32)
        ids = np.random.default_rng(WARM_UP_SEED).integers(vocab_size, size=(number, 16)).tolist()
        return PackRequest(ids[0], ids)

    def close(self) -> None:
        """Scores what waits and closes the store."""
        self.batcher.stop()
        if self.catalogue is not None:
            self.catalogue.close()
