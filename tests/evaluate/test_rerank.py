"""Re-ranking reports the ranker and BM25 on the same candidates."""

import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxslm.config import PromptConfig
from jaxslm.data_files import Item, Judged, Query
from jaxslm.errors import InputError
from jaxslm.evaluate.rerank import evaluate_ranker, print_report, report_table, sample_queries
from jaxslm.evaluate.trec import read_run, write_run
from jaxslm.prompt import Prompt
from tests.tiny import tiny_tokenizer_json

WORDS = [f"w{n}" for n in range(30)]
RANDOM = random.Random(0)
ITEMS = {f"i{n:03}": Item(id=f"i{n:03}", text=" ".join(RANDOM.choices(WORDS, k=8))) for n in range(80)}
QUERIES = [
    Query(
        query_id=f"q{n}",
        query=" ".join(RANDOM.choices(WORDS, k=3)),
        items=tuple(
            Judged(id=item_id, label=label)
            for item_id, label in zip(RANDOM.sample(list(ITEMS), 3), (1.0, 2 / 3, 0.0), strict=True)
        ),
    )
    for n in range(40)
]
GOOD = {(query.query, judged.id): judged.label for query in QUERIES for judged in query.items}


def oracle(query: str, items: list[Item]) -> np.ndarray:
    return np.array([GOOD.get((query, item.id), -1.0) for item in items])


def test_an_oracle_is_perfect_and_beats_bm25() -> None:
    report = evaluate_ranker(oracle, QUERIES, ITEMS, k=20)
    assert [estimate.mean for estimate in report.ranker.estimates.values()] == [pytest.approx(1.0)] * 3
    assert 0 < report.bm25.estimates["ndcg_at_10"].mean < 0.9
    assert 0 < report.random.estimates["ndcg_at_10"].mean < 0.4
    assert report.difference.low > 0
    assert report.queries == 40
    assert 40 * 20 <= report.candidates <= 40 * 23


def test_bm25_as_ranker_equals_bm25() -> None:
    report = evaluate_ranker(oracle, QUERIES, ITEMS, k=20)
    text_of = {query.query: query.query_id for query in QUERIES}

    def bm25(query: str, items: list[Item]) -> np.ndarray:
        return np.array([report.bm25_run[text_of[query]][item.id] for item in items])

    again = evaluate_ranker(bm25, QUERIES, ITEMS, k=20)
    assert again.ranker.estimates == again.bm25.estimates
    assert (again.difference.low, again.difference.high) == (0.0, 0.0)


def test_order_of_the_files_does_not_matter() -> None:
    first = evaluate_ranker(oracle, QUERIES, ITEMS, k=5, limit=12)
    again = evaluate_ranker(oracle, QUERIES[::-1], dict(reversed(ITEMS.items())), k=5, limit=12)
    assert first.bm25.estimates == again.bm25.estimates
    assert first.run == again.run


def test_samples_are_nested_and_change_with_the_seed() -> None:
    small, large = sample_queries(QUERIES, 5), sample_queries(QUERIES, 10)
    assert large[:5] == small
    assert sample_queries(QUERIES[::-1], 5) == small
    assert sample_queries(QUERIES, 5, seed=1) != small
    assert sample_queries(QUERIES, None) == sample_queries(QUERIES, 400) == QUERIES


def test_queries_without_relevant_items_are_counted() -> None:
    poor = Query(query_id="poor", query="w1", items=(Judged(id="i000", label=1 / 3),))
    report = evaluate_ranker(oracle, [poor, *QUERIES], ITEMS, k=5, limit=3)
    assert (report.queries, report.queries_available, report.without_relevant) == (3, 40, 1)


def test_result_rows_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate_ranker(oracle, QUERIES, ITEMS, k=5, name="oracle")
    row = json.loads(json.dumps(report.to_json()))
    assert row["name"] == "oracle"
    assert row["ndcg_at_10"] == pytest.approx(1.0)
    assert row["ndcg_ci95"] == [pytest.approx(1.0), pytest.approx(1.0)]
    assert row["items_per_s"] > 0
    result = json.loads(json.dumps(report.to_result()))
    assert [each["name"] for each in result["rows"]] == ["random order", "BM25", "oracle"]
    assert result["conditions"]["candidate_list"] == "BM25 top 5 and the judged items"
    screen = Console(file=io.StringIO(), width=140)
    screen.print(report_table(report))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "linear gain" in text
    assert "label >= 0.75" in text
    assert "40 of 40 queries" in text
    print_report(report)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "oracle" in captured.err


def test_the_run_can_be_written(tmp_path: Path) -> None:
    report = evaluate_ranker(oracle, QUERIES, ITEMS, k=5, limit=4)
    write_run(tmp_path / "run", report.run)
    assert read_run(tmp_path / "run") == report.run


def test_bad_rankers_and_input() -> None:
    with pytest.raises(InputError, match=r"query 'q\d+', item 'i\d+': the score is not a number"):
        evaluate_ranker(lambda query, items: np.full(len(items), math.nan), QUERIES, ITEMS, k=5)
    with pytest.raises(InputError, match=r"the ranker returned shape \(1,\) for"):
        evaluate_ranker(lambda query, items: np.zeros(1), QUERIES, ITEMS, k=5)
    with pytest.raises(InputError, match="1 or more, not 0"):
        evaluate_ranker(oracle, QUERIES, ITEMS, limit=0)
    with pytest.raises(InputError, match="none of the 0 queries"):
        evaluate_ranker(oracle, [], ITEMS)


def test_what_a_ranker_cannot_read_is_named() -> None:
    prompt = Prompt(tiny_tokenizer_json(), PromptConfig(template="yes-no", max_tokens=300))

    def read(query: str, items: list[Item]) -> np.ndarray:
        prompt.encode(query, items)
        return np.zeros(len(items))

    empty = QUERIES[3].items[0].id
    with pytest.raises(InputError, match=rf"^query 'q\d+': item '{empty}': has no text"):
        evaluate_ranker(read, QUERIES, {**ITEMS, empty: Item(id=empty, text=" ")}, k=5)
    long = QUERIES[7].model_copy(update={"query": "w1 " * 300})
    with pytest.raises(InputError, match=r"^query 'q7': \d+ tokens leave no room"):
        evaluate_ranker(read, [*QUERIES[:7], long], ITEMS, k=5)


def test_a_constant_ranker_is_a_random_order() -> None:
    report = evaluate_ranker(lambda query, items: np.full(len(items), 0.7), QUERIES, ITEMS, k=10)
    assert report.ranker.estimates == report.random.estimates
