"""Each kernel beside XLA and the best existing implementations, on the workloads' shapes: time, ceiling, error."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxslm.bench.device import Ceilings, measure_ceilings
from jaxslm.bench.in_turn import InTurn
from jaxslm.errors import InputError
from jaxslm.model.layout import SharedPrefix
from jaxslm.score.parallel import device_name
from pallas_kernels.dispatch import MOSAIC_GPU, XLA, is_hopper, target_device
from pallas_kernels.specs import OPS, Spec, specs

LARGEST_EXACT_FLOPS = 5e9
"""Above this numpy would need seconds for the float64 result, while the device waits."""

FAILURES = (ImportError, NotImplementedError, TypeError, ValueError, RuntimeError, ExceptionGroup)
"""What a library raises where it does not take a shape or has changed its interface: its row says so."""

Contender = tuple[Callable[..., jax.Array], tuple[Any, ...]]
"""A function and its arguments."""


def bench_kernels(ops: Sequence[str] | None = None, repeats: int = 5) -> dict[str, Any]:
    """Measures every spec of the named ops (all if None), prints a table on stderr; returns the command's JSON object.

    Raises:
        InputError: an unknown op, or no GPU that runs the kernels.
    """
    if unknown := set(ops or ()) - set(OPS):
        raise InputError(f"--op {min(unknown)}: must be one of {', '.join(OPS)}")
    if not is_hopper(target_device()[1]):
        raise InputError(
            f"kernels need a Hopper GPU and this is {device_name()}: nothing to time (tests interpret them)"
        )
    ceilings = measure_ceilings(jnp.bfloat16)
    contests = [Contest(spec) for op in ops or OPS for spec in specs(op)]
    rows = [row for contest in contests for row in contest.rows(ceilings, repeats)]
    print(table(rows), file=sys.stderr)
    return {
        "workload": ", ".join(ops or OPS),
        "dtype": ceilings.dtype,
        "device": ceilings.device,
        "ceiling_tflops": ceilings.flops_per_s / 1e12,
        "jax": jax.__version__,
        "ceilings": asdict(ceilings),
        "rows": rows,
    }


class Contest:
    """The implementations of one spec; their programs are compiled in the background from now on."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        made = tuple(map(jnp.asarray, spec.make(0)))
        self._made = made
        self._programs: dict[str, InTurn | Exception] = {}
        for name, prepare in contenders(spec):
            try:
                self._programs[name] = InTurn(*prepare(made))
            except FAILURES as error:
                self._programs[name] = error

    def rows(self, ceilings: Ceilings, repeats: int) -> list[dict[str, Any]]:
        """Returns a row for each implementation.

        A row has `seconds`, `share_of_ceiling` (the least time by arithmetic or traffic at the measured ceilings, over
        `seconds`), `speedup` over XLA, `error` (relative, against float64; None for large specs) and `difference` to
        XLA's result; or `failed`, why there is none.
        """
        spec = self._spec
        floor_s = max(spec.flops / ceilings.flops_per_s, spec.bytes / ceilings.bytes_per_s)
        exact = None
        if spec.flops <= LARGEST_EXACT_FLOPS:
            exact = spec.exact(*map(np.asarray, self._made))
            exact = exact[: len(exact) - spec.padding]
        rows: list[dict[str, Any]] = []
        reference: np.ndarray | None = None
        xla_s = float("nan")
        for name, program in self._programs.items():
            about = {"op": spec.op, "spec": spec.name, "shape": dict(spec.shape), "implementation": name}
            try:
                if isinstance(program, Exception):
                    raise program
                made, seconds = program.run(repeats)
            except FAILURES as error:
                rows.append(about | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
                continue
            result = np.asarray(made[: len(made) - spec.padding]).astype(np.float64)
            if name == XLA:
                reference, xla_s = result, seconds
            rows.append(
                about
                | {"seconds": seconds, "share_of_ceiling": floor_s / seconds, "speedup": xla_s / seconds}
                | {"error": relative_error(result, exact), "difference": relative_error(result, reference)}
            )
        return rows


def relative_error(found: np.ndarray, expected: np.ndarray | None) -> float | None:
    """Returns |found - expected| / |expected|; None if there is nothing to compare with."""
    if expected is None or found.shape != expected.shape:
        return None
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def contenders(spec: Spec) -> Iterator[tuple[str, Callable[[tuple[Any, ...]], Contender]]]:
    """Yields names of implementations and functions from the spec's arguments to the implementation and its own.

    Laying arguments out as another library wants them is not part of its time.
    """
    if spec.op == "prefix_item_attention":
        yield XLA, lambda arguments: _by_layout(spec, arguments)
        yield "cudnn", lambda arguments: _by_rows(arguments, _cudnn)
        yield "tokamax", lambda arguments: _by_rows(arguments, _tokamax_attention)
    else:
        yield XLA, lambda arguments: (partial(spec.run, implementation=XLA), arguments)
        yield "tokamax", _tokamax_gated
    yield MOSAIC_GPU, lambda arguments: (partial(spec.run, implementation=MOSAIC_GPU), arguments)


def _by_layout(spec: Spec, arguments: tuple[Any, ...]) -> Contender:
    """Attention as the decoder has XLA compute it: requests of equal lengths, unfolded."""
    q, k, v, *columns = arguments
    prefix_start, prefix_end, item_start, _ = map(np.asarray, columns)
    in_item = prefix_end > prefix_start
    prefixes, items = np.unique(prefix_start[in_item]), np.unique(item_start[in_item])
    prefix_RP = prefixes[:, None] + np.arange(spec.shape["P"])
    items_RJT = items.reshape(len(prefixes), -1)[..., None] + np.arange(spec.shape["T"])
    N, K, H, M = (spec.shape[axis] for axis in "NKHM")
    answers_only = len(q) == items.size

    def attend(q_QNH: jax.Array, k_MKH: jax.Array, v_MKH: jax.Array) -> jax.Array:
        layout = SharedPrefix(jnp.asarray(prefix_RP, jnp.int32), jnp.asarray(items_RJT, jnp.int32), M)
        if answers_only:
            out = layout.attend_read(q_QNH.reshape(*items_RJT.shape[:2], K, N // K, H), k_MKH, v_MKH)
        else:
            out = layout.attend(q_QNH.reshape(-1, K, N // K, H), k_MKH, v_MKH)
        return out.reshape(-1, N, H)

    return attend, (q, k, v)


def _by_rows(arguments: tuple[Any, ...], attend: Callable[..., jax.Array]) -> Contender:
    """Attention of one row for each item, over a copy of its prefix and itself; what prefixes attend to is left out."""
    q, k, v, *columns = arguments
    prefix_start, prefix_end, item_start, item_end = map(np.asarray, columns)
    in_item = prefix_end > prefix_start
    starts, first = np.unique(np.where(in_item, item_start, -1), return_index=True)
    first = first[starts >= 0]
    queries = np.flatnonzero(in_item).reshape(len(first), -1)
    P = int((prefix_end - prefix_start)[first[0]])
    ends = (item_end - item_start)[queries[0]]
    places = np.arange(int(ends.max()))
    keys = np.concatenate([prefix_start[first][:, None] + np.arange(P), item_start[first][:, None] + places], axis=1)
    seen = np.concatenate([np.ones((len(ends), P), bool), places < ends[:, None]], axis=1)[None, None]
    return attend, (q[queries], k[keys], v[keys], jnp.asarray(seen))


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def _tokamax() -> Any:
    """The library, or ImportError that says it is not there: its row is never just absent."""
    if find_spec("tokamax") is None:
        raise ImportError("tokamax is not installed")
    return import_module("tokamax")


def _tokamax_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    tokamax = _tokamax()
    result: jax.Array = tokamax.dot_product_attention(q, k, v, mask=mask, implementation="mosaic")
    return result


def _tokamax_gated(arguments: tuple[Any, ...]) -> Contender:
    tokamax = _tokamax()

    def gated(x: jax.Array, weights: jax.Array) -> jax.Array:
        result: jax.Array = tokamax.gated_linear_unit(x, weights, activation=jax.nn.swish, implementation="mosaic")
        return result

    x, gate, up = arguments
    return gated, (x, jnp.stack([gate, up], axis=1))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as text, one implementation a line."""
    columns = "{:22} {:42} {:11} {:>10} {:>10} {:>8} {:>9}".format
    lines = [columns("op", "shape", "by", "µs", "of ceiling", "× XLA", "error")]
    for row in rows:
        names = row["op"], row["spec"], row["implementation"]
        if "failed" in row:
            lines.append(columns(*names, "-", "-", "-", "-") + f"  {row['failed']}")
            continue
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        figures = f"{row['seconds'] * 1e6:.1f}", f"{row['share_of_ceiling']:.0%}", f"{row['speedup']:.2f}"
        lines.append(columns(*names, *figures, error))
    return "\n".join(lines)
