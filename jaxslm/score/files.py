"""`jaxslm score`: a file of requests in, a file of scores out."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxslm.atomic import new_file, refuse_existing
from jaxslm.config import BucketConfig, ComputeDtype, load_toml
from jaxslm.data_files import Request, RequestItem, read_records
from jaxslm.errors import InputError
from jaxslm.progress import console, progress

if TYPE_CHECKING:
    from jaxslm.items.store import Store
    from jaxslm.score.compressed import Part
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
    compressor has `text_fields`, every item needs a text too: what `jaxslm.compress.splice.text_of` gives of its
    fields, which may be empty. Otherwise it is not read.

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
    num_items = _checked_items(input_file) if store is None else _checked_ids(input_file, _text_fields(model))

    from jaxslm.score.scorer import load

    ranker = load(model, dtype, buckets=fitted)
    num_requests, counts = 0, Counter[str]()
    with ExitStack() as stack:
        prepare = _preparer(ranker, None if store is None else stack.enter_context(_opened(store)))
        start = time.perf_counter()
        lines = stack.enter_context(stack.enter_context(new_file(output)).open("w", encoding="utf-8"))
        bar = stack.enter_context(progress())
        task = bar.add_task("scoring items", total=num_items)
        for group in _groups(input_file, prepare, _group_tokens(ranker)):
            for line in _lines(ranker, group, calibrated=calibrated):
                lines.write(json.dumps(line) + "\n")
            num_requests += len(group)
            counts.update(word for each in group for word in each.counted)
            bar.advance(task, sum(each.num_items for each in group))
    seconds = time.perf_counter() - start
    if counts["truncated"]:
        prompt = ranker.config.prompt
        own = f"{prompt.max_item_tokens} tokens or " if prompt.max_item_tokens else ""
        room = f"{own}the room in rows of {prompt.max_tokens} tokens"
        console().print(f"{counts['truncated']} of {num_items} items were cut to {room} (field 'truncated')")
    return {
        "output": str(output),
        "requests": num_requests,
        "items": num_items,
        **({"truncated": counts["truncated"]} if store is None else {"status": dict(counts)}),
        "seconds": round(seconds, 3),
        "items_per_s": round(num_items / seconds, 2),
    }


@dataclass(frozen=True)
class _Prepared:
    """A request of the file in token ids.

    Attributes:
        parts: what is scored of it, with the places of the items in the request.
        about: what its line says beside scores. counted: words that the summary counts.
    """

    num_items: int
    parts: "Sequence[Part]"
    about: Mapping[str, Sequence[Any]]
    counted: Sequence[str]

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts."""
        return sum(part.num_tokens for _, part in self.parts)


Prepare = Callable[[Request], _Prepared]


def _group_tokens(ranker: "Ranker") -> int:
    """Returns how many tokens of requests are scored together.

    Enough that the last pass, which is seldom full, counts little, and few enough that progress shows.
    """
    return 1 << 13 if ranker.scorer.devices[0].platform == "cpu" else 1 << 17


def _groups(input_file: Path, prepare: Prepare, tokens: int) -> Iterator[list[_Prepared]]:
    """Yields the requests of a file in order, prepared, in lists of about so many tokens."""
    group: list[_Prepared] = []
    waiting = 0
    for number, request in enumerate(read_records(input_file, Request), start=1):
        try:
            group.append(prepare(request))
        except InputError as error:
            raise InputError(f"{input_file}: request {number}: {error}") from None
        waiting += group[-1].num_tokens
        if waiting >= tokens:
            yield group
            group, waiting = [], 0
    if group:
        yield group


def _lines(ranker: "Ranker", group: Sequence[_Prepared], *, calibrated: bool) -> Iterator[dict[str, Any]]:
    """Yields the line of each request; they share forward passes."""
    from jaxslm.score.compressed import logits_of_parts
    from jaxslm.score.scorer import Scores

    found = logits_of_parts(ranker.scorer, [(each.num_items, each.parts) for each in group])
    for each, logits in zip(group, found, strict=True):
        scores = Scores(logits, [False] * each.num_items, ranker.manifest.calibration)
        columns = {"scores": scores.probabilities, "logits": scores.log_odds}
        if calibrated:
            columns["calibrated"] = scores.calibrated
        scored = {place for places, _ in each.parts for place in places}
        yield {
            name: [value if place in scored else None for place, value in enumerate(column.tolist())]
            for name, column in columns.items()
        } | dict(each.about)


def _preparer(ranker: "Ranker", store: "Store | None") -> Prepare:
    return _text_preparer(ranker) if store is None else _store_preparer(ranker, store)


def _text_preparer(ranker: "Ranker") -> Prepare:
    from jaxslm.score.forward import PackRequest

    def prepare(request: Request) -> _Prepared:
        encoded = ranker.prompt.encode(request.query, [item.text or "" for item in request.items])
        num_items = len(encoded.item_ids)
        parts = [(range(num_items), PackRequest(encoded.prefix_ids, encoded.item_ids))]
        truncated = encoded.truncated
        return _Prepared(num_items, parts, {"truncated": truncated}, ["truncated"] * sum(truncated))

    return prepare


def _opened(url: str) -> "Store":
    from jaxslm.items.store import open_store

    return open_store(url, read_only=True)


def _store_preparer(ranker: "Ranker", store: "Store") -> Prepare:
    """Returns what looks items up by id; refuses a store that was written for another model."""
    from jaxslm.compress.encoder import identity_of
    from jaxslm.items.lookup import ItemVectors
    from jaxslm.score.compressed import VectorRequest

    known = ItemVectors(store, identity_of(ranker.manifest))
    known.check_store()
    scorer = ranker.required_vector_scorer

    def prepare(request: Request) -> _Prepared:
        lookup = known.get([item.id or "" for item in request.items])
        found = [place for place, each in enumerate(lookup.vectors) if each is not None]
        parts: list[Part] = []
        if found:
            vectors = [each for each in lookup.vectors if each is not None]
            texts = [request.items[place].text or "" for place in found] if scorer.reads_texts else None
            packed = scorer.pack(VectorRequest(request.query, vectors, texts, found))
            parts = [([found[place] for place in places], part) for places, part in packed]
        return _Prepared(len(request.items), parts, {"status": lookup.status}, lookup.status)

    return prepare


def _check_calibration(model: Path) -> None:
    from jaxslm.checkpoint import load_manifest

    if load_manifest(model).calibration is None:
        raise InputError(f"{model}: carries no calibration; `jaxslm calibrate` makes a checkpoint that does")


def _text_fields(model: Path) -> Sequence[str]:
    from jaxslm.checkpoint import load_manifest

    compressor = load_manifest(model).compressor
    return compressor.text_fields if compressor is not None else ()


def _checked_items(input_file: Path) -> int:
    """Returns the number of items of a file of requests; raises InputError if one has no text."""
    num_items = 0
    for where, item in _items(input_file):
        if not (item.text or "").strip():
            raise InputError(f"{where}.text: must not be empty")
        num_items += 1
    return num_items


def _checked_ids(input_file: Path, text_fields: Sequence[str]) -> int:
    """Returns the number of items of a file of requests; raises InputError if one has no id, or no text of its fields.

    A text may be empty: not every item has these fields.
    """
    num_items = 0
    for where, item in _items(input_file):
        if item.id is None:
            raise InputError(f"{where}.id: needed to find the item in the store")
        if text_fields and item.text is None:
            fields = ", ".join(text_fields)
            raise InputError(f"{where}.text: needed: this compressor reads {fields} beside the vectors (may be empty)")
        num_items += 1
    return num_items


def _items(input_file: Path) -> Iterator[tuple[str, RequestItem]]:
    """Yields the items of all requests, and where they stand."""
    for number, request in enumerate(read_records(input_file, Request), start=1):
        for place, item in enumerate(request.items):
            yield f"{input_file}: request {number}: items.{place}", item
