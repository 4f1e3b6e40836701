"""Carried archives come whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxslm.carry import FOLDER_BYTES, pack, receive
from jaxslm.errors import InputError


def packed(tmp_path: Path) -> Path:
    """A folder and a file that do not compress, in pieces of 1000 bytes: two folders of four and one more."""
    (tmp_path / "data" / "__pycache__").mkdir(parents=True)
    (tmp_path / "data" / "a.bin").write_bytes(np.random.default_rng(0).bytes(6000))
    (tmp_path / "data" / "__pycache__" / "a.pyc").write_bytes(b"bytecode")
    (tmp_path / "b.txt").write_text("text")
    answer = pack({"x/data": tmp_path / "data", "b.txt": tmp_path / "b.txt"}, tmp_path / "there", file_bytes=1000)
    assert answer["folders"] == 2
    return tmp_path / "there"


def test_folders_in_any_order_and_twice_make_the_same_files(tmp_path: Path) -> None:
    there, work = packed(tmp_path), tmp_path / "work"
    first = receive(there / "2", work)
    assert not first["complete"]
    assert first["missing"] == [f"part-{number:03}" for number in range(4)]
    assert receive(there / "2", work) == first
    assert receive(there / "1", work) == {"work": str(work), "complete": True, "missing": []}
    assert (work / "x" / "data" / "a.bin").read_bytes() == (tmp_path / "data" / "a.bin").read_bytes()
    assert sorted(path.name for path in work.rglob("*") if path.is_file()) == ["a.bin", "b.txt"]


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    there, work = packed(tmp_path), tmp_path / "work"
    part = there / "1" / "part-001"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    receive(there / "1", work)
    with pytest.raises(InputError, match="damaged on the way"):
        receive(there / "2", work)
    assert not (work / "x").exists()


@pytest.mark.parametrize("index", [None, "{", "[]", json.dumps({"files": []})])
def test_other_folders_are_refused(tmp_path: Path, index: str | None) -> None:
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    with pytest.raises(InputError, match="no part of a carried archive"):
        receive(tmp_path, tmp_path / "work")


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    there = packed(tmp_path)
    with pytest.raises(InputError, match="there: File exists"):
        pack({"b.txt": tmp_path / "b.txt"}, there)
    with pytest.raises(InputError, match=r"absent: No such file"):
        pack({"absent": tmp_path / "absent"}, tmp_path / "other")


def test_a_folder_can_be_copied_in_one_go() -> None:
    assert FOLDER_BYTES <= 60_000_000
