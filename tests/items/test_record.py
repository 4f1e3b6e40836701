"""The record format: what comes back is what was put in, of the right model, undamaged, or an exception."""

import dataclasses
import hashlib
import re
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxslm.errors import InputError
from jaxslm.items.record import (
    CorruptRecord,
    Record,
    RecordIdentity,
    StaleRecord,
    StorageDtype,
    pack_record,
    read_header,
    record_bytes,
    unpack_record,
    unpack_vectors,
)
from tests.items.fakes import DTYPES, identity, packed, record, sha256

LARGEST_ERROR = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127, "float8_e4m3": 2**-4}
"""Of values within [-1, 1] relative to the largest of their vector; of bfloat16 and float8 to the value itself."""

some_vectors = arrays(
    np.float32,
    st.tuples(st.integers(1, 17), st.integers(1, 40)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)


@pytest.mark.parametrize("dtype", DTYPES)
@given(vectors=some_vectors)
def test_vectors_come_back_as_exactly_as_their_dtype_allows(dtype: StorageDtype, vectors: np.ndarray) -> None:
    original = Record(identity(), vectors, sha256("text"))
    data = pack_record(original, dtype)
    assert len(data) == record_bytes(len(vectors), vectors.shape[1], dtype)
    found = unpack_record(data, identity())
    assert (found.identity, found.source_sha256) == (original.identity, original.source_sha256)
    assert found.vectors.dtype == np.float32
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    error = np.abs(found.vectors.astype(np.float64) - vectors)
    # float8 has subnormal values: below 2^-6 of 448 the error is a fixed step.
    step = largest * 2.0**-18 if dtype == "float8_e4m3" else 0
    reference = largest if dtype == "int8" else np.abs(vectors)
    assert (error <= 1.001 * LARGEST_ERROR[dtype] * reference + step + 1e-35).all()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_every_vector_has_its_own_scale(dtype: StorageDtype) -> None:
    small = record(d=64)
    vectors = small.vectors * np.geomspace(1e-6, 1e6, 8, dtype=np.float32)[:, None]
    found = unpack_record(pack_record(dataclasses.replace(small, vectors=vectors), dtype), identity()).vectors
    for scaled, plain in zip(found, vectors, strict=True):
        assert np.abs(scaled - plain).max() < 0.05 * np.abs(plain).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_changed_byte_is_found(dtype: StorageDtype) -> None:
    data = packed(c=2, d=5, dtype=dtype)
    for place in range(len(data)):
        for change in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[place] ^= change
            with pytest.raises(CorruptRecord):
                unpack_record(bytes(changed), identity())
            with pytest.raises(CorruptRecord):
                read_header(bytes(changed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cut_and_every_addition_is_found(dtype: StorageDtype) -> None:
    data = packed(c=2, d=5, dtype=dtype)
    for size in range(len(data)):
        with pytest.raises(CorruptRecord):
            unpack_record(data[:size], identity())
    for more in (b"\0", b"\xff", b"\0" * 4, data):
        with pytest.raises(CorruptRecord):
            unpack_record(data + more, identity())


@given(data=st.binary(max_size=400))
def test_other_bytes_are_no_record(data: bytes) -> None:
    with pytest.raises(CorruptRecord):
        unpack_record(data, identity())


@pytest.mark.parametrize("name", ["encoder", "ranker", "template"])
def test_a_record_for_another_model_is_stale_and_both_hashes_are_named(name: str) -> None:
    data = packed(of=identity(**{name: "old"}))
    with pytest.raises(StaleRecord, match=f"{name}_sha256 is {sha256('old')}, expected {sha256(name)}"):
        unpack_record(data, identity())
    assert read_header(data).identity == identity(**{name: "old"})


def test_a_record_of_another_version_is_stale() -> None:
    body = bytearray(packed()[:-4])
    body[4] = 2
    with pytest.raises(StaleRecord, match="version 2, this release reads 1"):
        unpack_record(bytes(body) + zlib.crc32(body).to_bytes(4, "little"), identity())


def test_a_damaged_record_for_another_model_is_corrupt() -> None:
    data = bytearray(packed(of=identity("old")))
    data[-10] ^= 1
    with pytest.raises(CorruptRecord):
        unpack_record(bytes(data), identity())


def test_a_header_says_all_that_decides_whether_to_encode_again() -> None:
    original = record(c=4, d=32)
    header = read_header(pack_record(original, "bfloat16"))
    assert header.identity == original.identity
    assert header.source_sha256 == original.source_sha256
    assert (header.dtype, header.num_vectors, header.width) == ("bfloat16", 4, 32)


def test_many_records_are_decoded_as_each_alone() -> None:
    old = identity("old")
    data = [packed(n, c, d, dtype) for n, dtype in enumerate(DTYPES) for c, d in [(8, 64), (1, 64), (8, 32)]]
    data += [packed(90, of=old), b"", packed(91)[:-1], packed(92, of=old), packed(93), packed(93)]
    data = [data[n] for n in np.random.default_rng(0).permutation(len(data))]
    for one, answer in zip(data, unpack_vectors(data, identity()), strict=True):
        if isinstance(answer, InputError):
            with pytest.raises(type(answer), match=re.escape(str(answer))):
                unpack_record(one, identity())
        else:
            np.testing.assert_array_equal(answer, unpack_record(one, identity()).vectors)
    assert unpack_vectors([], identity()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_that_are_not_finite_are_refused(dtype: StorageDtype, value: float) -> None:
    broken = record()
    broken.vectors[3, 5] = value
    with pytest.raises(InputError, match="must be finite"):
        pack_record(broken, dtype)


@pytest.mark.parametrize(
    ("vectors", "dtype", "message"),
    [
        (np.zeros((0, 8)), "int8", "must be 1 to 65535"),
        (np.zeros((8, 0)), "int8", "must be 1 to 65535"),
        (np.full((1, 8), 3.4e38), "bfloat16", "range of bfloat16"),
    ],
)
def test_vectors_that_no_record_can_hold_are_refused(vectors: np.ndarray, dtype: StorageDtype, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack_record(Record(identity(), vectors.astype(np.float32), sha256("")), dtype)


@pytest.mark.parametrize("value", ["", "abc", "G" * 64, "a" * 63, "a" * 65, "A" * 64])
def test_hashes_are_64_hex_digits(value: str) -> None:
    good = sha256("good")
    with pytest.raises(InputError, match="ranker_sha256: must be 64 hex digits"):
        RecordIdentity(good, value, good)
    with pytest.raises(InputError, match="source_sha256: must be 64 hex digits"):
        pack_record(dataclasses.replace(record(), source_sha256=value), "int8")


def test_the_format_stays_as_it_is() -> None:
    """Stores outlive releases: a change of these bytes needs a new format version."""
    vectors = np.array([[0.0, -1.0, 0.5], [3.0, 1e-3, -4.0]], np.float32)
    original = Record(identity(), vectors, sha256("text"))
    data = pack_record(original, "int8")
    assert data[:12] == b"JSIR" + bytes([1, 2]) + (2).to_bytes(2, "little") + (3).to_bytes(4, "little")
    assert data[12:140].hex() == "".join(map(sha256, ["encoder", "ranker", "template", "text"]))
    assert np.frombuffer(data[140:148], "<f4").tolist() == [np.float32(1 / 127), np.float32(4 / 127)]
    assert np.frombuffer(data[148:154], np.int8).tolist() == [0, -127, 64, 95, 0, -127]
    assert data[154:] == zlib.crc32(data[:154]).to_bytes(4, "little")
    hashes = {dtype: hashlib.sha256(pack_record(original, dtype)).hexdigest()[:16] for dtype in DTYPES}
    assert hashes == {
        "float32": "6b74b21bf8b943da",
        "bfloat16": "a905bb21a176e66d",
        "int8": "f46c0ae2a791b207",
        "float8_e4m3": "cd6340d1e3ffdb5d",
    }
