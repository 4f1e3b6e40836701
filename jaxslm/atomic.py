"""Write aside, then rename: a reader sees the whole result or none, and nothing that exists is overwritten."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxslm.errors import InputError


def refuse_existing(path: Path) -> None:
    """Raises InputError if `path` exists (call it before work that takes long)."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists: name an output that does not")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`; renames it to `path` when the block ends well, removes it otherwise.

    Raises:
        InputError: `path` exists, or its parent is not a folder that can be written.
    """
    refuse_existing(path)
    staging = _staging(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise InputError(f"{path}: cannot create it ({error.strerror})") from error
    try:
        yield staging
        refuse_existing(path)
        staging.replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields the path of a file to write beside `path`; renames it to `path` when the block ends well.

    Raises:
        InputError: `path` exists, or its parent is not a folder that can be written.
    """
    refuse_existing(path)
    staging = _staging(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.touch()
    except OSError as error:
        raise InputError(f"{path}: cannot create it ({error.strerror})") from error
    try:
        yield staging
        refuse_existing(path)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def _staging(path: Path) -> Path:
    """A name beside `path`, so that the rename stays on one file system, that no other writer has."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
