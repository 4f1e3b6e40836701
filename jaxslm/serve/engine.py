"""The parts of a server, put together: the model in service, health, item store, score cache; and its replacement."""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax

from jaxslm.checkpoint import load_manifest
from jaxslm.errors import InputError
from jaxslm.items.store import open_store
from jaxslm.score.parallel import device_name, scoring_devices
from jaxslm.score.warmup import uncounted_compilations
from jaxslm.serve.batcher import DeadlineError, DeviceError
from jaxslm.serve.cache import open_cache
from jaxslm.serve.errors import ApiError, invalid
from jaxslm.serve.health import Health
from jaxslm.serve.metrics import Metrics
from jaxslm.serve.served import ServedModel
from jaxslm.serve.settings import Keys, ServeSettings
from jaxslm.serve.tracing import Tracer, open_tracer

Result = TypeVar("Result")

POLL_S = 0.02
"""How often a replaced model is asked whether requests still hold it."""

logger = logging.getLogger(__name__)


class Engine:
    """What a server needs, ready to be warmed up.

    Attributes:
        model: the checkpoint in service; take it with `using`, as a reload replaces it.
        health, metrics: see their classes. store, cache, tracer: None unless the settings name one.
    """

    def __init__(self, settings: ServeSettings, keys: Keys) -> None:
        """Loads the checkpoint and opens store, cache and tracer.

        Raises:
            InputError: the checkpoint, the buckets or a URL breaks a rule, a store is given to a checkpoint without
                compressor, or tracing to an installation without OpenTelemetry.
            StoreUnavailable: store or cache does not answer.
        """
        self.settings, self.keys = settings, keys
        self.metrics = Metrics()
        self.tracer: Tracer | None = None if settings.tracing is None else open_tracer(settings.tracing)
        load_manifest(Path(settings.model))  # no store is made for a wrong path
        self.cache = None if settings.cache is None else open_cache(settings.cache)
        # Without an admin key nothing can be written, and then nothing need be.
        self._writes = keys.admin is not None
        self.store = None if settings.store is None else open_store(settings.store, read_only=not self._writes)
        self._path = settings.model
        self.model = self._load(settings.model)
        self.health = Health(self.model.batcher, settings.watchdog_s, settings.stall_s)
        self._reloading = False
        self._background: list[threading.Thread] = []
        self._watch()
        self._tell()

    def _load(self, path: str) -> ServedModel:
        return ServedModel(path, self.settings, self.metrics, scoring_devices(), self.store, self.cache)

    def _tell(self) -> None:
        self.metrics.serves(self.model.name, self.model.ranker.dtype.name, device_name())

    def _watch(self) -> None:
        health, watch = self.health, self.metrics.watch
        watch("ready", "Whether requests are welcome.", lambda: float(health.status == "ready"))
        watch("compilations_after_ready", "Programs compiled while serving.", lambda: float(health.compilations))
        watch("queued_tokens", "Tokens that wait for the device.", lambda: float(self.model.batcher.queued_tokens))
        watch("num_requests_waiting", "Those that wait for the device.", lambda: self.model.batcher.queued_requests)
        watch("running_batches", "Batches on the device or next.", lambda: float(self.model.batcher.running_batches))
        watch("tokens_per_second", "Speed of the device of late.", lambda: self.model.batcher.tokens_per_s or 0.0)

    def warm_up(self) -> None:
        """Compiles everything that serving runs, scores a full batch, and says that the server is ready."""
        start = time.monotonic()

        def log(done: int, total: int) -> None:
            logger.info("compiled", extra={"fields": {"done": done, "buckets": total}})

        self.model.warm_up(encodes=self._writes, done=log)
        self.health.ready()
        logger.info("ready", extra={"fields": {"warm_up_s": round(time.monotonic() - start, 3)}})

    @contextmanager
    def using(self) -> Iterator[ServedModel]:
        """Yields the model in service, which stays alive meanwhile. Only on the event loop."""
        model = self.model
        model.users += 1
        try:
            yield model
        finally:
            model.users -= 1

    async def reload(self, path: str | None) -> ServedModel:
        """Puts another checkpoint into service and returns it when the one before it has ended.

        It is loaded, compiled and tried beside the one in service, which scores meanwhile; requests that have begun end
        with the one that they began with. If anything fails, nothing has changed.

        Args:
            path: the checkpoint's folder; the one that was loaded last if None.

        Raises:
            ApiError: 409 while another reload runs, 400 if the checkpoint cannot be served, 503 if the device fails.
        """
        if self._reloading:
            raise ApiError(409, "reload_in_progress", "another reload is running")
        folder = path or self._path
        if "\0" in folder:
            raise invalid("model: must not hold null characters", "model")
        folder = str(Path(folder).absolute())
        self._reloading = True
        try:
            new = await asyncio.wrap_future(self.in_background("reload", partial(self._prepare, folder)))
            # No await between these: whoever asks for the model gets the old one or the new one, and its health.
            old, self.model, self._path = self.model, new, folder
            self.health.replace(new.batcher)
            self._tell()
            logger.info("reloaded", extra={"fields": {"model": new.name}})
            while old.users:
                await asyncio.sleep(POLL_S)
            await asyncio.to_thread(old.stop)
            return new
        except InputError as error:
            raise invalid(_without_folder(str(error), folder), "model") from None
        except OSError as error:
            raise invalid(f"model: cannot be read ({error.strerror})", "model") from None
        except (DeviceError, DeadlineError, jax.errors.JaxRuntimeError):
            logger.exception("reload failed")
            raise ApiError(503, "reload_failed", "the device failed with the new checkpoint") from None
        finally:
            self._reloading = False

    def _prepare(self, path: str) -> ServedModel:
        """Loads and warms a model up beside the one in service."""
        with uncounted_compilations():
            model = self._load(path)
            try:
                model.warm_up(encodes=self._writes)
            except BaseException:
                model.stop()
                raise
        return model

    def in_background(self, name: str, work: Callable[[], Result]) -> Future[Result]:
        """Runs `work` in a thread of its own that the process does not wait for when it is told to end.

        For what takes long: the threads of an executor are waited for. Only on the event loop.
        """
        future: Future[Result] = Future()
        # From now on it cannot be cancelled from outside: the thread is at work whether anybody waits or not.
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # whoever waits for the future gets it
                future.set_exception(error)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._background = [each for each in self._background if each.is_alive()] + [thread]
        thread.start()
        return future

    @property
    def at_work(self) -> bool:
        """Whether a thread of `in_background` is at work."""
        return any(thread.is_alive() for thread in self._background)

    def close(self) -> None:
        """Scores what waits, sends the last spans and closes the store, unless a thread may still write to it."""
        self.model.stop()
        if self.tracer is not None:
            self.tracer.close()
        if self.store is not None and not self.at_work:
            self.store.close()


def _without_folder(message: str, folder: str) -> str:
    """Returns the message with "model" for the checkpoint's folder: which file is wrong is of use, where it is is not.

    Args:
        folder: an absolute path, as the message has it.
    """
    return re.sub(rf"(?<![\w./-]){re.escape(folder)}(?![\w-]|\.\w)", "model", message)
