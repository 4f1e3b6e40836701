"""`jaxslm bench fit-buckets`: shapes that a sample of traffic fills well."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxslm.atomic import new_file, refuse_existing
from jaxslm.checkpoint import load_checkpoint
from jaxslm.config import BucketConfig
from jaxslm.data_files import Request, read_records
from jaxslm.errors import InputError
from jaxslm.score.buckets import default_buckets, fit_buckets, pass_overhead, with_longer
from jaxslm.score.forward import PackRequest
from jaxslm.score.packing import Packer


def fit_buckets_to_file(
    model: Path, traffic: Path, out: Path, *, count: int = 8, max_tokens: int = 1024, limit: int = 50
) -> dict[str, Any]:
    """Writes buckets fitted to requests of a file as TOML; returns their padding beside that of the defaults.

    The sample is `limit` requests that lie evenly over the file. A few more buckets hold what is longer than anything
    in it, up to the prompt's `max_tokens`.

    Args:
        model: the checkpoint whose tokenizer and prompt make the token lengths.
        traffic: as `jaxslm score --input`, with texts.
        count: most fitted buckets. max_tokens: largest forward pass. limit: how many requests of the file are used.

    Raises:
        InputError: `out` exists, or the checkpoint or the traffic breaks a rule.
    """
    refuse_existing(out)
    prompt = load_checkpoint(model).prompt
    recorded = list(read_records(traffic, Request))
    requests = []
    for place in np.linspace(0, len(recorded) - 1, min(limit, len(recorded))).round().astype(int):
        try:
            encoded = prompt.encode(recorded[place].query, [item.text or "" for item in recorded[place].items])
        except InputError as error:
            raise InputError(f"{traffic}: request {place + 1}: {error}") from None
        requests.append(PackRequest(encoded.prefix_ids, encoded.item_ids))
    sample = fit_buckets([[request] for request in requests], count, max_tokens, pass_overhead(jax.default_backend()))
    fitted = with_longer(sample, prompt.config.max_tokens, max_tokens)
    with new_file(out) as staging:
        comment = f"Fitted to {traffic.name} by `jaxslm bench fit-buckets`; the last ones hold what is longer."
        staging.write_text(buckets_toml(fitted, comment), encoding="utf-8")
    default = default_buckets(jax.default_backend())
    return {
        "out": str(out),
        "buckets": len(fitted.buckets),
        "fitted_to_sample": len(sample.buckets),
        "requests": len(requests),
        "padding_fraction": _padding(requests, fitted),
        "padding_fraction_of_defaults": _padding(requests, default),
        "cost_against_defaults": _cost(requests, fitted) / _cost(requests, default),
    }


def buckets_toml(config: BucketConfig, comment: str) -> str:
    """Returns buckets as the TOML file that `jaxslm score` and `jaxslm serve` read."""
    lines = [f"# {comment}", f"overhead_tokens = {config.overhead_tokens}"]
    for bucket in config.buckets:
        lines += ["", "[[buckets]]", *(f"{name} = {value}" for name, value in bucket.model_dump().items())]
    return "\n".join(lines) + "\n"


def _padding(requests: list[PackRequest], config: BucketConfig) -> float:
    packer = Packer(config)
    forwards = [forward for request in requests for group in packer.pack([request]) for forward in group]
    return 1 - sum(one.real_tokens for one in forwards) / sum(one.bucket.tokens for one in forwards)


def _cost(requests: list[PackRequest], config: BucketConfig) -> float:
    packer = Packer(config)
    return sum(packer.cost_tokens([request]) for request in requests)
