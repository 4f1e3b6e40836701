"""`jaxslm bench score`: a workload through the compiled scorer, beside the floor that the device sets."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxslm.bench.ablations import Cuts, PaddedRunner, reference_logits, uncut_score_fn
from jaxslm.bench.device import Ceilings, Floor, floor, measure_ceilings
from jaxslm.bench.workloads import Workload, model_named, random_requests, workload_named
from jaxslm.config import BucketConfig, RankerConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from jaxslm.progress import console
from jaxslm.score.buckets import default_buckets, fit_buckets, pass_overhead
from jaxslm.score.compiled import CompiledScorer
from jaxslm.score.forward import PackRequest
from jaxslm.score.warmup import compilations, warm_up
from pallas_kernels.dispatch import CannotRunError


@dataclass(frozen=True)
class Options:
    """How to run a workload. Sharing, padded, cuts and fitted switch off what makes it fast.

    Attributes:
        requests: how many are in flight together.
        implementation: of the ops that have kernels, as `make_score_fn` takes it; None is dispatch's choice.
    """

    max_tokens: int
    sharing: bool = True
    padded: bool = False
    cuts: Cuts = "all"
    fitted: bool = True
    requests: int = 1
    implementation: str | None = None


def default_options() -> Options:
    """Returns the best settings known for this platform."""
    # On a CPU `summary` is 3 % faster in passes of 2,048 tokens than of 1,024: four compute its prefix, not ten.
    # 8,192 are slower (docs/results/scoring.md).
    return Options(max_tokens=2048 if jax.default_backend() == "cpu" else 16384)


def bench_score(
    workload: str,
    model: str,
    *,
    dtype: str | None = None,
    repeats: int = 5,
    items: int | None = None,
    prefix: int | None = None,
    item_tokens: int | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Measures a workload and prints floor and result on stderr; returns the JSON object of the command line.

    Args:
        workload: a name of `WORKLOADS`. model: a name of `MODELS` (random weights) or a checkpoint folder.
        dtype: "float32" or "bfloat16"; by default the platform's.
        items, prefix, item_tokens: replace the workload's own.

    Raises:
        InputError: an unknown workload or model, items shorter than their vectors, or an implementation that cannot
            run here.
    """
    options = options or default_options()
    shape = workload_named(workload)
    shape = replace(
        shape,
        items=items or shape.items,
        prefix_tokens=shape.prefix_tokens if prefix is None else prefix,
        item_tokens=item_tokens or shape.item_tokens,
    )
    if shape.item_tokens <= shape.vectors_per_item:
        raise InputError(
            f"--item-tokens {shape.item_tokens}: an item of {workload} is {shape.vectors_per_item} vectors and at least"
            " one token behind them"
        )
    used = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    config, params = model_named(model, used)
    ceilings = measure_ceilings(used)
    print_floor(shape, config, ceilings)
    try:
        result = Measurement(shape, config, params, options).result(ceilings, repeats)
    except CannotRunError as error:
        raise InputError(f"--implementation {options.implementation}: {error}") from None
    result = {"workload": workload, "model": model, **result}
    print_result(result)
    return result


class Measurement:
    """One workload, model and set of options, compiled and ready to be timed; `params` are in the compute dtype."""

    def __init__(self, shape: Workload, config: RankerConfig, params: Params, options: Options) -> None:
        self._shape, self._config, self._options = shape, config, options
        dtype = jax.tree.leaves(params)[0].dtype
        requests = random_requests(shape, config.model, options.requests, dtype=dtype)
        self._run: Runner | PaddedRunner
        if options.padded:
            self._run = PaddedRunner(
                config, params, requests, options.max_tokens, cuts=options.cuts, implementation=options.implementation
            )
        else:
            self._run = Runner(config, params, requests, options)
        reference = reference_logits(config, params, requests[0])
        self._difference = float(np.abs(self._run()[: len(reference)] - reference).max())

    def result(self, ceilings: Ceilings, repeats: int) -> dict[str, Any]:
        """Returns the figures."""
        shape, options, run = self._shape, self._options, self._run
        before = compilations()
        seconds = np.array([timed(run) for _ in range(repeats)])
        compiled = compilations() - before
        rates = options.requests * shape.items / seconds
        least = floor(shape, self._config.model, ceilings, shared=options.sharing and not options.padded)
        return figures(rates, least, shape.items, ceilings, run.shape()) | {
            "max_abs_diff": self._difference,
            "compile_s": run.compile_s,
            "compilations_while_measuring": compiled,
            "repeats": repeats,
            "items": shape.items,
            "prefix_tokens": shape.prefix_tokens,
            "item_tokens": shape.item_tokens,
            "requests": options.requests,
            "sharing": options.sharing and not options.padded,
            "padded": options.padded,
            "cuts": options.cuts,
            "fitted_buckets": options.fitted and not options.padded,
            "implementation": options.implementation,
            "jax": jax.__version__,
        }


def figures(
    rates: np.ndarray, least: Floor, items: int, ceilings: Ceilings, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Returns what every benchmark of scoring reports of a workload whose timings came to `rates` items/s.

    Args:
        least: the floor of a request. items: of a request. shape: as `Runner.shape` returns it.
    """
    passes, places, real = shape
    flops, rate = least.flops / items, float(np.median(rates))
    return {
        "dtype": ceilings.dtype,
        "device": ceilings.device,
        "items_per_s": rate,
        "items_per_s_p5": float(np.quantile(rates, 0.05)),
        "items_per_s_p95": float(np.quantile(rates, 0.95)),
        "tokens_per_forward": real / passes,
        "forwards": passes,
        "padding_fraction": 1 - real / places,
        "gflop_per_item": flops / 1e9,
        "floor_bytes_per_request": least.bytes,
        "mfu": rate * flops / ceilings.flops_per_s,
        "ceiling_tflops": ceilings.flops_per_s / 1e12,
        "ceiling_gb_per_s": ceilings.bytes_per_s / 1e9,
    }


def timed(call: Any) -> float:
    """Returns the seconds that one call took."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Runner:
    """The serving path: packing, dispatch and collection of results are inside what is timed.

    Attributes:
        compile_s: what compiling every shape, and running it once, took.
    """

    def __init__(self, config: RankerConfig, params: Params, requests: Sequence[PackRequest], options: Options) -> None:
        if not options.sharing:
            requests = [
                PackRequest(request.prefix_ids, [item], None if request.vectors is None else request.vectors[j : j + 1])
                for request in requests
                for j, item in enumerate(request.item_ids)
            ]
        self._requests = requests
        buckets = bench_buckets(requests, options)
        dtype = jax.tree.leaves(params)[0].dtype
        self.scorer = CompiledScorer(
            config,
            params,
            dtype=dtype,
            devices=jax.local_devices()[:1],
            buckets=buckets,
            implementation=options.implementation,
        )
        if options.cuts != "all":
            self.scorer.score_fn = uncut_score_fn(config, dtype, options.cuts, options.implementation)
        self.compile_s = warm_up(self.scorer)

    def __call__(self) -> np.ndarray:
        """Returns logits [all items, 2]."""
        return self.scorer.logits(self._requests)

    def shape(self) -> tuple[int, int, int]:
        """Returns the number of forward passes, their token places and the real tokens in them."""
        forwards = [forward for group in self.scorer.packer.pack(self._requests) for forward in group]
        places = sum(forward.bucket.tokens for forward in forwards)
        return len(forwards), places, sum(forward.real_tokens for forward in forwards)


def bench_buckets(requests: Sequence[PackRequest], options: Options) -> BucketConfig:
    """Returns the platform's default buckets, or buckets fitted to these requests scored together."""
    if not options.fitted:
        return default_buckets(jax.default_backend())
    platform = jax.default_backend()
    return fit_buckets([requests], count=3, max_tokens=options.max_tokens, overhead_tokens=pass_overhead(platform))


def print_floor(shape: Workload, config: RankerConfig, ceilings: Ceilings) -> None:
    """Says what the device can do and what that means for this workload, before anything is measured."""
    least = floor(shape, config.model, ceilings)
    console().print(
        f"{shape.name}: {shape.items} items of {shape.item_tokens} tokens after {shape.prefix_tokens} shared ones,"
        f" {least.flops / shape.items / 1e9:.3f} GFLOP an item, {least.bytes / 1e6:,.0f} MB of traffic a request\n"
        f"{ceilings.device}, {ceilings.dtype}: {ceilings.flops_per_s / 1e9:.0f} GFLOP/s in a large product,"
        f" {ceilings.bytes_per_s / 1e9:.1f} GB/s in a copy\n"
        f"floor of a request: {least.compute_s * 1e3:.1f} ms of arithmetic, {least.traffic_s * 1e3:.1f} ms of memory"
        f" traffic; at most {shape.items / max(least.compute_s, least.traffic_s):.1f} items/s",
        soft_wrap=True,
    )


def print_result(result: dict[str, Any]) -> None:
    """Says what was measured."""
    console().print(
        f"{result['items_per_s']:.1f} items/s (p5 {result['items_per_s_p5']:.1f}, p95 {result['items_per_s_p95']:.1f},"
        f" {result['repeats']} repeats), {result['mfu']:.0%} of the ceiling; {result['forwards']} passes of"
        f" {result['tokens_per_forward']:.0f} tokens, {result['padding_fraction']:.1%} padding;"
        f" largest difference to the reference {result['max_abs_diff']:.1e}",
        soft_wrap=True,
    )
