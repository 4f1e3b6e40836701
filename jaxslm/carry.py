"""Files for a machine without network: one archive, cut into folders that are copied one by one. Standard library only.

OUT/1, OUT/2, ...    at most FOLDER_BYTES in files of at most FILE_BYTES; each with an index of all
"""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxslm.errors import InputError

FILE_BYTES, FILES_PER_FOLDER = 15_000_000, 4
FOLDER_BYTES = FILE_BYTES * FILES_PER_FOLDER
INDEX = "index.json"


def pack(members: Mapping[str, Path], out: Path, file_bytes: int = FILE_BYTES) -> dict[str, Any]:
    """Packs files and folders under the names given; bytecode is left out. Returns what was made, as JSON.

    Raises:
        InputError: `out` exists, or a file cannot be read or written.
    """
    archive = out / "archive"
    try:
        out.mkdir(parents=True)
        with tarfile.open(archive, "w:gz") as tar:
            for name, path in members.items():
                tar.add(path, name, filter=lambda info: None if "__pycache__" in info.name else info)
        size = archive.stat().st_size
        names = [f"part-{number:03}" for number in range(-(-size // file_bytes))]
        index = json.dumps({"sha256": _sha256(archive), "files": names})
        with archive.open("rb") as file:
            for number, name in enumerate(names):
                folder = out / str(1 + number // FILES_PER_FOLDER)
                folder.mkdir(exist_ok=True)
                (folder / name).write_bytes(file.read(file_bytes))
                (folder / INDEX).write_text(index, encoding="utf-8")
        archive.unlink()
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror or error}") from None
    return {"out": str(out), "folders": len(list(out.iterdir())), "bytes": size}


def receive(folder: Path, work: Path) -> dict[str, Any]:
    """Keeps one folder's files in `work`; unpacks there when the last one has come. Returns what is missing, as JSON.

    Raises:
        InputError: no folder of `pack`, or what came is not what was packed.
    """
    try:
        index = json.loads((folder / INDEX).read_bytes())
        names, digest = [str(name) for name in index["files"]], str(index["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX}: no part of a carried archive ({error})") from None
    kept = work / f"received-{digest[:8]}"
    kept.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name).is_file():
            shutil.copy(folder / name, kept / name)
    missing = [name for name in names if not (kept / name).exists()]
    if not missing:
        archive = kept / "archive"
        with archive.open("wb") as whole:
            for name in names:
                whole.write((kept / name).read_bytes())
        if _sha256(archive) != digest:
            raise InputError(f"{kept}: damaged on the way; remove it and receive every folder again")
        with tarfile.open(archive) as tar:
            # Python before 3.11.4 has no filters; the archive is of our own making, and its hash was checked.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(work)
        shutil.rmtree(kept)
    return {"work": str(work), "complete": not missing, "missing": missing}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
