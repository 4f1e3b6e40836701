"""`jaxslm score`: a file of requests in, a file of scores out."""

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxslm.atomic import new_file, refuse_existing
from jaxslm.config import BucketConfig, ComputeDtype, load_toml
from jaxslm.data_files import Request, read_records
from jaxslm.errors import InputError
from jaxslm.progress import console, progress

if TYPE_CHECKING:
    from jaxslm.items.store import Store
    from jaxslm.score.scorer import Ranker


def score_file(
    model: Path,
    input_file: Path,
    output: Path,
    buckets: Path | None = None,
    *,
    calibrated: bool = False,
    store: str | None = None,
    dtype: ComputeDtype | None = None,
) -> dict[str, Any]:
    """Scores every request of a file; returns a summary as a JSON-able dict.

    A line of the output is `{"scores": [P(yes)], "logits": [z_yes - z_no], "truncated": [bool]}`, in the order of the
    request's items. The whole input is checked before the model loads, and the output appears only when it is complete.

    With a store, items are read by their ids as embedding tokens, and a line holds "status" in place of "truncated":
    "found", or why an item's score is null: "not_found", "stale" (made for another model) or "corrupt". Where the
    compressor has `text_fields`, an item's text is what it reads of them; otherwise it is not read.

    Args:
        store: URL of an item store; None scores texts.
        buckets: TOML of `jaxslm bench fit-buckets`; the defaults if None.
        calibrated: adds "calibrated": [P(yes)] to every line, by the checkpoint's calibration.
        dtype: compute dtype; float32 on a CPU and bfloat16 elsewhere if None.

    Raises:
        InputError: the output exists, the checkpoint carries no calibration to apply, the store cannot serve it, or
            it or a line of the input breaks a rule.
        StoreUnavailable: the store fails; nothing is written.
    """
    refuse_existing(output)
    if calibrated:
        _check_calibration(model)
    fitted = load_toml(buckets, BucketConfig) if buckets else None
    num_items = 0
    for number, request in enumerate(read_records(input_file, Request), start=1):
        _checked(input_file, number, request, by_id=store is not None)
        num_items += len(request.items)

    from jaxslm.score.scorer import load

    ranker = load(model, dtype, buckets=fitted)
    num_requests, counts = 0, Counter[str]()
    with ExitStack() as stack:
        answer = _text_answers if store is None else _store_answers(ranker, stack.enter_context(_opened(store)))
        start = time.perf_counter()
        lines = stack.enter_context(stack.enter_context(new_file(output)).open("w", encoding="utf-8"))
        bar = stack.enter_context(progress())
        task = bar.add_task("scoring items", total=num_items)
        for number, request in enumerate(read_records(input_file, Request), start=1):
            try:
                line, found = answer(ranker, request, calibrated)
            except InputError as error:
                raise InputError(f"{input_file}: request {number}: {error}") from None
            lines.write(json.dumps(line) + "\n")
            num_requests += 1
            counts.update(found)
            bar.advance(task, len(request.items))
    seconds = time.perf_counter() - start
    if counts["truncated"]:
        limit, cut = ranker.config.prompt.max_tokens, counts["truncated"]
        console().print(f"{cut} of {num_items} items were cut to rows of {limit} tokens (field 'truncated')")
    return {
        "output": str(output),
        "requests": num_requests,
        "items": num_items,
        **({"truncated": counts["truncated"]} if store is None else {"status": dict(counts)}),
        "seconds": round(seconds, 3),
        "items_per_s": round(num_items / seconds, 2),
    }


Answers = Callable[["Ranker", Request, bool], tuple[dict[str, Any], list[str]]]
"""(ranker, request, calibrated) -> (a line of the output, what is counted of its items)."""


def _text_answers(ranker: "Ranker", request: Request, calibrated: bool) -> tuple[dict[str, Any], list[str]]:
    scores = ranker.score_request(request.query, [item.text or "" for item in request.items])
    line = {
        "scores": scores.probabilities.tolist(),
        "logits": scores.log_odds.tolist(),
        "truncated": scores.truncated,
    }
    if calibrated:
        line["calibrated"] = scores.calibrated.tolist()
    return line, ["truncated"] * sum(scores.truncated)


def _opened(url: str) -> "Store":
    from jaxslm.items.store import open_store

    return open_store(url, read_only=True)


def _store_answers(ranker: "Ranker", store: "Store") -> Answers:
    """Returns what scores items by id; refuses a store that was written for another model."""
    from jaxslm.compress.encoder import identity_of
    from jaxslm.items.lookup import ItemVectors

    known = ItemVectors(store, identity_of(ranker.manifest))
    known.check_store()
    compressor = ranker.manifest.compressor
    reads_text = compressor is not None and bool(compressor.text_fields)

    def answer(ranker: "Ranker", request: Request, calibrated: bool) -> tuple[dict[str, Any], list[str]]:
        lookup = known.get([item.id or "" for item in request.items])
        found = [place for place, each in enumerate(lookup.vectors) if each is not None]
        names = ("scores", "logits", *(("calibrated",) if calibrated else ()))
        line: dict[str, Any] = {name: [None] * len(request.items) for name in names} | {"status": lookup.status}
        if found:
            vectors = [each for each in lookup.vectors if each is not None]
            texts = [request.items[place].text or "" for place in found] if reads_text else None
            scores = ranker.score_vectors(request.query, vectors, texts)
            columns = [scores.probabilities, scores.log_odds, *([scores.calibrated] if calibrated else [])]
            for name, column in zip(names, columns, strict=True):
                for place, value in zip(found, column.tolist(), strict=True):
                    line[name][place] = value
        return line, list(lookup.status)

    return answer


def _check_calibration(model: Path) -> None:
    from jaxslm.checkpoint import load_manifest

    if load_manifest(model).calibration is None:
        raise InputError(f"{model}: carries no calibration; `jaxslm calibrate` makes a checkpoint that does")


def _checked(input_file: Path, number: int, request: Request, *, by_id: bool) -> None:
    for place, item in enumerate(request.items):
        if by_id and item.id is None:
            raise InputError(f"{input_file}: request {number}: items.{place}.id: needed to find the item in the store")
        if not by_id and not (item.text or "").strip():
            raise InputError(f"{input_file}: request {number}: items.{place}.text: must not be empty")
