"""Requests for a teacher hold every item that training lists draw, read as the items themselves are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxslm.data_files import Request, read_items, read_records
from jaxslm.errors import InputError
from jaxslm.train.teacher_requests import write_teacher_requests
from tests.train.graded import PROMPT, QUERIES, queries_by_id, ranker, ranker_settings, take, write_graded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graded(tmp_path_factory.mktemp("graded"))


def answer(requests: Path, scores: Path) -> None:
    """What `jaxslm score` would write: here every logit is 7."""
    lines = [{"logits": [7.0] * len(request.items)} for request in read_records(requests, Request)]
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_teacher_knows_every_item_of_the_lists_but_random_negatives(folder: Path, tmp_path: Path) -> None:
    pool = {"hard_negatives": 3, "hard_negative_pool": 20}
    told = write_teacher_requests(ranker_settings(folder, **pool), tmp_path / "requests.jsonl")
    assert told["requests"] == QUERIES
    answer(tmp_path / "requests.jsonl", tmp_path / "scores.jsonl")
    paths: dict[str, Any] = {
        name: str(tmp_path / f"{name.removeprefix('teacher_')}.jsonl")
        for name in ("teacher_requests", "teacher_scores")
    }
    unknown = {}
    for random_negatives in (0, 3):
        batches = take(ranker(folder, random_negatives=random_negatives, **pool, **paths), 20)
        missing = [np.isnan(batch["teacher"][batch["valid"]]).sum() for batch in batches]
        unknown[random_negatives] = sum(missing)
    assert unknown[0] == 0
    assert unknown[3] > 0


def test_texts_become_the_ids_of_the_items(folder: Path, tmp_path: Path) -> None:
    write_teacher_requests(ranker_settings(folder, hard_negative_pool=0), tmp_path / "requests.jsonl")
    items = read_items(folder / "items.jsonl")
    for query, request in zip(queries_by_id(folder), read_records(tmp_path / "requests.jsonl", Request), strict=True):
        assert [item.id for item in request.items] == [judged["id"] for judged in query["items"]]
        texts = PROMPT.encode(request.query, [item.text or "" for item in request.items])
        whole = PROMPT.encode(query["query"], [items[judged["id"]] for judged in query["items"]])
        assert texts == whole


def test_what_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    with pytest.raises(InputError, match="there exists"):
        write_teacher_requests(ranker_settings(folder), tmp_path / "there")
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"query_id": "q", "query": "x", "items": [{"id": "nobody", "label": 1.0}]}\n')
    with pytest.raises(InputError, match="query 'q': item 'nobody' is not in"):
        write_teacher_requests(ranker_settings(folder, queries=str(queries)), tmp_path / "new")
    queries.write_text('{"query_id": "q", "query": "x", "items": [{"id": "i1", "label": 1.0}]}\n' * 2)
    with pytest.raises(InputError, match="query id 'q' appears twice"):
        write_teacher_requests(ranker_settings(folder, queries=str(queries)), tmp_path / "new")
    items = tmp_path / "items.jsonl"
    for more, message in (('{"id": "i1", "text": "x"}', "'i1' appears twice"), ('{"id": "x", "text": " "}', "no text")):
        items.write_text((folder / "items.jsonl").read_text() + more)
        with pytest.raises(InputError, match=message):
            write_teacher_requests(ranker_settings(folder, items=str(items)), tmp_path / "new")
    assert not (tmp_path / "new").exists()
