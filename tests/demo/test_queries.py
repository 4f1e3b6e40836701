"""Postings, queries and grades of the demo data, from a made catalogue."""

from jaxslm.demo.postings import TASKS_IN_POSTING, posting, read_occupations, read_work_activities
from jaxslm.demo.queries import (
    GradedQuery,
    grade_postings,
    minor_group,
    mixed_queries,
    posting_title_queries,
    qrels_lines,
    query_record,
    split_groups,
    task_and_activity_queries,
    title_queries,
)
from tests.demo.made import CODES, GROUPS, occupations_text, tasks_text, titles


def test_a_posting_is_description_and_first_tasks() -> None:
    occupation = read_occupations(occupations_text(), tasks_text())[0]
    item = posting(occupation)
    assert item["id"] == CODES[0]
    assert item["title"] == f"Title {CODES[0]}s"
    assert item["text"].startswith(f"Describes {CODES[0]}.\nTask 0 of {CODES[0]}. Task 1 of")
    assert item["text"].endswith(f"Task {TASKS_IN_POSTING - 1} of {CODES[0]}.")


def test_only_occupations_with_tasks_become_postings() -> None:
    assert [o.code for o in read_occupations(occupations_text(), tasks_text())] == sorted(CODES)


def test_grades_follow_the_distance_of_codes() -> None:
    codes = ["11-1011.00", "11-1011.03", "11-1021.00", "11-2011.00", "13-1011.00"]
    assert grade_postings(["11-1011.00"], codes) == {"11-1011.00": 3, "11-1011.03": 2, "11-1021.00": 1}


def test_the_best_grade_of_several_relevant_occupations_counts() -> None:
    codes = ["11-1011.00", "11-1011.03", "11-1021.00"]
    grades = grade_postings(["11-1021.00", "11-1011.03"], codes)
    assert grades == {"11-1011.00": 2, "11-1011.03": 3, "11-1021.00": 3}


def test_labels_and_qrels() -> None:
    query = GradedQuery("q", "words", {"a": 1, "b": 3, "c": 2})
    labels = [("b", 1.0), ("c", 2 / 3), ("a", 1 / 3)]
    assert query_record(query)["items"] == [{"id": code, "label": label} for code, label in labels]
    assert qrels_lines(query) == ["q 0 a 1", "q 0 b 3", "q 0 c 2"]


def test_no_group_is_on_both_sides() -> None:
    train, dev = split_groups(CODES)
    assert sorted(train + dev) == GROUPS
    assert len(dev) == 2
    assert split_groups(reversed(CODES)) == (train, dev)


def test_every_listed_item_lies_on_the_side_of_its_query() -> None:
    occupations = read_occupations(occupations_text(), tasks_text())
    train_groups, dev_groups = split_groups(CODES)
    queries = task_and_activity_queries(occupations, read_work_activities(tasks_text()))
    assert queries.dev
    for side, groups in ((queries.train, train_groups), (queries.dev, dev_groups)):
        assert {minor_group(code) for query in side for code in query.grades} == set(groups)
    assert not {q.query for q in queries.train} & {q.query for q in queries.dev}


def test_queries_of_both_sides_are_dropped_and_counted() -> None:
    occupations = read_occupations(occupations_text(), tasks_text())
    queries = task_and_activity_queries(occupations, read_work_activities(tasks_text()))
    assert queries.dropped == {"words_in_a_posting": 1, "relevant_in_both_splits": 1}
    # One own task per occupation, one shared task and one local activity per minor group.
    assert len(queries.train) + len(queries.dev) == len(CODES) + 2 * len(GROUPS)


def test_no_query_stands_in_a_posting() -> None:
    occupations = read_occupations(occupations_text(), tasks_text())
    text = "\n".join(posting(occupation)["text"] for occupation in occupations).casefold()
    queries = task_and_activity_queries(occupations, read_work_activities(tasks_text()))
    assert [q.query for q in queries.train + queries.dev if q.query.casefold() in text] == []


def test_equal_statements_are_one_query() -> None:
    occupations = read_occupations(occupations_text(), tasks_text())
    queries = task_and_activity_queries(occupations, read_work_activities(tasks_text()))
    shared = [q for q in queries.train + queries.dev if q.query == f"Shared by {GROUPS[0]}."]
    assert len(shared) == 1
    assert shared[0].grades == dict.fromkeys(CODES[:3], 3)


def test_a_title_that_says_the_posting_title_again_is_left_out() -> None:
    queries = title_queries(read_occupations(occupations_text(), tasks_text()), titles())
    assert {q.query: q.grades for q in queries} == {
        "Fresh words": {CODES[0]: 3, CODES[1]: 2, CODES[2]: 1},
        "Other words": {CODES[0]: 2, CODES[1]: 3, CODES[2]: 1},
    }


def test_titles_of_postings_are_queries_unless_they_evaluate() -> None:
    _, dev_groups = split_groups(CODES)
    kept_out = CODES[0], CODES[-1]
    train, dev = posting_title_queries(
        read_occupations(occupations_text(), tasks_text()), [f"Title, {code}" for code in kept_out]
    )
    for side, is_dev in ((train, False), (dev, True)):
        codes = {code for code in CODES if (minor_group(code) in dev_groups) == is_dev} - set(kept_out)
        assert {query.query for query in side} == {f"Title {code}s" for code in codes}
        for query in side:
            assert query.grades == grade_postings({query.query_id.removeprefix("title-")}, CODES)


def test_a_quarter_of_mixed_queries_are_titles() -> None:
    others, titles = ([GradedQuery(f"{kind}-{n}", "x", {}) for n in range(50)] for kind in ("task", "title"))
    mixed = mixed_queries(others, titles[:10])
    assert {query.query_id for query in mixed} == {f"title-{n}" for n in range(10)} | {f"task-{n}" for n in range(30)}
    first = [query.query_id.startswith("title") for query in mixed[:20]]
    assert 0 < sum(first) < 10
