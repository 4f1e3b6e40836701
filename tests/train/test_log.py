"""A run's log: one curve however often the run stopped, and whole whatever the disk does."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxslm.errors import InputError
from jaxslm.train.log import RunLog


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process grows within the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The log of three updates and an evaluation after the second, then a line that a kill cut short."""
    log = RunLog(tmp_path, 0, tensorboard=False)
    for step, name in ((1, "loss"), (2, "loss"), (2, "ndcg_at_10"), (3, "loss")):
        log.write(step, {name: 0.5})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    return tmp_path / "log.jsonl"


def test_what_followed_the_last_save_is_dropped(path: Path) -> None:
    before = path.read_text().splitlines()
    log = RunLog(path.parent, 2, tensorboard=False)
    assert log.holds("ndcg_at_10")
    assert not RunLog(path.parent, 1, tensorboard=False).holds("ndcg_at_10")
    log.write(2, {"loss": 0.25})
    assert path.read_text().splitlines() == [before[0], json.dumps({"step": 2, "loss": 0.25})]


def test_a_line_that_was_cut_short_is_dropped(path: Path) -> None:
    before = path.read_text().splitlines()
    RunLog(path.parent, 9, tensorboard=False)
    assert path.read_text().splitlines() == before[:4]


def test_a_full_disk_takes_nothing_from_the_log(path: Path) -> None:
    before = path.read_text().splitlines()
    with full_disk():
        log = RunLog(path.parent, 2, tensorboard=False)
        with pytest.raises(InputError, match=r"log.jsonl: cannot write, .* \(File too large\)"):
            log.write(3, {"loss": 0.5})
        with pytest.raises(InputError, match=r"log.jsonl: cannot write, .* \(File too large\)"):
            RunLog(path.parent, 2, tensorboard=True)
    assert path.read_text().splitlines() == before[:3]
