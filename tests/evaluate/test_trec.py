"""TREC files come back as they went, and every fault is named with its line."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxslm.errors import InputError
from jaxslm.evaluate.trec import grades_to_labels, labels_to_grades, read_qrels, read_run, write_qrels, write_run

IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda text: text.split() == [text]
)
RUNS = st.dictionaries(
    IDS,
    st.dictionaries(IDS, st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)
QRELS = st.dictionaries(IDS, st.dictionaries(IDS, st.integers(-1, 4), min_size=1, max_size=6), min_size=1, max_size=4)
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SETTINGS
@given(RUNS)
def test_run_round_trip(tmp_path: Path, run: dict[str, dict[str, float]]) -> None:
    path = tmp_path / "run"
    path.unlink(missing_ok=True)
    write_run(path, run)
    assert read_run(path) == run


@SETTINGS
@given(QRELS)
def test_qrels_round_trip(tmp_path: Path, grades: dict[str, dict[str, int]]) -> None:
    path = tmp_path / "qrels"
    path.unlink(missing_ok=True)
    write_qrels(path, grades)
    assert read_qrels(path) == grades


def test_run_lines(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"q": {"a": 0.1, "b": 2.0}}, tag="mine")
    assert (tmp_path / "run").read_text() == "q Q0 b 1 2.0 mine\nq Q0 a 2 0.1 mine\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q Q0 a 1 0.5 t\nq Q0 a 2 0.4 t\n", "line 2: item 'a' appears twice for query 'q'"),
        (b"q Q0 a 1 0.5\n", "line 1: 5 columns, 6 expected"),
        (b"\nq Q0 a first 0.5 t\n", "line 2: rank 'first' is not an integer"),
        (b"q Q0 a 1 high t\n", "line 1: score 'high' is not a number"),
        (b"q Q0 a 1 nan t\n", "line 1: score 'nan' is not finite"),
        (b"q Q0 a 1 0.5 t\n\xff Q0 a 1 0.5 t\n", "line 2: invalid UTF-8 at byte 0"),
        (b"\n\n", "holds no lines"),
    ],
)
def test_bad_runs(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_run(path)


def test_bad_qrels(tmp_path: Path) -> None:
    path = tmp_path / "qrels"
    path.write_text("q 0 a 1\nq 0 b 0.5\n")
    with pytest.raises(InputError, match=r"line 2: grade '0\.5' is not an integer"):
        read_qrels(path)
    with pytest.raises(InputError, match="no such file"):
        read_qrels(tmp_path / "absent")


@pytest.mark.parametrize("bad", ["a b", "", "a\u2028b", "\ud800", "\ta"])
def test_ids_that_trec_cannot_hold(tmp_path: Path, bad: str) -> None:
    with pytest.raises(InputError, match="item id"):
        write_run(tmp_path / "run", {"q": {bad: 1.0}})
    with pytest.raises(InputError, match="query id"):
        write_qrels(tmp_path / "qrels", {bad: {"a": 1}})
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_or_half_written(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(InputError, match="not finite"):
        write_run(path, {"q": {"a": 1.0}, "r": {"a": float("inf")}})
    assert list(tmp_path.iterdir()) == []
    write_run(path, {"q": {"a": 1.0}})
    with pytest.raises(InputError, match="exists"):
        write_run(path, {"q": {"a": 2.0}})
    assert read_run(path) == {"q": {"a": 1.0}}


def test_grades_and_labels() -> None:
    labels = {"q": {"a": 1.0, "b": 2 / 3, "c": 1 / 3, "d": 0.0}}
    assert labels_to_grades(labels, 3) == {"q": {"a": 3, "b": 2, "c": 1, "d": 0}}
    assert grades_to_labels(labels_to_grades(labels, 3), 3) == labels
    assert grades_to_labels({"q": {"spam": -1}}, 1) == {"q": {"spam": 0.0}}
    with pytest.raises(InputError, match=r"label 0\.5 is not a multiple of 1/3"):
        labels_to_grades({"q": {"a": 0.5}}, 3)
    with pytest.raises(InputError, match="grade 4, but the top is 3"):
        grades_to_labels({"q": {"a": 4}}, 3)
