"""The card of a checkpoint: what it is, how large, what a token costs, where it comes from."""

from pathlib import Path
from typing import Any

from rich.table import Table

from jaxslm.checkpoint import load_manifest
from jaxslm.model.cost import attention_flops_per_pair, count_parameters, linear_flops_per_token
from jaxslm.progress import console


def describe(checkpoint: Path) -> dict[str, Any]:
    """Returns the card of a checkpoint as a JSON-able dict. Raises InputError as `load_manifest`."""
    manifest = load_manifest(checkpoint)
    config = manifest.ranker
    parameters = count_parameters(config.model)
    return {
        "checkpoint": str(checkpoint),
        "model": config.model.model_dump(exclude_none=True),
        "prompt": config.prompt.model_dump(),
        "label_token_ids": list(config.label_token_ids),
        "parameters": parameters.total,
        "embedding_parameters": parameters.embedding,
        "non_embedding_parameters": parameters.non_embedding,
        "linear_flops_per_token": linear_flops_per_token(config.model),
        "attention_flops_per_pair": attention_flops_per_pair(config.model),
        "dtype": manifest.params_dtype,
        "source": manifest.source,
        "params_sha256": manifest.params_sha256,
        "parent": manifest.parent,
        "template_sha256": manifest.template_sha256,
        "metrics": manifest.metrics,
        "calibration": manifest.calibration.model_dump() if manifest.calibration else None,
        "versions": manifest.versions,
    }


def print_card(card: dict[str, Any]) -> None:
    """Prints a card for people, on stderr."""
    model = card["model"]
    G = model["queries_per_kv"]
    kv_heads = model["num_kv_heads"]
    heads = (
        f"{kv_heads * G} query heads on {kv_heads} key/value heads"
        if isinstance(kv_heads, int)
        else f"{G} query heads on each of {kv_heads} key/value heads"
    )
    rows = {
        "source": card["source"],
        "shape": f"{model['family']}, {model['num_layers']} layers of width {model['width']}, MLP {model['mlp_width']}",
        "attention": f"{heads} of width {model['head_dim']}",
        "parameters": f"{card['parameters']:,} ({card['non_embedding_parameters']:,} in layers), {card['dtype']}",
        "cost": f"{card['linear_flops_per_token'] / 1e6:,.1f} MFLOP per token"
        f" + {card['attention_flops_per_pair'] / 1e3:,.1f} kFLOP per attended pair",
        "prompt": f"{card['prompt']['template']}, at most {card['prompt']['max_tokens']} tokens,"
        f" (no, yes) = {tuple(card['label_token_ids'])}",
        "weights": f"sha256 {card['params_sha256'][:16]}…"
        + (f", made from {card['parent'][:16]}…" if card["parent"] else ""),
    }
    if calibration := card["calibration"]:
        scale, bias = calibration["scale"], calibration["bias"]
        rows["calibration"] = f"P(yes) = sigmoid({scale:.4g} z {bias:+.4g}), {calibration['method']}"
    rows |= {name: f"{value:.4f}" for name, value in card["metrics"].items()}
    table = Table(title=card["checkpoint"], show_header=False, title_justify="left")
    for name, text in rows.items():
        table.add_row(name, text)
    console().print(table)
