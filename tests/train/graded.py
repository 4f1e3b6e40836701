"""A small graded data set made in code, the pipelines over it, and what their batches must hold."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxslm.config import PromptConfig, validate
from jaxslm.data_files import read_items
from jaxslm.prompt import Prompt
from jaxslm.train.data import BatchIterator, pair_batches, ranker_batches
from jaxslm.train.data_settings import DataSettings, PairSettings
from jaxslm.train.packing import Batch
from tests.tiny import tiny_tokenizer_json

WORDS = ("python", "developer", "engineer", "nurse", "baker", "welder", "pilot", "teacher", "lawyer", "cook", "painter")
ITEMS, QUERIES, JUDGED = 60, 23, 12
NEVER_JUDGED = {f"i{number}" for number in range(50, ITEMS)}
SHAPE = {"lists_per_batch": 3, "tokens_per_batch": 2400, "max_prefix_tokens": 90, "max_item_tokens": 96}
PROMPT = Prompt(tiny_tokenizer_json(), PromptConfig(template="yes-no", instruction="Match?"))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_graded(folder: Path) -> Path:
    """Writes items and queries as JSON Lines and Parquet; returns the folder.

    Each query judges 12 items: one with label 1, two with 2/3, eight with 1/3, one with 0.
    """
    generator = np.random.default_rng(0)

    def words(low: int, high: int) -> str:
        return " ".join(generator.choice(WORDS, size=generator.integers(low, high)))

    items = [{"id": f"i{number}", "title": words(1, 3), "text": words(1, 12)} for number in range(ITEMS)]
    queries = []
    for number in range(QUERIES):
        ids = generator.choice(50, size=JUDGED, replace=False)
        labels = [1.0, 2 / 3, 2 / 3, *[1 / 3] * 8, 0.0]
        judged = [{"id": f"i{row}", "label": label} for row, label in zip(ids, labels, strict=True)]
        queries.append({"query_id": f"q{number}", "query": f"{words(1, 5)} {number}", "items": judged})
    for name, rows in (("items", items), ("queries", queries)):
        write_lines(folder / f"{name}.jsonl", rows)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


def ranker_settings(folder: Path, **changes: Any) -> DataSettings:
    paths = {"items": str(folder / "items.jsonl"), "queries": str(folder / "queries.jsonl")}
    return validate(DataSettings, paths | SHAPE | changes, "test")


def pair_settings(folder: Path, **changes: Any) -> PairSettings:
    paths = {"items": str(folder / "items.jsonl"), "queries": str(folder / "queries.jsonl")}
    shape = {"pairs_per_batch": 4, "tokens_per_batch": 600, "max_prefix_tokens": 80, "max_item_tokens": 60}
    return validate(PairSettings, paths | shape | changes, "test")


def ranker(folder: Path, *, host: int = 0, hosts: int = 1, **changes: Any) -> BatchIterator[Any]:
    return ranker_batches(ranker_settings(folder, **changes), PROMPT, host=host, hosts=hosts)


def pairs(folder: Path, *, host: int = 0, hosts: int = 1, **changes: Any) -> BatchIterator[Any]:
    return pair_batches(pair_settings(folder, **changes), PROMPT, host=host, hosts=hosts)


def take(batches: BatchIterator[Any], count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
            assert one[name].dtype == other[name].dtype


def rows_of(batch: Batch) -> list[tuple[int, float, list[int]]]:
    """Each real row of a batch as (list id, label, prefix ids + item ids)."""
    M, rows = len(batch["tokens"]), []
    for slot, column in np.argwhere(batch["valid"]):
        index = np.concatenate([batch["prefix"][slot], batch["items"][slot, column]])
        rows.append(
            (
                int(batch["list_ids"][slot]),
                float(batch["labels"][slot, column]),
                batch["tokens"][index[index < M]].tolist(),
            )
        )
    return rows


def queries_by_id(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]


@cache
def expected_rows(folder: Path) -> dict[tuple[int, tuple[int, ...]], tuple[str, float]]:
    """(list id, row of token ids as it is scored) -> (item id, label), for every query and item.

    The scorer's limit of a row is set to what leaves an item `max_item_tokens` behind this query.
    """
    items = read_items(folder / "items.jsonl")
    found, cut = {}, 0
    for number, query in enumerate(queries_by_id(folder)):
        row = len(PROMPT.encode(query["query"], ["any"]).prefix_ids) + SHAPE["max_item_tokens"]
        scored = Prompt(tiny_tokenizer_json(), PROMPT.config.model_copy(update={"max_tokens": row}))
        request = scored.encode(query["query"], list(items.values()))
        labels = {judged["id"]: judged["label"] for judged in query["items"]}
        for item_id, ids in zip(items, request.item_ids, strict=True):
            found[number, tuple(request.prefix_ids + ids)] = (item_id, labels.get(item_id, 0.0))
        cut += sum(request.truncated)
    assert 0 < cut < len(found)
    return found
