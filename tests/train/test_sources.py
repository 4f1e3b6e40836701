"""Where training data comes from: formats, hub names, stored teacher scores, and everything that is refused."""

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxslm.config import validate
from jaxslm.errors import InputError
from jaxslm.train.heldout import HeldOut
from jaxslm.train.settings import EvaluationSettings
from tests.train.graded import (
    JUDGED,
    PROMPT,
    QUERIES,
    assert_same,
    expected_rows,
    pairs,
    queries_by_id,
    ranker,
    rows_of,
    take,
    write_graded,
    write_lines,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graded data set."""
    return write_graded(tmp_path_factory.mktemp("data"))


def test_parquet_gives_the_same_batches(folder: Path) -> None:
    changes: dict[str, Any] = {"items": str(folder / "items.parquet"), "queries": str(folder / "queries.parquet")}
    assert_same(take(ranker(folder), 4), take(ranker(folder, **changes), 4))


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_names_are_read_by_datasets(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    pytest.importorskip("datasets")
    for name in ("items", "queries"):  # `datasets` takes a folder of this name for the hub's
        (tmp_path / "owner" / name).mkdir(parents=True)
        (tmp_path / "owner" / name / "train.jsonl").write_bytes((folder / f"{name}.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    changes: dict[str, Any] = {"items": "hf://owner/items/train", "queries": "hf://owner/queries/train"}
    local = ranker(folder, streaming=streaming, shuffle_window=5)
    assert_same(take(local, 4), take(ranker(folder, streaming=streaming, shuffle_window=5, **changes), 4))
    with pytest.raises(InputError, match=r"^hf://owner/items/absent: cannot be loaded \("):
        ranker(folder, items="hf://owner/items/absent")
    with pytest.raises(InputError, match=r"^hf://owner/queries/train: row 1: id: "):
        ranker(folder, items="hf://owner/queries/train")


def test_evaluation_reads_the_same_sources(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    for name in ("items", "queries"):
        (tmp_path / "owner" / name).mkdir(parents=True)
        (tmp_path / "owner" / name / "train.jsonl").write_bytes((folder / f"{name}.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    paths = {"items": str(folder / "items.jsonl"), "queries": str(folder / "queries.parquet")}
    hub = {"items": "hf://owner/items/train", "queries": "hf://owner/queries/train"}
    local, remote = (
        HeldOut(validate(EvaluationSettings, {"every": 1, "k": 3} | where, "test"), PROMPT.encode).candidates
        for where in (paths, hub)
    )
    assert local == remote
    assert len(local) > JUDGED
    absent = {"every": 1} | hub | {"items": "hf://owner/items/absent"}
    with pytest.raises(InputError, match=r"hf://owner/items/absent: cannot be loaded"):
        HeldOut(validate(EvaluationSettings, absent, "test"), PROMPT.encode)


@pytest.mark.parametrize(
    ("item", "query", "message"),
    [
        ({"text": " "}, {}, "query 'q': item 'a': has no text"),
        ({}, {"items": [{"id": "nobody", "label": 1.0}]}, "query 'q': judged item 'nobody' is not among the items"),
        ({}, {"query": "python " * 3000}, r"query 'q': \d+ tokens leave no room for an item"),
        ({}, {"items": [{"id": "a", "label": 0.5}]}, "none of the 1 queries has a relevant judged item"),
    ],
)
def test_held_out_data_is_checked_before_training(
    tmp_path: Path, item: dict[str, Any], query: dict[str, Any], message: str
) -> None:
    write_lines(tmp_path / "items.jsonl", [{"id": "a", "text": "python"} | item])
    good = {"query_id": "q", "query": "python", "items": [{"id": "a", "label": 1.0}]}
    write_lines(tmp_path / "dev.jsonl", [good | query])
    paths = {"every": 1, "items": str(tmp_path / "items.jsonl"), "queries": str(tmp_path / "dev.jsonl")}
    with pytest.raises(InputError, match=rf"dev\.jsonl: {message}"):
        HeldOut(validate(EvaluationSettings, paths, "test"), PROMPT.encode)


@pytest.mark.parametrize("name", ["nobody/none", "owner/a.name/train"])
def test_a_bare_hub_id_is_told_how_to_be_written(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"^{name}: no such file; a split of a hub data set is hf://owner/name/split"):
        ranker(folder, items=name)


def test_a_hub_that_cannot_be_reached_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the libraries warn of at each retry is not shown; they are as loud as before afterwards."""
    datasets = pytest.importorskip("datasets")
    loggers = [logging.getLogger(name) for name in ("huggingface_hub.utils._http", "datasets.load")]
    shown: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", shown.append)
    for logger in loggers:
        monkeypatch.setattr(logger, "handlers", [handler])

    def unreachable(*arguments: Any, **options: Any) -> None:
        for logger in loggers:
            logger.warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach 'nobody/none' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    before = [logger.isEnabledFor(logging.WARNING) for logger in loggers]
    with pytest.raises(InputError, match=r"^hf://nobody/none/train: cannot be loaded \([^\n]*\)$"):
        ranker(folder, items="hf://nobody/none/train")
    assert shown == []
    assert [logger.isEnabledFor(logging.WARNING) for logger in loggers] == before == [True, True]


def test_hub_names_need_datasets_and_a_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"hf://owner/items: must be hf://owner/name/split"):
        ranker(folder, items="hf://owner/items")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the package `datasets`"):
        ranker(folder, items="hf://owner/items/train")


def test_stored_teacher_scores(folder: Path, tmp_path: Path) -> None:
    queries = queries_by_id(folder)[:-1]
    requests = [{"query": q["query"], "items": [{"id": i["id"], "text": "?"} for i in q["items"]]} for q in queries]
    write_lines(tmp_path / "requests.jsonl", requests)
    logits = [[number + column / 100 for column in range(JUDGED)] for number in range(len(queries))]
    write_lines(tmp_path / "scores.jsonl", [{"scores": [0.5] * JUDGED, "logits": row} for row in logits])
    paths: dict[str, Any] = {
        name: str(tmp_path / f"{name[8:]}.jsonl") for name in ("teacher_requests", "teacher_scores")
    }
    expected, known = expected_rows(folder), 0
    for batch in ranker(folder, epochs=1, **paths):
        assert batch["teacher"].dtype == np.float32
        assert np.isnan(batch["teacher"][~batch["valid"]]).all()
        for (list_id, _, row), odds in zip(rows_of(batch), batch["teacher"][batch["valid"]], strict=True):
            ids = [judged["id"] for judged in queries_by_id(folder)[list_id]["items"]]
            item_id, _ = expected[list_id, tuple(row)]
            if list_id < len(queries) and item_id in ids:
                assert odds == np.float32(logits[list_id][ids.index(item_id)])
                known += 1
            else:
                assert np.isnan(odds)
    assert known > 50
    write_lines(tmp_path / "scores.jsonl", [{"scores": [0.5], "logits": [1.0]}] * len(queries))
    with pytest.raises(InputError, match=r"scores.jsonl: record 1: has 1 logits for 12 items"):
        ranker(folder, **paths)
    write_lines(tmp_path / "scores.jsonl", [{"scores": [0.5], "logits": [1.0]}])
    with pytest.raises(InputError, match=r"scores.jsonl: has 1 lines, .*requests.jsonl has 22"):
        ranker(folder, **paths)


def test_stored_scores_of_few_pairs_are_told_and_of_none_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths: dict[str, Any] = {
        name: str(tmp_path / f"{name[8:]}.jsonl") for name in ("teacher_requests", "teacher_scores")
    }
    write_lines(tmp_path / "scores.jsonl", [{"logits": [1.0]}])
    query = queries_by_id(folder)[0]
    item = {"id": query["items"][0]["id"], "text": "?"}
    write_lines(tmp_path / "requests.jsonl", [{"query": query["query"], "items": [item]}])
    ranker(folder, **paths)
    ranker(folder, host=1, hosts=2, **paths)
    assert capsys.readouterr().err.count(f"requests.jsonl: holds 1 of the {QUERIES * JUDGED} judged pairs of ") == 1
    for words, other in (("another query", item), (query["query"], item | {"id": "renamed"})):
        write_lines(tmp_path / "requests.jsonl", [{"query": words, "items": [other]}])
        with pytest.raises(InputError, match=r"requests.jsonl: holds none of the 276 judged pairs of .*queries.jsonl"):
            ranker(folder, **paths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_batch": 800}, "less than the largest list: .* = 858"),
        ({"hard_negatives": 7, "random_negatives": 1}, "leave no place for a relevant item in items_per_list 8"),
        ({"items_per_list": 7}, "greater than or equal to 8"),
        ({"teacher_scores": "x"}, "teacher_requests and teacher_scores belong together"),
        ({"max_item_tokens": 20}, r"max_item_tokens 20: leaves no room for text beside the \d+ tokens"),
        ({"max_prefix_tokens": 2000, "tokens_per_batch": 5000}, "prompt max_tokens 2048: less than"),
        ({"max_prefix_tokens": 30}, r"queries.jsonl: query 'q0': \d+ tokens with the prompt's words"),
        ({"items": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"host": 2, "hosts": 2}, "host 2: must be 0..1"),
        ({"host": 2, "hosts": 40}, "23 queries are too few for 40 hosts"),
    ],
)
def test_settings_that_cannot_work_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ranker(folder, **changes)


ITEM: dict[str, Any] = {"id": "a", "text": "cook"}
QUERY: dict[str, Any] = {"query_id": "q", "query": "cook", "items": [{"id": "a", "label": 1.0}]}


@pytest.mark.parametrize(
    ("items", "queries", "message"),
    [
        ([ITEM], [QUERY | {"items": [{"id": "a", "label": 1.5}]}], r"queries.jsonl: line 1: items.0.label: "),
        ([ITEM], [QUERY | {"items": []}], r"queries.jsonl: line 1: items: "),
        ([ITEM], [QUERY | {"items": QUERY["items"] * 2}], "item ids must be unique within a query"),
        ([ITEM], [QUERY, QUERY], r"queries.jsonl: query id 'q' appears twice"),
        ([ITEM, ITEM], [QUERY], r"items.jsonl: item id 'a' appears twice"),
        ([ITEM], [QUERY | {"items": [{"id": "b", "label": 1.0}]}], r"query 'q': item 'b' is not in .*items.jsonl"),
        ([{"id": "b", "text": "ok"}, ITEM | {"text": " "}], [QUERY], "item 'a': has no text"),
        ([ITEM], [], "queries.jsonl: holds no records"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [ranker, pairs])
def test_bad_data_is_refused_before_training(
    tmp_path: Path, items: list[Any], queries: list[Any], message: str, streaming: bool, kind: Any
) -> None:
    write_lines(tmp_path / "items.jsonl", items)
    write_lines(tmp_path / "queries.jsonl", queries)
    with pytest.raises(InputError, match=message):
        kind(tmp_path, streaming=streaming)


def test_a_stream_that_shrank_is_refused(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "queries.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(lines))
    batches = pairs(folder, queries=str(path), streaming=True, shuffle_window=5)
    path.write_text("".join(lines[:7]))
    with pytest.raises(InputError, match="has changed since training began"):
        take(batches, 6)
