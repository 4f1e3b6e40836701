"""TREC files: a run is `query Q0 item rank score tag`, qrels are `query 0 item grade`, white space between fields."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jaxslm.atomic import new_file
from jaxslm.errors import InputError
from jaxslm.evaluate.metrics import Labels, Run, ranked

Grades = Mapping[str, Mapping[str, int]]  # query id -> item id -> integer grade


def write_run(path: Path, run: Run, tag: str = "jaxslm") -> None:
    """Writes a run: queries in the order of `run`, items by score, ties as in `metrics.ranked`, scores to every digit.

    `trec_eval` ignores the rank column and orders equal scores by item id, so its numbers may differ where scores tie.

    Raises:
        InputError: the file exists, an id or the tag is empty or holds white space, or a score is not finite.
    """
    check_ids(path, run, tag)
    with new_file(path) as staging, staging.open("w", encoding="utf-8", newline="\n") as out:
        for query_id, scores in run.items():
            for rank, item_id in enumerate(ranked(query_id, scores), start=1):
                score = float(scores[item_id])
                if not math.isfinite(score):
                    raise InputError(f"{path}: query {query_id!r}, item {item_id!r}: score {score} is not finite")
                out.write(f"{query_id} Q0 {item_id} {rank} {score!r} {tag}\n")


def check_ids(path: Path, ids: Mapping[str, Iterable[str]], tag: str) -> None:
    """Raises InputError for ids or a tag that the run `path` cannot hold: call it before long work.

    Args:
        ids: query id -> item ids.
    """
    _check_id(path, "tag", tag)
    for query_id, item_ids in ids.items():
        _check_id(path, "query id", query_id)
        for item_id in item_ids:
            _check_id(path, "item id", item_id)


def read_run(path: Path) -> dict[str, dict[str, float]]:
    """Returns query id -> item id -> score, in file order.

    Raises:
        InputError: no such file, no lines, or a line that is not UTF-8, has not 6 columns, repeats an item or has a
            rank or score that is not a number; the message holds the line number.
    """
    run: dict[str, dict[str, float]] = {}
    for number, (query_id, _, item_id, rank, score, _) in _rows(path, columns=6):
        _integer(path, number, "rank", rank)
        value = _number(path, number, score)
        if item_id in run.setdefault(query_id, {}):
            raise InputError(f"{path}: line {number}: item {item_id!r} appears twice for query {query_id!r}")
        run[query_id][item_id] = value
    return run


def write_qrels(path: Path, grades: Grades) -> None:
    """Writes judgements with integer grades. Raises InputError as `write_run`, and on a grade that is no integer."""
    with new_file(path) as staging, staging.open("w", encoding="utf-8", newline="\n") as out:
        for query_id, judged in grades.items():
            _check_id(path, "query id", query_id)
            for item_id, grade in judged.items():
                _check_id(path, "item id", item_id)
                if not isinstance(grade, int):
                    raise InputError(f"{path}: query {query_id!r}, item {item_id!r}: grade {grade!r} is not an integer")
                out.write(f"{query_id} 0 {item_id} {grade}\n")


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Returns query id -> item id -> integer grade, in file order. Raises InputError as `read_run` (4 columns)."""
    grades: dict[str, dict[str, int]] = {}
    for number, (query_id, _, item_id, grade) in _rows(path, columns=4):
        value = _integer(path, number, "grade", grade)
        if item_id in grades.setdefault(query_id, {}):
            raise InputError(f"{path}: line {number}: item {item_id!r} appears twice for query {query_id!r}")
        grades[query_id][item_id] = value
    return grades


def grades_to_labels(grades: Grades, top_grade: int) -> dict[str, dict[str, float]]:
    """Returns labels in [0, 1]: grade / top_grade; negative grades (TREC: "not relevant, spam") become 0.

    Raises:
        InputError: top_grade < 1, or a grade above it.
    """
    if top_grade < 1:
        raise InputError(f"the top grade must be 1 or more, not {top_grade}")
    labels: dict[str, dict[str, float]] = {}
    for query_id, judged in grades.items():
        for item_id, grade in judged.items():
            if grade > top_grade:
                raise InputError(f"query {query_id!r}, item {item_id!r}: grade {grade}, but the top is {top_grade}")
        labels[query_id] = {item_id: max(grade, 0) / top_grade for item_id, grade in judged.items()}
    return labels


def labels_to_grades(labels: Labels, top_grade: int) -> dict[str, dict[str, int]]:
    """Returns integer grades: label * top_grade, which must be whole numbers (within 1e-6 of one).

    Raises:
        InputError: top_grade < 1, or a label that is not a multiple of 1 / top_grade in [0, 1].
    """
    if top_grade < 1:
        raise InputError(f"the top grade must be 1 or more, not {top_grade}")
    grades: dict[str, dict[str, int]] = {}
    for query_id, judged in labels.items():
        grades[query_id] = {}
        for item_id, label in judged.items():
            if not 0 <= label <= 1 or abs(label * top_grade - round(label * top_grade)) > 1e-6:
                raise InputError(
                    f"query {query_id!r}, item {item_id!r}: label {label} is not a multiple of 1/{top_grade} in [0, 1]"
                )
            grades[query_id][item_id] = round(label * top_grade)
    return grades


def _rows(path: Path, columns: int) -> Iterator[tuple[int, list[str]]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    empty = True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                fields = line.decode("utf-8").split()
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: line {number}: invalid UTF-8 at byte {error.start}") from None
            if not fields:
                continue
            if len(fields) != columns:
                raise InputError(f"{path}: line {number}: {len(fields)} columns, {columns} expected")
            empty = False
            yield number, fields
    if empty:
        raise InputError(f"{path}: holds no lines")


def _check_id(path: Path, what: str, value: str) -> None:
    if value.split() != [value]:
        raise InputError(f"{path}: {what} {value!r} is empty or holds white space, which TREC files cannot hold")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{path}: {what} {value!r} cannot be written as UTF-8")


def _integer(path: Path, number: int, what: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{path}: line {number}: {what} {text!r} is not an integer") from None


def _number(path: Path, number: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{path}: line {number}: score {text!r} is not a number") from None
    if not math.isfinite(value):
        raise InputError(f"{path}: line {number}: score {text!r} is not finite")
    return value
