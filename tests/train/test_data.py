"""The input pipeline: what a list holds, how lists are packed, and that any interruption leaves the batches alone."""

import json
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from tokenizers import Tokenizer

from jaxslm.config import PromptConfig, validate
from jaxslm.data_files import read_items
from jaxslm.errors import InputError
from jaxslm.evaluate.candidates import Bm25
from jaxslm.model.layout import SharedPrefix
from jaxslm.prompt import Prompt
from jaxslm.train.data import BatchIterator, pair_batches, ranker_batches
from jaxslm.train.data_settings import DataSettings, PairSettings
from jaxslm.train.lists import spread_over_grades
from jaxslm.train.packing import Batch, fill
from tests.tiny import tiny_tokenizer_json

WORDS = [
    "python",
    "developer",
    "engineer",
    "nurse",
    "baker",
    "welder",
    "pilot",
    "teacher",
    "lawyer",
    "driver",
    "cook",
    "painter",
]
ITEMS, QUERIES, JUDGED = 60, 23, 12
NEVER_JUDGED = {f"i{number}" for number in range(50, ITEMS)}
SHAPE = {"lists_per_batch": 3, "tokens_per_batch": 2400, "max_prefix_tokens": 90, "max_item_tokens": 96}
PROMPT = Prompt(tiny_tokenizer_json(), PromptConfig(template="yes-no", instruction="Match?"))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items and queries as JSON Lines and Parquet; each query judges 12 items: one 1, two 2/3, eight 1/3, one 0."""
    folder = tmp_path_factory.mktemp("data")
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
    shape = {"pairs_per_batch": 4, "max_query_tokens": 40, "max_item_tokens": 60}
    return validate(PairSettings, paths | shape | changes, "test")


def ranker(folder: Path, *, host: int = 0, hosts: int = 1, **changes: Any) -> BatchIterator[Any]:
    return ranker_batches(ranker_settings(folder, **changes), PROMPT, host=host, hosts=hosts)


def pairs(folder: Path, *, host: int = 0, hosts: int = 1, **changes: Any) -> BatchIterator[Any]:
    return pair_batches(pair_settings(folder, **changes), tiny_tokenizer_json(), host=host, hosts=hosts)


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


def expected_rows(folder: Path) -> dict[tuple[int, tuple[int, ...]], tuple[str, float]]:
    """(list id, row of token ids as the scorer builds it) -> (item id, label), for every query and item."""
    items = read_items(folder / "items.jsonl")
    found = {}
    for number, query in enumerate(queries_by_id(folder)):
        request = PROMPT.encode(query["query"], list(items.values()))
        labels = {judged["id"]: judged["label"] for judged in query["items"]}
        T, suffix = SHAPE["max_item_tokens"], PROMPT.suffix_ids
        for item_id, ids in zip(items, request.item_ids, strict=True):
            cut = ids[: -len(suffix)][: T - len(suffix)] + suffix
            found[number, tuple(request.prefix_ids + cut)] = (item_id, labels.get(item_id, 0.0))
    return found


def test_a_batch_has_the_promised_shapes(folder: Path) -> None:
    M, R, J, P, T = 2400, 3, 8, 90, 96
    shapes = {"tokens": (M,), "prefix": (R, P), "items": (R, J, T), "labels": (R, J), "valid": (R, J), "list_ids": (R,)}
    types = {"labels": np.float32, "valid": bool}
    for batch in take(ranker(folder), 10):
        assert {name: array.shape for name, array in batch.items()} == shapes
        assert all(array.dtype == types.get(name, np.int32) for name, array in batch.items())
        places = np.concatenate([batch["prefix"].ravel(), batch["items"].ravel()])
        used = np.sort(places[places < M])
        np.testing.assert_array_equal(used, np.arange(len(used)))  # each token once, padding at the end
        assert (places <= M).all()
        assert SharedPrefix(jnp.asarray(batch["prefix"]), jnp.asarray(batch["items"]), M).positions.shape == (M,)


def test_rows_equal_those_that_are_scored_and_labels_those_of_the_file(folder: Path) -> None:
    expected = expected_rows(folder)
    for batch in take(ranker(folder), 20):
        for list_id, label, row in rows_of(batch):
            item_id, true_label = expected[list_id, tuple(row)]
            assert label == np.float32(true_label)
            assert item_id not in NEVER_JUDGED


def test_a_list_mixes_grades_hard_and_random_negatives(folder: Path) -> None:
    expected = expected_rows(folder)
    items = read_items(folder / "items.jsonl")
    index = Bm25({item_id: item for item_id, item in items.items() if item_id not in NEVER_JUDGED})
    queries = queries_by_id(folder)
    for batch in ranker(folder, hard_negatives=3, random_negatives=2, hard_negative_pool=10, epochs=1):
        rows = rows_of(batch)
        for list_id in batch["list_ids"][batch["list_ids"] >= 0]:
            chosen = [expected[number, tuple(row)] for number, _, row in rows if number == list_id]
            assert len(chosen) == len({item_id for item_id, _ in chosen}) == 8
            assert sum(label == 1 for _, label in chosen) == 1
            assert sum(label > 0 for _, label in chosen) == 3
            judged = {judged["id"]: judged["label"] for judged in queries[list_id]["items"]}
            hard = {item_id for item_id, _ in index.search(queries[list_id]["query"], 10)} - judged.keys()
            hard |= {item_id for item_id, label in judged.items() if label == 0}
            assert sum(item_id in hard for item_id, label in chosen if label == 0) >= min(3, len(hard))


def test_places_are_filled_up_and_then_left_empty(tmp_path: Path) -> None:
    write_lines(tmp_path / "items.jsonl", [{"id": f"i{number}", "text": "cook"} for number in range(7)])
    judged = [{"id": "i0", "label": 1.0}, *({"id": f"i{number}", "label": 0.0} for number in range(1, 7))]
    write_lines(tmp_path / "queries.jsonl", [{"query_id": "q", "query": "cook", "items": judged}])
    batch = next(ranker(tmp_path, hard_negatives=2, random_negatives=3, epochs=1))
    # One relevant item; its two free places and the two hard places go to judged negatives; random ones are all taken.
    assert batch["valid"][0].sum() == 5
    assert batch["labels"][0].sum() == 1
    assert not batch["valid"][1:].any()
    np.testing.assert_array_equal(batch["list_ids"], [0, -1, -1])


def test_spread_over_grades() -> None:
    generator = np.random.default_rng(0)
    labels = np.array([1 / 3] * 30 + [2 / 3] * 3 + [1.0] * 2)
    chosen = [labels[spread_over_grades(labels, 4, generator)] for _ in range(300)]
    assert all(len(one) == 4 and one[0] == 1 for one in chosen)
    shares = [np.mean([(one[1] == grade) for one in chosen]) for grade in (1 / 3, 2 / 3)]
    assert min(shares) > 0.2  # not 30 : 3
    assert len(spread_over_grades(np.array([]), 4, generator)) == 0
    np.testing.assert_array_equal(spread_over_grades(np.array([0.5]), 4, generator), [0])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 6))
def test_fill_keeps_the_budget_and_takes_the_oldest(sizes: list[int], most: int) -> None:
    room = 50
    chosen = fill(sizes, room, most)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen) <= most
    left = room - sum(sizes[place] for place in chosen)
    assert left >= 0
    if len(chosen) < most:
        assert all(sizes[place] > left for place in set(range(len(sizes))) - set(chosen))


@pytest.mark.parametrize("kind", [ranker, pairs])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_epoch_holds_every_query_once(folder: Path, kind: Any, streaming: bool) -> None:
    changes = {"streaming": streaming, "shuffle_window": 5, "seed": 3}
    orders = []
    for epochs in (1, 2):
        ids = np.concatenate([batch["list_ids"] for batch in kind(folder, epochs=epochs, **changes)])
        ids = ids[ids >= 0]
        np.testing.assert_array_equal(np.sort(ids), np.sort(np.tile(np.arange(QUERIES), epochs)))
        orders.append(ids)
    other = np.concatenate([batch["list_ids"] for batch in kind(folder, epochs=1, **changes | {"seed": 4})])
    assert list(other[other >= 0]) != list(orders[0])


def test_a_stream_shuffles_within_windows(folder: Path) -> None:
    ids = np.concatenate([b["list_ids"] for b in pairs(folder, epochs=1, streaming=True, shuffle_window=5)])
    ids = ids[ids >= 0]
    np.testing.assert_array_equal(ids // 5, np.sort(ids // 5))
    assert list(ids) != sorted(ids)


@pytest.mark.parametrize("kind", [ranker, pairs])
@pytest.mark.parametrize("streaming", [False, True])
def test_hosts_share_nothing_and_leave_nothing_out(folder: Path, kind: Any, streaming: bool) -> None:
    shares = []
    for host in range(3):
        share = kind(folder, host=host, hosts=3, epochs=1, streaming=streaming, shuffle_window=5)
        ids = np.concatenate([batch["list_ids"] for batch in share])
        shares.append(ids[ids >= 0])
    assert {len(share) for share in shares} == {7, 8}
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(QUERIES))


@pytest.mark.parametrize("kind", [ranker, pairs])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 25), st.integers(1, 8), st.booleans(), st.integers(0, 1), st.integers(0, 5))
def test_a_resumed_run_sees_the_same_batches(
    folder: Path, kind: Any, before: int, after: int, streaming: bool, host: int, seed: int
) -> None:
    # 23 queries on two hosts, up to 4 in a batch: 25 batches cross several epochs.
    changes = {"streaming": streaming, "shuffle_window": 5, "seed": seed}

    def start() -> BatchIterator[Any]:
        started: BatchIterator[Any] = kind(folder, host=host, hosts=2, **changes)
        return started

    whole = take(start(), before + after)
    interrupted = start()
    take(interrupted, before)
    state = json.loads(json.dumps(interrupted.get_state()))
    assert len(json.dumps(state)) < 1000
    assert_same(take(interrupted, after), whole[before:])  # asking for the state changes nothing
    resumed = start()
    resumed.set_state(state)
    assert_same(take(resumed, after), whole[before:])
    interrupted.set_state(state)  # going back works too
    assert_same(take(interrupted, after), whole[before:])


def test_a_state_ends_with_the_last_epoch(folder: Path) -> None:
    batches = ranker(folder, epochs=2)
    state, count = batches.get_state(), len(list(batches))
    end = batches.get_state()
    assert next(batches, None) is None
    batches.set_state(state)
    assert len(list(batches)) == count
    longer = ranker(folder, epochs=3)  # epochs may be added later
    longer.set_state(end)
    ids = np.concatenate([batch["list_ids"] for batch in longer])
    np.testing.assert_array_equal(np.sort(ids[ids >= 0]), np.arange(QUERIES))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"items_per_list": 9}, {"host": 1, "hosts": 2}])
def test_a_state_of_another_run_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"differ from the saved run's"):
        ranker(folder, **changes).set_state(ranker(folder).get_state())


def test_worker_processes_change_nothing(folder: Path) -> None:
    plain, parallel = ranker(folder), ranker(folder, workers=2)
    assert_same(take(plain, 5), take(parallel, 5))
    assert plain.get_state() == parallel.get_state()
    parallel.close()
    assert next(parallel._upcoming, None) is None


def test_without_grain_workers_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(InputError, match=r"workers: more than 0 needs the package `grain`"):
        ranker(folder, workers=1)
    next(ranker(folder))


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
    with pytest.raises(InputError, match=r"line 1|row 1: id"):
        ranker(folder, items="hf://owner/queries/train")


def test_hub_names_need_datasets_and_a_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"hf://owner/items: must be hf://owner/name/split"):
        ranker(folder, items="hf://owner/items")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the package `datasets`"):
        ranker(folder, items="hf://owner/items/train")


def test_padding_is_counted_and_small(folder: Path) -> None:
    batches = ranker(folder, lists_per_batch=8)
    assert batches.padding_fraction == 0
    taken = take(batches, 12)
    real = sum(np.sum(batch["prefix"] < 2400) + np.sum(batch["items"] < 2400) for batch in taken)
    assert batches.padding_fraction == pytest.approx(1 - real / (12 * 2400))
    assert batches.padding_fraction < 0.15


def test_errors_in_worker_processes_keep_their_words(folder: Path) -> None:
    # Streamed queries are tokenised where they are used; all of these are longer than 30 tokens.
    batches = ranker(folder, streaming=True, workers=1, max_prefix_tokens=30)
    with pytest.raises(InputError, match=r"query 'q\d+': \d+ tokens with the prompt's words"):
        next(batches)


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


def test_pairs_hold_a_best_item_and_know_the_other_relevant_ones(folder: Path) -> None:
    queries, items = queries_by_id(folder), read_items(folder / "items.jsonl")
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json())

    def ids(text: str, longest: int) -> list[int]:
        return list(tokenizer.encode(" " + text, add_special_tokens=False).ids[:longest])

    for batch in take(pairs(folder), 12):
        judged = [{i["id"]: i["label"] for i in queries[number]["items"]} for number in batch["list_ids"]]
        best = [next(item_id for item_id, label in one.items() if label == 1) for one in judged]
        for slot, number in enumerate(batch["list_ids"]):
            query = batch["query_tokens"][slot, batch["query_valid"][slot]].tolist()
            assert query == ids(queries[number]["query"], 40)
            item = items[best[slot]]
            assert batch["item_tokens"][slot, batch["item_valid"][slot]].tolist() == ids(
                f"{item.title}\n{item.text}", 60
            )
            for other in range(4):
                assert batch["positive"][slot, other] == (judged[slot].get(best[other], 0) > 0)
        assert batch["positive"].diagonal().all()


def test_the_last_pairs_are_padded_and_queries_without_a_relevant_item_teach_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "items.jsonl", [{"id": f"i{number}", "text": "cook"} for number in range(3)])
    labels = [1.0, 0.0, 0.5]
    rows = [{"query_id": f"q{n}", "query": "cook", "items": [{"id": f"i{n}", "label": labels[n]}]} for n in range(3)]
    write_lines(tmp_path / "queries.jsonl", rows)
    (batch,) = pairs(tmp_path, epochs=1)
    assert batch["list_ids"][3] == -1
    assert not batch["item_valid"][3].any()
    positive = {int(number): bool(batch["positive"][slot, slot]) for slot, number in enumerate(batch["list_ids"])}
    assert positive == {0: True, 1: False, 2: True, -1: False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_batch": 800}, "less than the largest list: .* = 858"),
        ({"hard_negatives": 7, "random_negatives": 1}, "leave no place for a relevant item in items_per_list 8"),
        ({"items_per_list": 7}, "greater than or equal to 8"),
        ({"teacher_scores": "x"}, "teacher_requests and teacher_scores belong together"),
        ({"max_item_tokens": 20}, "max_item_tokens: the prompt's suffix alone has"),
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


def test_query_ids_are_found_again(folder: Path) -> None:
    for streaming in (False, True):
        batches = ranker(folder, streaming=streaming, shuffle_window=5)
        next(batches)
        assert batches.query_id(17) == "q17"
