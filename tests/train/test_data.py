"""The input pipeline: what a list holds, how lists are packed, and that any interruption leaves the batches alone."""

import json
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from tokenizers import Tokenizer

from jaxslm.data_files import read_items
from jaxslm.errors import InputError
from jaxslm.evaluate.candidates import Bm25
from jaxslm.model.layout import SharedPrefix
from jaxslm.train.data import BatchIterator
from jaxslm.train.lists import spread_over_grades
from jaxslm.train.packing import fill
from jaxslm.train.sources import Order
from tests.tiny import NOT_MARKED_SPECIAL, SPECIALS, tiny_tokenizer_json
from tests.train.graded import (
    NEVER_JUDGED,
    PROMPT,
    QUERIES,
    assert_same,
    expected_rows,
    pair_settings,
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
    order = Order(pair_settings(folder, epochs=1, streaming=True, shuffle_window=5), QUERIES, host=0, hosts=1)
    ids = np.array([order[position][1] for position in range(len(order))])
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


def test_a_state_of_other_teacher_scores_is_refused(folder: Path, tmp_path: Path) -> None:
    """The paths of stored scores may change, what they hold may not."""

    def taught(name: str, logit: float) -> BatchIterator[Any]:
        requests, scores = tmp_path / f"{name}-requests.jsonl", tmp_path / f"{name}-scores.jsonl"
        query = queries_by_id(folder)[0]
        write_lines(requests, [{"query": query["query"], "items": [{"id": query["items"][0]["id"], "text": "a"}]}])
        write_lines(scores, [{"scores": [0.5], "logits": [logit], "truncated": [False]}])
        return ranker(folder, teacher_requests=str(requests), teacher_scores=str(scores))

    state = taught("first", 1.0).get_state()
    taught("moved", 1.0).set_state(state)
    for other in (taught("other", 2.0), ranker(folder)):
        with pytest.raises(InputError, match=r"teacher scores, .* differ from the saved run's"):
            other.set_state(state)


def test_worker_processes_change_nothing(folder: Path) -> None:
    plain, parallel = ranker(folder), ranker(folder, workers=2)
    take(plain, 3)
    parallel.set_state(plain.get_state())  # as a resumed run does, before the first batch
    assert_same(take(plain, 5), take(parallel, 5))
    assert plain.get_state() == parallel.get_state()
    parallel.close()
    assert next(parallel._upcoming, None) is None


def test_without_grain_workers_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(InputError, match=r"workers: more than 0 needs the package `grain`"):
        ranker(folder, workers=1)
    next(ranker(folder))


def test_padding_is_small(folder: Path) -> None:
    taken = take(ranker(folder, lists_per_batch=8), 12)
    real = sum(np.sum(batch["prefix"] < 2400) + np.sum(batch["items"] < 2400) for batch in taken)
    assert 0 <= 1 - real / (12 * 2400) < 0.15


def test_errors_in_worker_processes_keep_their_words(folder: Path) -> None:
    # Streamed queries are tokenised where they are used; all of these are longer than 30 tokens.
    batches = ranker(folder, streaming=True, workers=1, max_prefix_tokens=30)
    with pytest.raises(InputError, match=r"query 'q\d+': \d+ tokens with the prompt's words"):
        next(batches)


def test_pairs_hold_a_best_item_and_know_the_other_relevant_ones(folder: Path) -> None:
    queries, items = queries_by_id(folder), read_items(folder / "items.jsonl")
    for batch in take(pairs(folder), 12):
        judged = [{i["id"]: i["label"] for i in queries[number]["items"]} for number in batch["list_ids"]]
        best = [next(item_id for item_id, label in one.items() if label == 1) for one in judged]
        M = len(batch["tokens"])
        for slot, number in enumerate(batch["list_ids"]):
            expected = PROMPT.encode(queries[number]["query"], [items[best[slot]]], 59)
            prefix, item = batch["prefix"][slot], batch["items"][batch["item_rows"][slot], 0]
            assert batch["tokens"][prefix[prefix < M]].tolist() == expected.prefix_ids
            item_ids = expected.item_ids[0][: -len(PROMPT.suffix_ids)]
            assert batch["tokens"][item[item < M]].tolist() == item_ids
            assert batch["item_rows"][slot] != slot  # its own query gives nothing away
            for other in range(4):
                assert batch["positive"][slot, other] == (judged[slot].get(best[other], 0) > 0)
        assert batch["positive"].diagonal().all()


def test_text_of_pairs_is_never_read_as_control_tokens(tmp_path: Path) -> None:
    text = f"{SPECIALS[0]} {NOT_MARKED_SPECIAL[0]}"
    write_lines(tmp_path / "items.jsonl", [{"id": "a", "text": text}])
    write_lines(tmp_path / "queries.jsonl", [{"query_id": "q", "query": text, "items": [{"id": "a", "label": 1.0}]}])
    batch = next(pairs(tmp_path, epochs=1))
    tokenizer, M = Tokenizer.from_str(tiny_tokenizer_json()), len(batch["tokens"])
    control = {tokenizer.token_to_id(token) for token in (*SPECIALS, *NOT_MARKED_SPECIAL)}
    words = len(PROMPT.prefix_ids)
    for index in (batch["prefix"][0][words:], batch["items"][0, 0]):
        tokens = batch["tokens"][index[index < M]].tolist()
        assert not control & set(tokens)
        assert tokenizer.decode(tokens).startswith(f" {text}")


def test_the_last_pairs_are_padded_and_queries_without_a_relevant_item_teach_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "items.jsonl", [{"id": f"i{number}", "text": "cook"} for number in range(3)])
    labels = [1.0, 0.0, 0.5]
    rows = [{"query_id": f"q{n}", "query": "cook", "items": [{"id": f"i{n}", "label": labels[n]}]} for n in range(3)]
    write_lines(tmp_path / "queries.jsonl", rows)
    (batch,) = pairs(tmp_path, epochs=1)
    assert batch["list_ids"][3] == -1
    assert np.all(batch["prefix"][3] == len(batch["tokens"]))
    assert np.all(batch["items"][3] == len(batch["tokens"]))
    positive = {int(number): bool(batch["positive"][slot, slot]) for slot, number in enumerate(batch["list_ids"])}
    assert positive == {0: True, 1: False, 2: True, -1: False}


def test_query_ids_are_found_again(folder: Path) -> None:
    for streaming in (False, True):
        batches = ranker(folder, streaming=streaming, shuffle_window=5)
        next(batches)
        assert batches.query_id(17) == "q17"
