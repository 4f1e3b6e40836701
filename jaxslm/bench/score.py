"""`jaxslm bench score`: a workload through the compiled scorer, beside the floor that the device sets."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxslm.bench.device import Ceilings, floor, measure_ceilings
from jaxslm.bench.workloads import Workload, model_named, random_requests, workload_named
from jaxslm.compress.splice import splice
from jaxslm.config import BucketConfig, RankerConfig
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.head import label_logits, label_rows, vocab_logits
from jaxslm.model.layout import Rows, SharedPrefix
from jaxslm.progress import console
from jaxslm.score.buckets import default_buckets, fit_buckets
from jaxslm.score.compiled import Batch, CompiledScorer, make_score_fn
from jaxslm.score.packing import PackRequest
from jaxslm.score.warmup import compilations, warm_up

Cuts = Literal["all", "head", "none"]
"""What a pass leaves out: "all" as serving does; "head" computes the whole last layer; "none" also every token's
logits over the vocabulary, as a language model's plain forward pass does."""

REFERENCE_ITEMS = 8


@dataclass(frozen=True)
class Options:
    """How to run a workload. `requests`: how many are in flight together. The rest switches off what makes it fast."""

    sharing: bool = True
    padded: bool = False
    cuts: Cuts = "all"
    fitted: bool = True
    max_tokens: int = 1024
    requests: int = 1


def default_options() -> Options:
    """Returns the best settings known for this platform."""
    return Options(max_tokens=1024 if jax.default_backend() == "cpu" else 16384)


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
        InputError: an unknown workload or model.
    """
    options = options or default_options()
    shape = workload_named(workload)
    shape = replace(
        shape,
        items=items or shape.items,
        prefix_tokens=shape.prefix_tokens if prefix is None else prefix,
        item_tokens=item_tokens or shape.item_tokens,
    )
    used = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    config, params = model_named(model, used)
    ceilings = measure_ceilings(used)
    print_floor(shape, config, ceilings)
    result = measure(shape, config, params, ceilings, repeats, options)
    result = {"workload": workload, "model": model, **result}
    print_result(result)
    return result


def measure(
    shape: Workload, config: RankerConfig, params: Params, ceilings: Ceilings, repeats: int, options: Options
) -> dict[str, Any]:
    """Returns the figures of one workload, model and set of options; `params` are in the compute dtype."""
    requests = random_requests(shape, config.model, options.requests)
    run: Runner | PaddedRunner
    if options.padded:
        run = PaddedRunner(config, params, requests, options.max_tokens)
    else:
        run = Runner(config, params, requests, options)
    start = time.perf_counter()
    logits = run()
    compile_s = time.perf_counter() - start
    before = compilations()
    seconds = np.array([timed(run) for _ in range(repeats)])
    compiled = compilations() - before
    rates = options.requests * shape.items / seconds
    flops = floor(shape, config.model, ceilings, shared=options.sharing and not options.padded).flops / shape.items
    passes, places, real = run.shape()
    reference = reference_logits(config, params, requests[0])
    return {
        "dtype": ceilings.dtype,
        "device": ceilings.device,
        "items_per_s": float(np.median(rates)),
        "items_per_s_p5": float(np.quantile(rates, 0.05)),
        "items_per_s_p95": float(np.quantile(rates, 0.95)),
        "tokens_per_forward": real / passes,
        "forwards": passes,
        "padding_fraction": 1 - real / places,
        "gflop_per_item": flops / 1e9,
        "mfu": float(np.median(rates)) * flops / ceilings.flops_per_s,
        "ceiling_tflops": ceilings.flops_per_s / 1e12,
        "ceiling_gb_per_s": ceilings.bytes_per_s / 1e9,
        "max_abs_diff": float(np.abs(logits[: len(reference)] - reference).max()),
        "compile_s": compile_s,
        "compilations_while_measuring": compiled,
        "repeats": repeats,
        "items": shape.items,
        "prefix_tokens": shape.prefix_tokens,
        "item_tokens": shape.item_tokens,
        "requests": options.requests,
        "sharing": options.sharing and not options.padded,
        "padded": options.padded,
        "cuts": options.cuts,
        "fitted_buckets": options.fitted,
        "jax": jax.__version__,
    }


def timed(call: Any) -> float:
    """Returns the seconds that one call took."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Runner:
    """The serving path: packing, dispatch and collection of results are inside what is timed."""

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
        self.scorer = CompiledScorer(config, params, dtype=dtype, devices=jax.local_devices()[:1], buckets=buckets)
        if options.cuts != "all":
            self.scorer.score_fn = uncut_score_fn(config, dtype, options.cuts)
        warm_up(self.scorer)

    def __call__(self) -> np.ndarray:
        """Returns logits [all items, 2]."""
        return self.scorer.logits(self._requests)

    def shape(self) -> tuple[int, int, int]:
        """Returns the number of forward passes, their token places and the real tokens in them."""
        forwards = [forward for group in self.scorer.packer.pack(self._requests) for forward in group]
        places = sum(forward.bucket.tokens for forward in forwards)
        return len(forwards), places, sum(forward.real_tokens for forward in forwards)


class PaddedRunner:
    """The plain way: whole rows, padded to a power of two, in batches; no packing and no sharing."""

    def __init__(self, config: RankerConfig, params: Params, requests: Sequence[PackRequest], max_tokens: int) -> None:
        rows = [[*request.prefix_ids, *item] for request in requests for item in request.item_ids]
        T = 1 << (max(map(len, rows)) - 1).bit_length()
        self._B, self._real = max(1, max_tokens // T), sum(map(len, rows))
        self._tokens, self._valid = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), bool)
        for number, row in enumerate(rows):
            self._tokens[number, : len(row)], self._valid[number, : len(row)] = row, True
        self._params = params
        self._score_fn = make_score_fn(config, dtype=jax.tree.leaves(params)[0].dtype)

    def __call__(self) -> np.ndarray:
        """Returns logits [all items, 2]."""
        parts = []
        for start in range(0, len(self._tokens), self._B):
            tokens, valid = self._tokens[start : start + self._B], self._valid[start : start + self._B]
            missing = self._B - len(tokens)
            batch = {"tokens": np.pad(tokens, ((0, missing), (0, 0))), "valid": np.pad(valid, ((0, missing), (0, 0)))}
            parts.append(self._score_fn(self._params, batch)[: len(tokens)])
        return np.concatenate([np.asarray(part) for part in parts])

    def shape(self) -> tuple[int, int, int]:
        """Returns the number of forward passes, their token places and the real tokens in them."""
        passes = -(-len(self._tokens) // self._B)
        return passes, passes * self._B * self._tokens.shape[1], self._real


def bench_buckets(requests: Sequence[PackRequest], options: Options) -> BucketConfig:
    """Returns the platform's default buckets, or buckets fitted to these requests scored together."""
    if not options.fitted:
        return default_buckets(jax.default_backend())
    return fit_buckets([requests], count=3, max_tokens=options.max_tokens)


def uncut_score_fn(config: RankerConfig, dtype: jnp.dtype, cuts: Cuts) -> Any:
    """Returns a score function, `with_states`, that computes the last layer of every token, and with "none" its
    vocabulary logits.
    """
    decoder = Decoder(config.model, dtype)

    def score(params: Params, batch: Batch) -> tuple[Array, Array]:
        items = jnp.asarray(batch["items"])
        layout = Uncut(jnp.asarray(batch["prefix"]), items, batch["tokens"].shape[0])
        x: Array = decoder.apply({"params": params}, jnp.asarray(batch["tokens"]), method=Decoder.embed)  # type: ignore[assignment]
        if "vectors" in batch:
            x = splice(x, jnp.asarray(batch["vectors"]), items)
        hidden_MD: Array = decoder.apply({"params": params}, x, layout, method=Decoder.decode)  # type: ignore[assignment]
        if cuts == "none":
            logits_MV = vocab_logits(hidden_MD, params)
            return layout.last(logits_MV)[..., jnp.asarray(config.label_token_ids)], layout.last(hidden_MD)
        hidden_RJD = layout.last(hidden_MD)
        R, J, D = hidden_RJD.shape
        logits = label_logits(hidden_RJD.reshape(R * J, D), label_rows(params, config.label_token_ids))
        return logits.reshape(R, J, 2), hidden_RJD

    return jax.jit(score)


class Uncut(SharedPrefix):
    """A shared prefix whose last layer is computed for every token."""

    last = SharedPrefix.read

    def read(self, x: Array) -> Array:
        """Every token."""
        return x

    def attend_read(self, q: Array, k: Array, v: Array) -> Array:
        """As in all layers."""
        return self.attend(q, k, v)


def reference_logits(config: RankerConfig, params: Params, request: PackRequest) -> np.ndarray:
    """Returns the float32 logits of a request's first items as padded rows of their own: the correct, slow way."""
    float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    rows = np.array([[*request.prefix_ids, *item] for item in request.item_ids[:REFERENCE_ITEMS]], np.int32)
    P, decoder = len(request.prefix_ids), Decoder(config.model)

    @jax.jit
    def score(params: Params) -> Array:
        x_BTD: Array = decoder.apply({"params": params}, jnp.asarray(rows), method=Decoder.embed)  # type: ignore[assignment]
        if request.vectors is not None:
            vectors = request.vectors[:REFERENCE_ITEMS]
            x_BTD = x_BTD.at[:, P : P + vectors.shape[1]].set(vectors)
        layout = Rows(jnp.ones(rows.shape, bool))
        hidden_BD: Array = decoder.apply({"params": params}, x_BTD, layout, method=Decoder.decode)  # type: ignore[assignment]
        return label_logits(hidden_BD, label_rows(params, config.label_token_ids))

    return np.asarray(score(float32))


def print_floor(shape: Workload, config: RankerConfig, ceilings: Ceilings) -> None:
    """Says what the device can do and what that means for this workload, before anything is measured."""
    least = floor(shape, config.model, ceilings)
    console().print(
        f"{shape.name}: {shape.items} items of {shape.item_tokens} tokens after {shape.prefix_tokens} shared ones,"
        f" {least.flops / shape.items / 1e9:.3f} GFLOP an item\n"
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
