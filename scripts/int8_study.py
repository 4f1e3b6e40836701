"""What int8 would buy on this device and what it would cost: an MLP's time through qwix, a ranker's best posting.

    pip install qwix
    python scripts/int8_study.py --model quickstart/ranker --data quickstart/demo/jobs --limit 60 --candidates 20

Weights are rounded per output channel, activations per row, as it goes. "narrowing in float32" leaves out the linear
maps with fewer outputs than inputs: down, keys and values. Prints one JSON object last.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from jaxslm.errors import exit_on_input_error
from jaxslm.evaluate.checkpoints import evaluate_loaded, read_split
from jaxslm.evaluate.rerank import Report
from jaxslm.score.parallel import device_name
from jaxslm.score.scorer import load
from pallas_kernels.gated_mlp.reference import matmul

USES = ("jaxslm.model.layers.matmul", "pallas_kernels.gated_mlp.reference.matmul")
Matmul = Callable[[jax.Array, Any], jax.Array]


def int8(x: jax.Array, w: Any) -> jax.Array:
    """[..., C] times [C, N], both rounded to int8; w may be rounded already."""
    rows = x.reshape(-1, x.shape[-1])
    left = qwix.quantize(rows, jnp.int8, channelwise_axes=[0])
    right = w if isinstance(w, qwix.QArray) else qwix.quantize(w, jnp.int8, channelwise_axes=[1])
    product = qwix.dot_general(left, right, (((1,), (0,)), ((), ())))
    return jnp.asarray(product).reshape(*x.shape[:-1], -1).astype(x.dtype)


def int8_weights(x: jax.Array, w: Any) -> jax.Array:
    """The same with float32 activations."""
    return jnp.asarray(qwix.dot_general(x, w, (((1,), (0,)), ((), ()))))


def widening_int8(x: jax.Array, w: jax.Array) -> jax.Array:
    """int8 unless the map narrows."""
    return matmul(x, w) if w.shape[0] > w.shape[1] else int8(x, w)


def time_mlp(width: int, hidden: int, rows: int = 1024, repeats: int = 15) -> list[dict[str, Any]]:
    """Returns milliseconds and relative error of one SwiGLU MLP by kind of product."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (rows, width))
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    exact = [0.03 * jax.random.normal(key, shape) for key, shape in zip(keys[1:], shapes, strict=True)]
    rounded = [qwix.quantize(w, jnp.int8, channelwise_axes=[1]) for w in exact]
    expected, found = None, []
    for name, product, weights in (
        ("float32", matmul, exact),
        ("int8 weights", int8_weights, rounded),
        ("int8 weights and activations", int8, rounded),
    ):

        def mlp(x: jax.Array, gate: Any, up: Any, down: Any, product: Matmul = product) -> jax.Array:
            return product(jax.nn.silu(product(x, gate)) * product(x, up), down)

        compiled = jax.jit(mlp)
        out = compiled(x, *weights)
        expected = out if expected is None else expected
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(x, *weights))
            taken.append(1000 * (time.perf_counter() - start))
        error = float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))
        found.append({"width": width, "hidden": hidden, "product": name, "ms": float(np.median(taken)), "error": error})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--candidates", type=int, default=50)
    options = parser.parse_args()

    def report(name: str, product: Matmul | None) -> Report:
        with ExitStack() as stack:
            for place in USES if product else ():
                stack.enter_context(mock.patch(place, product))
            jax.clear_caches()
            ranker = load(options.model)
            lists = {"candidates": options.candidates, "limit": options.limit}
            return evaluate_loaded(ranker, options.data, options.split, name=name, **lists)

    def best(run: Mapping[str, float]) -> str:
        return max(run, key=lambda item_id: run[item_id])

    labels = {
        query.query_id: {judged.id: judged.label for judged in query.items}
        for query in read_split(options.data, options.split)[1]
    }
    exact, rows = report("float32", None), []
    for name, product in (("int8", int8), ("int8, narrowing in float32", widening_int8)):
        found = report(name, product)
        pairs = [(labels[query], best(exact.run[query]), best(run)) for query, run in found.run.items()]
        rows.append(
            {
                "name": name,
                "ndcg_at_10": found.ranker.estimates["ndcg_at_10"].mean,
                "float32_ndcg_at_10": exact.ranker.estimates["ndcg_at_10"].mean,
                "same_best": float(np.mean([a == b for _, a, b in pairs])),
                "same_label_of_best": float(np.mean([judged.get(a, 0) == judged.get(b, 0) for judged, a, b in pairs])),
            }
        )
    mlps = [row for sizes in ((576, 1536), (1024, 3072)) for row in time_mlp(*sizes)]
    print(json.dumps({"mlp": mlps, "rows": rows, "device": device_name(), "jax": jax.__version__}))


if __name__ == "__main__":
    with exit_on_input_error("int8_study"):
        main()
