"""Whether an LMDB file holds all pages in use. LMDB maps the file and does not ask: a missing page is a SIGBUS.

A file may be shorter than its pages and whole: those that a transaction made and freed again are never written. They
are in the free list, which LMDB shows nobody, so it is read here, in the format of LMDB 0.9 on 64-bit machines.
"""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

_META = struct.Struct("=16x2I16x40xQ48x2Q")  # magic, version, root of the free list, last page, transaction
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_NO_PAGE = (1 << 64) - 1
_HEADER = struct.Struct("=10x2H2x")  # flags, end of the nodes' offsets
_NODE = struct.Struct("=4H")  # size of the data or number of a page in two halves, flags or its upper part, key size
_BRANCH_PAGE, _DATA_ON_OWN_PAGES = 1, 1

Read = Callable[[int, int], bytes]
"""Returns so many bytes from a place in the file, fewer where it ends."""


def misses_pages(file: Path, page_bytes: int, transaction: int) -> bool:
    """Returns whether `data.mdb` ends before a page in use.

    Args:
        transaction: id of a read transaction that is open, so that no writer changes what is read here.
    """
    with file.open("rb") as content:

        def read(start: int, size: int) -> bytes:
            content.seek(start)
            return content.read(size)

        try:
            root, last_page = _meta(read, page_bytes, transaction)
            have = os.fstat(content.fileno()).st_size // page_bytes
            missing = set(range(have, last_page + 1))
            return bool(missing) and not missing.issubset(_free_pages(read, page_bytes, root))
        except struct.error:  # the free list itself is cut
            return True


def _meta(read: Read, page_bytes: int, transaction: int) -> tuple[int, int]:
    """Returns the root of a transaction's free list and its last page."""
    for start in (0, page_bytes):
        magic, version, root, last_page, found = _META.unpack(read(start, _META.size))
        if (magic, version, found) == (_MAGIC, _VERSION, transaction):
            return root, last_page
    raise struct.error("no such transaction")


def _free_pages(read: Read, page_bytes: int, root: int) -> Iterator[int]:
    """Yields the numbers of the pages that no tree uses."""
    waiting = [] if root == _NO_PAGE else [root]
    while waiting:
        page = read(waiting.pop() * page_bytes, page_bytes)
        flags, end = _HEADER.unpack_from(page)
        for (offset,) in struct.iter_unpack("=H", page[_HEADER.size : end]):
            low, high, upper, key_size = _NODE.unpack_from(page, offset)
            data = offset + _NODE.size + key_size
            if flags & _BRANCH_PAGE:
                waiting.append(low | high << 16 | upper << 32)
            elif upper & _DATA_ON_OWN_PAGES:
                start = struct.unpack_from("=Q", page, data)[0] * page_bytes + _HEADER.size
                (number,) = struct.unpack("=Q", read(start, 8))
                yield from struct.unpack(f"={number}Q", read(start + 8, 8 * number))
            else:
                (number,) = struct.unpack_from("=Q", page, data)
                yield from struct.unpack_from(f"={number}Q", page, data + 8)
