"""What compression costs and saves: embedding tokens against full text, on the same candidates, in the same run."""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxslm.compress.encoder import ItemEncoder, load_encoder
from jaxslm.compress.splice import text_of
from jaxslm.data_files import Item, Query
from jaxslm.evaluate.candidates import document_text
from jaxslm.evaluate.rerank import Report, Score, evaluate_ranker
from jaxslm.evaluate.significance import PairedDifference, paired_bootstrap
from jaxslm.items.record import Record, StorageDtype, pack_record, unpack_record
from jaxslm.score.scorer import Ranker, load

RARE = 5
"""A word is an exact skill if at most this many items have it."""
MEASURE = "ndcg_at_10"
SLICES = {
    "all": "every query",
    "exact skill": f"a word of the query stands in a relevant item, and in at most {RARE} items",
    "number": "a digit, or a number as a word",
    "place": "in, at, near or on, before a capital letter or a kind of place",
    "negation": "not, no, non-, never, without, except, other than",
}
_PLACES = (
    "office|site|field|hospital|clinic|school|classroom|home|plant|factory|store|shop|warehouse|airport|ship|vessel|farm"
    "|mine|laboratory|kitchen|restaurant|hotel|court|prison|forest|road|street|city|rural area|urban area|facility"
)
_PATTERNS = {
    "number": re.compile(r"\d|\b(two|three|four|five|six|seven|eight|nine|ten|hundred|thousand)\b", re.IGNORECASE),
    "place": re.compile(rf"\b(?:in|at|near|on)\s+(?:[A-Z]|(?:\w+\s+){{0,2}}(?:{_PLACES})(?:s|es)?\b)"),
    "negation": re.compile(r"\b(?:not|no|never|without|except|other than)\b|\bnon-?\w", re.IGNORECASE),
}


@dataclass(frozen=True)
class Arm:
    """A checkpoint with a compressor, loaded, with the vectors of all items for every k and their places by id."""

    name: str
    ranker: Ranker
    encoder: ItemEncoder
    vectors: Mapping[int, np.ndarray]
    place: Mapping[str, int]

    @classmethod
    def load(cls, path: Path, items: Mapping[str, Item]) -> "Arm":
        """Raises InputError if the folder is no checkpoint with a compressor."""
        encoder = load_encoder(path)
        place = {item_id: number for number, item_id in enumerate(items)}
        return cls(path.name, load(path), encoder, encoder.encode_all(list(items.values())), place)

    def score(self, k: int, dtype: StorageDtype = "float32") -> Score:
        """Returns the scoring function on k vectors per item, as records of that dtype give them back."""
        identity, fields = self.encoder.identity, self.encoder.config.text_fields
        stored = self.vectors[k]
        if dtype != "float32":
            records = [pack_record(Record(identity, each, "0" * 64), dtype) for each in stored]
            stored = np.stack([unpack_record(record, identity).vectors for record in records])

        def score(query: str, items: list[Item]) -> np.ndarray:
            texts = [text_of(item, fields) for item in items] if fields else None
            return self.ranker.score_vectors(query, stored[[self.place[item.id] for item in items]], texts).log_odds

        return score

    def tokens_per_item(self, items: Sequence[Item], k: int | None) -> float:
        """Returns the mean number of places that an item takes behind the query; k None: as full text."""
        if k is None:
            return _text_tokens(self.ranker, items)
        config = self.encoder.config
        texts = self.ranker.prompt.text_ids([text_of(item, config.text_fields) for item in items])
        beside = np.mean([min(len(ids), config.max_text_tokens) for ids in texts])
        return float(k + beside + config.answer_tokens)


def study(
    arms: Sequence[Path],
    items: Mapping[str, Item],
    queries: Sequence[Query],
    *,
    full_text: Path | None = None,
    candidates: int = 50,
    limit: int | None = None,
    repeats: int = 3,
) -> dict[str, Any]:
    """Returns a result file: per arm a row on full text, one for each k, and the largest k from int8 records.

    A row's "minus_text" is its nDCG@10 minus that of full text, paired by query, with its 95 % interval; "slices" holds
    the same within the queries of each slice. Items per second are of one query with all items, the median of `repeats`
    warm passes, the rows of an arm in turns.

    Args:
        full_text: the ranker whose full text is the reference, with a row of its own: what the arms were made from. If
            None it is the first arm's ranker, which training has changed.

    Raises:
        InputError: a folder is no checkpoint, one of `arms` has no compressor, or the data break a rule.
    """
    rows: list[dict[str, Any]] = []
    reference: Report | None = None
    listed = list(items.values())

    def add(name: str, score: Score, row: dict[str, Any]) -> None:
        nonlocal reference
        report = evaluate_ranker(score, queries, items, k=candidates, limit=limit, name=name)
        reference = reference or report
        by_slice = slices_of([query for query in queries if query.query_id in report.run], items)
        rows.append(
            report.to_json()
            | row
            | {"minus_text": _difference(_paired(report, reference, by_slice["all"]))}
            | {"slices": _slices(report, reference, by_slice)}
        )

    if full_text is not None:
        ranker = load(full_text)
        [speed] = items_per_s([ranker.log_odds], queries[0].query, listed, repeats)
        shared: dict[str, Any] = {"arm": full_text.name, "k": None, "records": None}
        add(f"{full_text.name}, text", ranker.log_odds, shared | _cost(_text_tokens(ranker, listed), speed))
    for arm in (Arm.load(path, items) for path in arms):
        largest = max(arm.vectors)
        runs: dict[tuple[int | None, StorageDtype], Score] = {(None, "float32"): arm.ranker.log_odds}
        for each in arm.vectors:
            runs[each, "float32"] = arm.score(each)
        runs[largest, "int8"] = arm.score(largest, "int8")
        speeds = items_per_s(list(runs.values()), queries[0].query, listed, repeats)
        for (k, dtype), speed in zip(runs, speeds, strict=True):
            name = f"{arm.name}, {'text' if k is None else f'k = {k}'}{', int8' if dtype == 'int8' else ''}"
            shared = {"arm": arm.name, "k": k, "records": None if k is None else dtype}
            add(name, runs[k, dtype], shared | _cost(arm.tokens_per_item(listed, k), speed))
    conditions = reference.conditions() if reference is not None else {}
    return {"rows": rows, "conditions": conditions | {"slices": SLICES, "speed_items": len(items)}}


def slices_of(queries: Sequence[Query], items: Mapping[str, Item]) -> dict[str, list[str]]:
    """Returns the ids of the queries in each of `SLICES`; a query may be in several."""
    words_of = {item_id: _words(document_text(item)) for item_id, item in items.items()}
    counts = Counter(word for words in words_of.values() for word in words)

    def has_exact_skill(query: Query) -> bool:
        relevant = max(judged.label for judged in query.items)
        wanted = {word for word in _words(query.query) if counts[word] <= RARE}
        return any(wanted & words_of[judged.id] for judged in query.items if judged.label == relevant)

    rules: dict[str, Callable[[Query], bool]] = {"all": lambda query: True, "exact skill": has_exact_skill}
    for name, pattern in _PATTERNS.items():
        rules[name] = lambda query, pattern=pattern: bool(pattern.search(query.query))  # type: ignore[misc]
    return {name: [query.query_id for query in queries if rules[name](query)] for name in SLICES}


def items_per_s(scores: Sequence[Score], query: str, items: list[Item], repeats: int) -> list[float]:
    """Returns the median speed of each scoring function over warm passes, taken in turns."""
    seconds = np.empty((repeats + 1, len(scores)))
    for repeat in range(repeats + 1):
        for number, score in enumerate(scores):
            start = time.perf_counter()
            score(query, items)
            seconds[repeat, number] = time.perf_counter() - start
    return [float(each) for each in len(items) / np.median(seconds[1:], axis=0)]  # the first pass compiles


def _text_tokens(ranker: Ranker, items: Sequence[Item]) -> float:
    return float(np.mean([len(ids) for ids in ranker.prompt.encode("any", items).item_ids]))


def _cost(tokens_per_item: float, speed: float) -> dict[str, float]:
    return {"tokens_per_item": tokens_per_item, "items_per_s": round(speed, 2)}


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9][a-z0-9+#.-]*[a-z0-9+#]", text.lower()))


def _paired(report: Report, reference: Report, ids: Sequence[str]) -> PairedDifference:
    ours, theirs = (each.ranker.per_query(MEASURE) for each in (report, reference))
    return paired_bootstrap({each: ours[each] for each in ids}, {each: theirs[each] for each in ids})


def _difference(difference: PairedDifference) -> dict[str, Any]:
    return {
        "mean": difference.mean,
        "ci95": [difference.low, difference.high],
        "queries": difference.queries,
    }


def _slices(report: Report, reference: Report, by_slice: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    values = report.ranker.per_query(MEASURE)
    return {
        name: {MEASURE: float(np.mean([values[each] for each in ids]))}
        | {"minus_text": _difference(_paired(report, reference, ids))}
        for name, ids in by_slice.items()
        if ids
    }
