"""Write aside, then rename: a reader sees the whole result or none, and nothing that exists is overwritten."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxslm.errors import InputError

DISK_REFUSES = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS})
"""Errors that mean that the disk takes no more, wherever in a block they come from."""


def cannot_write(path: Path, error: Exception) -> InputError:
    """Returns the one line that says why `path` could not be written."""
    return InputError(f"{path}: cannot write it ({disk_reason(error)})")


def disk_reason(error: Exception) -> str:
    """Returns what the system says of the disk, as in "No space left on device", else the error's first line."""
    reason = str(error)
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of copytree: [(from, to, why)]
        reason = re.sub(r"^\[Errno \d+\] ([^:]*):.*", r"\1", str(error.args[0][0][-1]))
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    elif code := re.search(r"os_error_code='(\d+)'", reason):  # of TensorStore, behind every path and description
        reason = os.strerror(int(code[1]))
    lines = reason.strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def refuse_existing(path: Path) -> None:
    """Raises InputError if `path` exists (call it before work that takes long)."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists: name an output that does not")


def refuse_unwritable(path: Path) -> None:
    """Raises InputError if `path` exists or cannot be created: call it before work that a failure would throw away."""
    refuse_existing(path)
    folder = next(each for each in path.absolute().parents if os.path.lexists(each))
    if not folder.is_dir():
        raise InputError(f"{path}: cannot create it ({folder} is not a folder)")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot create it ({folder} cannot be written)")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`; renames it to `path` when the block ends well, removes it otherwise.

    Raises:
        InputError: `path` exists, its parent is not a folder that can be written, or the disk refuses what the block
            writes.
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
    except OSError as error:
        if error.errno in DISK_REFUSES:
            raise cannot_write(path, error) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields the path of a file to write beside `path`; renames it to `path` when the block ends well.

    Raises:
        InputError: `path` exists, its parent is not a folder that can be written, or the disk refuses what the block
            writes.
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
    except OSError as error:
        if error.errno in DISK_REFUSES:
            raise cannot_write(path, error) from error
        raise
    finally:
        staging.unlink(missing_ok=True)


def _staging(path: Path) -> Path:
    """A name beside `path`, so that the rename stays on one file system, that no other writer has."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
