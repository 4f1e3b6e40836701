"""The binary format of an item's embedding tokens, which names the model that made them.

All numbers are little-endian:

    offset        bytes    what
    0             4        magic "JSIR"
    4             1        format version
    5             1        dtype: 0 float32, 1 bfloat16, 2 int8, 3 float8_e4m3
    6             2        C, the number of vectors
    8             4        D, their width
    12            3 x 32   sha256 of encoder, ranker and template
    108           32       sha256 of the item's text
    140           C x 4    int8 and float8 only: scale of each vector, float32
    then          C x D    the values, 1, 2 or 4 bytes each
    last          4        CRC-32 of all bytes before it

A CRC-32 finds every error of up to 32 bits in a row, so every changed byte; the length follows from the header, so that
a record that was cut is found too. In all versions the first five bytes and the checksum stay where they are.
"""

import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import ml_dtypes  # comes with jax, but needs nothing of it
import numpy as np
from jaxtyping import Float

from jaxslm.errors import InputError

StorageDtype = Literal["float32", "bfloat16", "int8", "float8_e4m3"]
Vectors = Float[np.ndarray, "_ _"]

FORMAT_VERSION = 1
_MAGIC = b"JSIR"
_HEADER = struct.Struct("<4sBBHI32s32s32s32s")
_SOURCE_BYTES = 32
_CHECKSUM_BYTES = 4
_SCALE = np.dtype("<f4")


@dataclass(frozen=True)
class _Storage:
    """How values are kept. largest: what a vector's largest value becomes; None: values are kept as they are."""

    name: StorageDtype
    code: int
    dtype: np.dtype[Any]
    largest: float | None


_STORAGES: tuple[_Storage, ...] = (
    _Storage("float32", 0, np.dtype("<f4"), None),
    _Storage("bfloat16", 1, np.dtype(ml_dtypes.bfloat16), None),
    _Storage("int8", 2, np.dtype(np.int8), 127.0),
    _Storage("float8_e4m3", 3, np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
)
_BY_NAME = {storage.name: storage for storage in _STORAGES}
_BY_CODE = {storage.code: storage for storage in _STORAGES}
_FLOAT8_VALUES = np.arange(256, dtype=np.uint8).view(_BY_NAME["float8_e4m3"].dtype).astype(np.float32)
"""What each byte stands for."""


class StaleRecord(InputError):  # noqa: N818 (a state of a record)
    """A whole record that another encoder, ranker, template or release made. The message holds both sides."""


class CorruptRecord(InputError):  # noqa: N818
    """Bytes that are no record: changed, cut or something else."""


@dataclass(frozen=True)
class RecordIdentity:
    """What a record is valid for: sha256 in hex of the encoder, of the ranker that reads it and of its template."""

    encoder_sha256: str
    ranker_sha256: str
    template_sha256: str

    def __post_init__(self) -> None:
        for field in fields(self):
            _hash_bytes(field.name, getattr(self, field.name))


@dataclass(frozen=True)
class Record:
    """An item's embedding tokens, float32 [C, D]. source_sha256: hash of the text that they stand for, in hex."""

    identity: RecordIdentity
    vectors: Vectors
    source_sha256: str


@dataclass(frozen=True)
class RecordHeader:
    """What a record says of itself: enough to know whether it must be made anew."""

    identity: RecordIdentity
    source_sha256: str
    dtype: StorageDtype
    num_vectors: int
    width: int


def record_bytes(num_vectors: int, width: int, dtype: StorageDtype) -> int:
    """Returns the size of a record in bytes."""
    storage = _BY_NAME[dtype]
    scales = 0 if storage.largest is None else num_vectors * _SCALE.itemsize
    return _HEADER.size + scales + num_vectors * width * storage.dtype.itemsize + _CHECKSUM_BYTES


def pack_record(record: Record, dtype: StorageDtype) -> bytes:
    """Returns the bytes of a record. With int8 and float8 each vector keeps its own scale, a float32.

    Relative to a vector's largest value the stored values are off by at most 1/254 (int8) or 1/28 (float8_e4m3).

    Raises:
        InputError: vectors that are not finite, none at all, or values beyond the range of bfloat16.
    """
    storage = _BY_NAME[dtype]
    vectors = np.asarray(record.vectors, np.float32)
    num_vectors, width = vectors.shape
    if not vectors.size or num_vectors > np.iinfo(np.uint16).max:
        raise InputError(f"vectors: must be 1 to 65535 of at least one value, are {num_vectors} of {width}")
    if not np.isfinite(vectors).all():
        raise InputError("vectors: must be finite")
    scales = b""
    if storage.largest is None:
        with np.errstate(over="ignore"):
            values = vectors.astype(storage.dtype)
        if not np.isfinite(values.astype(np.float32)).all():
            raise InputError(f"vectors: must be within the range of {dtype}")
    else:
        # The lower bound keeps a vector of zeros from being divided by zero.
        scale_C1 = np.maximum(np.abs(vectors).max(axis=1, keepdims=True) / storage.largest, np.finfo(np.float32).tiny)
        scaled = np.clip(vectors / scale_C1, -storage.largest, storage.largest)
        values = (np.rint(scaled) if storage.name == "int8" else scaled).astype(storage.dtype)
        scales = scale_C1.astype(_SCALE).tobytes()
    header = _HEADER.pack(
        _MAGIC,
        FORMAT_VERSION,
        storage.code,
        num_vectors,
        width,
        *(bytes.fromhex(getattr(record.identity, field.name)) for field in fields(RecordIdentity)),
        _hash_bytes("source_sha256", record.source_sha256),
    )
    body = header + scales + values.tobytes()
    return body + zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little")


def unpack_record(data: bytes, expected: RecordIdentity) -> Record:
    """Returns the record of these bytes, its vectors as float32.

    Raises:
        StaleRecord: it was made for another identity; the message holds both.
        CorruptRecord: a byte is not what was written, or bytes are missing.
    """
    [vectors] = unpack_vectors([data], expected)
    if isinstance(vectors, InputError):
        raise vectors
    return Record(expected, vectors, read_header(data).source_sha256)


def unpack_vectors(records: Sequence[bytes], expected: RecordIdentity) -> list[Vectors | StaleRecord | CorruptRecord]:
    """Returns per record its vectors, float32 [C, D], or why they must not be used. Does not depend on its neighbours.

    Records of one shape, which is all of a store as a rule, are decoded together.
    """
    answers: list[Vectors | StaleRecord | CorruptRecord | None] = [None] * len(records)
    alike: dict[tuple[int, bytes], list[int]] = {}
    for place, data in enumerate(records):
        problem = _damage(data)
        if problem is None:
            alike.setdefault((len(data), data[: _HEADER.size - _SOURCE_BYTES]), []).append(place)
        else:
            answers[place] = problem
    for places in alike.values():
        try:
            header = _parse_header(records[places[0]])
            if header.identity != expected:
                raise StaleRecord(_difference(header.identity, expected))
        except (StaleRecord, CorruptRecord) as error:
            for place in places:
                answers[place] = error
            continue
        for place, vectors in zip(places, _decode([records[place] for place in places], header), strict=True):
            answers[place] = vectors
    return [answer for answer in answers if answer is not None]


def read_header(data: bytes) -> RecordHeader:
    """Returns what a record says of itself, whatever model it was made for.

    Raises:
        CorruptRecord: as `unpack_record`; the values are checked too.
        StaleRecord: another format version.
    """
    problem = _damage(data)
    if problem is not None:
        raise problem
    return _parse_header(data)


def _damage(data: bytes) -> CorruptRecord | None:
    if len(data) < _HEADER.size + _CHECKSUM_BYTES:
        return CorruptRecord(f"item record: {len(data)} bytes are too few")
    found = zlib.crc32(memoryview(data)[:-_CHECKSUM_BYTES])
    if found != int.from_bytes(data[-_CHECKSUM_BYTES:], "little"):
        return CorruptRecord("item record: damaged (its checksum differs)")
    return None


def _parse_header(data: bytes) -> RecordHeader:
    """Returns the header of a record whose checksum is right."""
    magic, version, code, num_vectors, width, *hashes = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise CorruptRecord("item record: something else (it does not start as a record)")
    if version != FORMAT_VERSION:
        raise StaleRecord(f"item record: format version {version}, this release reads {FORMAT_VERSION}")
    if code not in _BY_CODE:
        raise CorruptRecord(f"item record: unknown dtype {code}")
    *identity, source = (value.hex() for value in hashes)
    dtype = _BY_CODE[code].name
    if not num_vectors or not width or len(data) != record_bytes(num_vectors, width, dtype):
        raise CorruptRecord(f"item record: {len(data)} bytes do not hold {num_vectors} {dtype} vectors of {width}")
    return RecordHeader(RecordIdentity(*identity), source, dtype, num_vectors, width)


def _decode(records: Sequence[bytes], header: RecordHeader) -> Float[np.ndarray, "B C D"]:
    """Returns the vectors of records that share a header, as float32."""
    num_vectors, width, storage = header.num_vectors, header.width, _BY_NAME[header.dtype]
    block = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1)
    start = _HEADER.size + (0 if storage.largest is None else num_vectors * _SCALE.itemsize)
    values = block[:, start:-_CHECKSUM_BYTES].view(storage.dtype).reshape(len(records), num_vectors, width)
    if storage.name == "float8_e4m3":
        values = np.take(_FLOAT8_VALUES, values.view(np.uint8))  # ten times as fast as a cast
    if storage.largest is None:
        return values.astype(np.float32)
    scale_BC1 = block[:, _HEADER.size : start].view(_SCALE)[..., None]
    return np.multiply(values, scale_BC1, dtype=np.float32)


def _difference(found: RecordIdentity, expected: RecordIdentity) -> str:
    differing = [
        field.name for field in fields(RecordIdentity) if getattr(found, field.name) != getattr(expected, field.name)
    ]
    parts = [f"{name} is {getattr(found, name)}, expected {getattr(expected, name)}" for name in differing]
    return f"item record made for another model: {'; '.join(parts)}"


def _hash_bytes(name: str, value: str) -> bytes:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise InputError(f"{name}: must be 64 hex digits, is {value!r}")
    return bytes.fromhex(value)
