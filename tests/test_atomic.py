"""Whole results or none: staging is renamed when its block ends well and removed otherwise."""

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from jaxslm.atomic import disk_reason, new_file, new_folder, refuse_existing
from jaxslm.errors import InputError

Opener = Callable[[Path], AbstractContextManager[Path]]
both = pytest.mark.parametrize("opener", [new_file, new_folder])


def fill(staging: Path, text: str) -> None:
    (staging / "part" if staging.is_dir() else staging).write_text(text)


def content(path: Path) -> str:
    return (path / "part" if path.is_dir() else path).read_text()


@both
def test_the_result_appears_whole(tmp_path: Path, opener: Opener) -> None:
    out = tmp_path / "new" / "parents" / "out"
    with opener(out) as staging:
        fill(staging, "all")
        assert not out.exists()
    assert content(out) == "all"
    assert list(out.parent.iterdir()) == [out]


@both
def test_a_failure_leaves_nothing(tmp_path: Path, opener: Opener) -> None:
    def write_half() -> None:
        with opener(tmp_path / "out") as staging:
            fill(staging, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == []


@both
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path, opener: Opener, code: int) -> None:
    def write_half() -> None:
        with opener(tmp_path / "out") as staging:
            fill(staging, "half")
            raise OSError(code, os.strerror(code))

    with pytest.raises(InputError, match=rf"out: cannot write it \({os.strerror(code)}\)"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_what_the_system_says_is_found_within_tensorstores_message() -> None:
    message = f"OUT_OF_RANGE: Error writing {'x' * 500}: File too large [spec='{'y' * 500}'] [os_error_code='27']"
    assert disk_reason(ValueError(message)) == os.strerror(27)
    assert disk_reason(ValueError("no such driver\nand more")) == "no such driver"
    assert disk_reason(RuntimeError()) == "RuntimeError"


@both
def test_other_errors_of_the_block_are_its_own(tmp_path: Path, opener: Opener) -> None:
    def read_what_is_not_there() -> None:
        with opener(tmp_path / "out"):
            (tmp_path / "absent").read_text()

    with pytest.raises(FileNotFoundError):
        read_what_is_not_there()
    assert list(tmp_path.iterdir()) == []


@both
@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_nothing_existing_is_overwritten(tmp_path: Path, opener: Opener, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("old")
    elif kind == "folder":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"{out} exists"):
        refuse_existing(out)
    with pytest.raises(InputError, match=f"{out} exists"), opener(out):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == [out]


@both
def test_a_result_that_appears_meanwhile_is_kept(tmp_path: Path, opener: Opener) -> None:
    out = tmp_path / "out"

    def write_second() -> None:
        with opener(out) as staging:
            fill(staging, "second")
            out.write_text("first")

    with pytest.raises(InputError, match="exists"):
        write_second()
    assert out.read_text() == "first"
    assert list(tmp_path.iterdir()) == [out]


@both
def test_a_parent_that_is_a_file(tmp_path: Path, opener: Opener) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(InputError, match="cannot create it") as caught, opener(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")
    assert "\n" not in str(caught.value)


@both
def test_a_name_that_is_too_long(tmp_path: Path, opener: Opener) -> None:
    with pytest.raises(InputError, match="cannot create it"), opener(tmp_path / ("x" * 250)):
        pytest.fail("the block must not run")
