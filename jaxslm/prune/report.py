"""What pruning did, as a JSON-able dict and as tables: sizes and costs before and after, errors by layer."""

from typing import Any

import numpy as np
from rich.table import Table

from jaxslm.checkpoint import Manifest
from jaxslm.config import ModelConfig
from jaxslm.evaluate.metrics import Estimate
from jaxslm.model.cost import attention_flops_per_pair, count_parameters, linear_flops_per_token
from jaxslm.progress import console
from jaxslm.prune.calibrate import Calibration
from jaxslm.prune.masks import Masks
from jaxslm.prune.model import PruneSettings
from jaxslm.prune.width import LayerReport

SIZES = {
    "layers": "layers",
    "mlp_width": "MLP width",
    "kv_heads": "KV groups",
    "vocabulary": "vocabulary",
    "parameters": "parameters",
    "non_embedding_parameters": "  without embeddings",
    "linear_flops_per_token": "linear FLOPs per token",
    "attention_flops_per_pair": "attention FLOPs per pair",
}


LITTLE_TAU = 0.3
"""Below this recovery has nearly all to teach again: in 160 updates it gave tau 0.09 to 0.67 back, where a one-shot
0.61 became 0.73, and no layer dropped is 0.78 (docs/results/pruning.md)."""


def describe(
    dense: Manifest,
    small: Manifest,
    layers: list[LayerReport],
    masks: Masks,
    calibration: Calibration,
    settings: PruneSettings,
    order: Estimate | None,
) -> dict[str, Any]:
    """Returns sizes before and after, each layer's error, the layers kept, the calibration set and the settings.

    Args:
        order: `jaxslm.prune.depth.order_kept` where layers went.
    """
    return {
        "params_sha256": small.params_sha256,
        "parent": dense.params_sha256,
        "before": _sizes(dense.ranker.model),
        "after": _sizes(small.ranker.model),
        "kept_layers": np.flatnonzero(masks.keep_layers).tolist(),
        "layers": [vars(report) for report in layers],
        "order_tau": None if order is None else order.mean,
        "order_tau_ci95": None if order is None else [order.low, order.high],
        "calibration": {
            "requests": len(calibration.sizes),
            "items": sum(calibration.sizes),
            "tokens": calibration.tokens,
            "token_ids_sha256": calibration.sha256,
        },
        "settings": settings.model_dump(),
    }


def print_result(result: dict[str, Any]) -> None:
    """Prints a result of `jaxslm prune` for people, on stderr."""
    before, after = result["before"], result["after"]
    sizes = Table(title=result["checkpoint"], title_justify="left")
    for heading in ("", "before", "after", "change"):
        sizes.add_column(heading, justify="right" if heading else "left")
    for name, words in SIZES.items():
        sizes.add_row(words, _number(before[name]), _number(after[name]), _change(before[name], after[name]))
    console().print(sizes)
    if result["layers"]:
        errors = Table(title="relative error of a layer's outputs on the calibration tokens", title_justify="left")
        for heading in ("layer", "attention", "MLP", "neurons kept", "dead neurons"):
            errors.add_column(heading, justify="right")
        for row in result["layers"]:
            shares = ("" if row[name] is None else f"{row[name]:.4f}" for name in ("attention_error", "mlp_error"))
            errors.add_row(str(row["layer"]), *shares, *(_count(row[name]) for name in ("neurons", "dead_neurons")))
        console().print(errors)
    used = result["calibration"]
    console().print(
        f"layers kept: {', '.join(map(str, result['kept_layers']))}\n"
        f"calibration: {result['calibration_file']}, {used['requests']:,} requests with {used['items']:,} items,"
        f" {used['tokens']:,} tokens (sha256 {used['token_ids_sha256'][:16]}…)\n"
        f"{result['seconds']:,.1f} s"
    )
    if result["order_tau"] is not None:
        console().print(_order_words(result["order_tau"], *result["order_tau_ci95"]))


def _order_words(tau: float, low: float, high: float) -> str:
    words = (
        f"order of the calibration lists: Kendall's tau {tau:.2f} [{low:.2f}, {high:.2f}] to the model before"
        " (1: the same, 0: nothing to do with it)"
    )
    if tau >= LITTLE_TAU:
        return words
    return (
        f"{words}: recovery begins from little. Neurons and KV groups alone (--mlp-keep, --kv-groups-keep, --by-layer)"
        " or --depth-criterion greedy keep more as a rule"
    )


def _sizes(config: ModelConfig) -> dict[str, Any]:
    parameters = count_parameters(config)
    return {
        "layers": config.num_layers,
        "mlp_width": config.mlp_width,
        "kv_heads": config.num_kv_heads,
        "vocabulary": config.vocab_size,
        "parameters": parameters.total,
        "non_embedding_parameters": parameters.non_embedding,
        "linear_flops_per_token": linear_flops_per_token(config),
        "attention_flops_per_pair": attention_flops_per_pair(config),
    }


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{min(value):,} to {max(value):,}"


def _count(value: int | None) -> str:
    return f"{value:,}" if value else ""


def _change(before: Any, after: Any) -> str:
    if before == after or not (isinstance(before, int) and isinstance(after, int)):
        return ""
    return f"{after / before - 1:+.1%}"
