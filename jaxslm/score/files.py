"""`jaxslm score`: a file of requests in, a file of scores out."""

import json
import time
from pathlib import Path
from typing import Any

from jaxslm.atomic import new_file, refuse_existing
from jaxslm.config import BucketConfig, load_toml
from jaxslm.data_files import Item, Request, read_records
from jaxslm.errors import InputError
from jaxslm.progress import console, progress


def score_file(
    model: Path, input_file: Path, output: Path, buckets: Path | None = None, *, calibrated: bool = False
) -> dict[str, Any]:
    """Scores every request of a file; returns a summary as a JSON-able dict.

    A line of the output is `{"scores": [P(yes)], "logits": [z_yes - z_no], "truncated": [bool]}`, in the order of the
    request's items. The whole input is checked before the model loads, and the output appears only when it is complete.

    Args:
        buckets: TOML of `jaxslm bench fit-buckets`; the defaults if None.
        calibrated: adds "calibrated": [P(yes)] to every line, by the checkpoint's calibration.

    Raises:
        InputError: the output exists, the checkpoint carries no calibration to apply, or it or a line of the input
            breaks a rule.
    """
    refuse_existing(output)
    if calibrated:
        _check_calibration(model)
    fitted = load_toml(buckets, BucketConfig) if buckets else None
    num_items = 0
    for number, request in enumerate(read_records(input_file, Request), start=1):
        _texts(input_file, number, request)
        num_items += len(request.items)

    from jaxslm.score.scorer import load

    ranker = load(model, buckets=fitted)
    num_requests = num_truncated = 0
    start = time.perf_counter()
    with new_file(output) as staging, staging.open("w", encoding="utf-8") as lines, progress() as bar:
        task = bar.add_task("scoring items", total=num_items)
        for number, request in enumerate(read_records(input_file, Request), start=1):
            try:
                scores = ranker.score_request(request.query, _texts(input_file, number, request))
            except InputError as error:
                raise InputError(f"{input_file}: request {number}: {error}") from None
            answer = {
                "scores": scores.probabilities.tolist(),
                "logits": scores.log_odds.tolist(),
                "truncated": scores.truncated,
            }
            if calibrated:
                answer["calibrated"] = scores.calibrated.tolist()
            lines.write(json.dumps(answer) + "\n")
            num_requests += 1
            num_truncated += sum(scores.truncated)
            bar.advance(task, len(request.items))
    seconds = time.perf_counter() - start
    if num_truncated:
        limit = ranker.config.prompt.max_tokens
        console().print(f"{num_truncated} of {num_items} items were cut to rows of {limit} tokens (field 'truncated')")
    return {
        "output": str(output),
        "requests": num_requests,
        "items": num_items,
        "truncated": num_truncated,
        "seconds": round(seconds, 3),
        "items_per_s": round(num_items / seconds, 2),
    }


def _check_calibration(model: Path) -> None:
    from jaxslm.checkpoint import load_manifest

    if load_manifest(model).calibration is None:
        raise InputError(f"{model}: carries no calibration; `jaxslm calibrate` makes a checkpoint that does")


def _texts(input_file: Path, number: int, request: Request) -> list[str | Item]:
    texts: list[str | Item] = []
    for place, item in enumerate(request.items):
        if item.text is None or not item.text.strip():
            raise InputError(f"{input_file}: request {number}: items.{place}.text: must not be empty")
        texts.append(item.text)
    return texts
