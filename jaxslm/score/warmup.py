"""Before the first request: every bucket compiled, compilations counted, garbage frozen; and portable artefacts.

After `warm_up` no shape is left to compile, so `compilations()` must not grow any more while serving.
"""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export as jax_export
from jax.typing import DTypeLike

from jaxslm.config import Bucket, RankerConfig
from jaxslm.model.decoder import abstract_params
from jaxslm.score.compiled import Batch, CompiledScorer, make_score_fn
from pallas_kernels.dispatch import XLA


class _CompilationCounter:
    def __init__(self) -> None:
        self.count = 0
        self.uncounted_threads: set[int] = set()

    def __call__(self, event: str, duration_secs: float, **_: str | int) -> None:
        if threading.get_ident() not in self.uncounted_threads:
            self.count += event == "/jax/core/compile/backend_compile_duration"


_counter = _CompilationCounter()
jax.monitoring.register_event_duration_secs_listener(_counter)


def compilations() -> int:
    """Returns how many programs XLA has compiled or taken from the compilation cache since this module was imported."""
    return _counter.count


@contextmanager
def uncounted_compilations() -> Iterator[None]:
    """Leaves out of `compilations` what this thread compiles: a model that is made ready beside the one in service."""
    thread = threading.get_ident()
    _counter.uncounted_threads.add(thread)
    try:
        yield
    finally:
        _counter.uncounted_threads.discard(thread)


def warm_up(scorer: CompiledScorer, done: Callable[[int, int], None] | None = None) -> float:
    """Compiles every bucket and runs it once, then freezes the garbage collector's view; returns the seconds it took.

    Buckets are compiled side by side, as much of a compiler's work uses one core.

    Args:
        done: called after each bucket with the number done and their total.
    """
    start = time.perf_counter()
    buckets = scorer.buckets.buckets
    uncounted = threading.get_ident() in _counter.uncounted_threads

    def compile_one(bucket: Bucket) -> None:
        with uncounted_compilations() if uncounted else nullcontext():
            scorer.run_empty(bucket)

    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="warm-up")
    try:
        for number, _ in enumerate(pool.map(compile_one, buckets), start=1):
            if done is not None:
                done(number, len(buckets))
    finally:
        pool.shutdown(cancel_futures=True)
    # What exists now lives as long as the process: the collector need not walk it in the middle of a request.
    gc.collect()
    gc.freeze()
    return time.perf_counter() - start


def use_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs in a folder, so that the next process loads them instead."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_compiled_programs() -> None:
    """`use_compilation_cache` in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        use_compilation_cache(Path(home) / "jaxslm" / "compiled")


def abstract_batch(bucket: Bucket, width: int, dtype: DTypeLike = jnp.float32) -> Batch:
    """Returns the bucket's batch as shapes and dtypes: what to lower, compile ahead or export with."""
    R, J, C = bucket.rows, bucket.items_per_row, bucket.vector_places
    batch = {
        "tokens": jax.ShapeDtypeStruct((bucket.tokens,), jnp.int32),
        "prefix": jax.ShapeDtypeStruct((R, bucket.prefix_tokens), jnp.int32),
        "items": jax.ShapeDtypeStruct((R, J, bucket.item_tokens), jnp.int32),
    }
    if C:
        batch["vectors"] = jax.ShapeDtypeStruct((R, J, C, width), dtype)
    if bucket.overrides_per_item:
        batch["vector_places"] = jax.ShapeDtypeStruct((R, J, C), jnp.int32)
    return batch


def compile_ahead(config: RankerConfig, bucket: Bucket, dtype: DTypeLike) -> jax.stages.Compiled:
    """Returns the bucket's program compiled for the first local device, without any weights in memory."""
    params = abstract_params(config.model, jnp.dtype(dtype))
    score_fn = make_score_fn(config, jax.local_devices()[:1], dtype)
    return score_fn.lower(params, abstract_batch(bucket, config.model.width, dtype)).compile()


def export_score_fn(config: RankerConfig, bucket: Bucket, dtype: DTypeLike, platforms: tuple[str, ...]) -> bytes:
    """Returns the bucket's scoring function as a portable artefact: `jax.export.deserialize(...).call(params, batch)`.

    It needs neither this package nor the model's code, and pins the program, not its speed: it is compiled where it is
    loaded, by a jax release of about half a year before or after.
    """
    params = abstract_params(config.model, jnp.dtype(dtype))
    # Kernels are for one kind of device; XLA's code is for all.
    score_fn = make_score_fn(config, jax.local_devices()[:1], dtype, None if platforms == ("cuda",) else XLA)
    exported = jax_export.export(score_fn, platforms=platforms)(
        params, abstract_batch(bucket, config.model.width, dtype)
    )
    return bytes(exported.serialize())
