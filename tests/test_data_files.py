"""Data files: every bad line is named by number and rule; Parquet equals JSON Lines."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxslm.data_files import Item, Query, Request, read_items, read_queries, read_records
from jaxslm.errors import InputError

GOOD_ITEM = '{"id": "a", "text": "x"}'
GOOD_QUERY = '{"query_id": "q", "query": "job", "items": [{"id": "a", "label": 1}]}'


def write(folder: Path, *lines: str | bytes, name: str = "data.jsonl") -> Path:
    file = folder / name
    file.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return file


def query(items: str, **fields: str) -> str:
    head = json.dumps({"query_id": "q", "query": "job"} | fields)
    return f'{head[:-1]}, "items": {items}}}'


def test_records_come_in_order(tmp_path: Path) -> None:
    file = write(
        tmp_path, '{"id": "b", "title": "T", "text": "é", "city": "Köln"}', "", "  ", '{"id": "a", "text": ""}', ""
    )
    items = read_items(file)
    assert list(items) == ["b", "a"]
    assert (items["b"].title, items["b"].text, items["b"].model_extra) == ("T", "é", {"city": "Köln"})
    queries = read_queries(write(tmp_path, query('[{"id": "a", "label": 1}, {"id": "b", "label": 0.25}]')))
    assert [(item.id, item.label) for item in queries[0].items] == [("a", 1.0), ("b", 0.25)]
    (request,) = read_records(write(tmp_path, '{"query": "job", "items": [{"id": "a"}, {"text": ""}]}'), Request)
    assert [(item.id, item.text) for item in request.items] == [("a", None), (None, "")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "a", "text": "\xff"}', "invalid UTF-8 at byte 21"),
        (b'{"id": "a", "text": "\xed\xa0\x80"}', "invalid UTF-8 at byte 21"),
        ('{"id": "a", "text": "x"', "broken JSON"),
        ('{"id": "a" "text": "x"}', "broken JSON .*column 12"),
        ("{'id': 'a'}", "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ('{"id": "a", "text": ' + "[" * 100_000 + "]" * 100_000 + "}", "broken JSON"),
        ('{"id": "a", "text": ' + "9" * 10_000 + "}", "broken JSON"),
        ("[1, 2]", "record: "),
        ("null", "record: "),
        ('"text"', "record: "),
        ('{"text": "x"}', "id: Field required"),
        ('{"id": "a"}', "text: Field required"),
        ('{"id": "", "text": "x"}', "id: must not be empty"),
        ('{"id": " ", "text": "x"}', "id: must not be empty"),
        ('{"id": 7, "text": "x"}', "id: Input should be a valid string"),
        ('{"id": "a", "text": null}', "text: Input should be a valid string"),
        ('{"id": "a", "text": "x", "title": 3}', "title: Input should be a valid string"),
        ('{"id": "a", "text": "x", "city": 3}', "city: Input should be a valid string"),
    ],
    ids=lambda value: repr(value)[:40] if value.__class__ is not str else value[:40],
)
def test_bad_items(tmp_path: Path, line: str | bytes, message: str) -> None:
    file = write(tmp_path, GOOD_ITEM, "", line)
    with pytest.raises(InputError, match=f"data.jsonl: line 3: {message}") as caught:
        list(read_records(file, Item))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (query('[{"id": "a", "label": NaN}]'), "broken JSON .NaN is not a JSON number"),
        (query('[{"id": "a", "label": -Infinity}]'), "broken JSON .-Infinity is not a JSON number"),
        (query('[{"id": "a", "label": 1.5}]'), "items.0.label: Input should be less than or equal to 1"),
        (query('[{"id": "a", "label": -0.1}]'), "items.0.label: Input should be greater than or equal to 0"),
        (query('[{"id": "a", "label": 1e999}]'), "items.0.label: "),
        (query('[{"id": "a", "label": true}]'), "items.0.label: "),
        (query('[{"id": "a", "label": "1"}]'), "items.0.label: Input should be a valid number"),
        (query('[{"id": "a"}]'), "items.0.label: Field required"),
        (query('[{"id": "a", "label": 1}, {"id": "a", "label": 0}]'), "record: item ids must be unique within a query"),
        (query('[{"id": "a", "label": 1, "grade": 2}]'), "items.0.grade: Extra inputs are not permitted"),
        (query("[]"), "items: .*at least 1 item"),
        (query('{"a": 1}'), "items: Input should be a valid (tuple|list)"),
        (query('[{"id": "a", "label": 1}]', query=" \n"), "query: must not be empty"),
        (query('[{"id": "a", "label": 1}]', colour="red"), "colour: Extra inputs are not permitted"),
    ],
)
def test_bad_queries(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InputError, match=f"data.jsonl: line 2: .*({message})") as caught:
        list(read_records(write(tmp_path, GOOD_QUERY, line), Query))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "", "items": [{"text": "x"}]}', "query: must not be empty"),
        ('{"query": "job", "items": []}', "items: .*at least 1 item"),
        ('{"query": "job", "items": [{}]}', "items.0: an item needs a text or an id"),
        ('{"query": "job", "items": [{"text": 3}]}', "items.0.text: Input should be a valid string"),
        ('{"items": [{"text": "x"}]}', "query: Field required"),
    ],
)
def test_bad_requests(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InputError, match=f"data.jsonl: line 1: {message}"):
        list(read_records(write(tmp_path, line), Request))


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    """JSON can spell what no tokenizer takes; whole pairs are text."""
    (item,) = read_records(write(tmp_path, r'{"id": "a", "text": "\uD83D\ude00"}'), Item)
    assert item.text == "😀"
    with pytest.raises(InputError, match=r"data.jsonl: line 1: half of a surrogate pair"):
        list(read_records(write(tmp_path, r'{"id": "a", "text": "\ud800"}'), Item))


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    """On the first line only, where some editors write it."""
    mark = b"\xef\xbb\xbf"
    assert list(read_items(write(tmp_path, mark + GOOD_ITEM.encode()))) == ["a"]
    with pytest.raises(InputError, match="line 2: broken JSON"):
        list(read_records(write(tmp_path, GOOD_ITEM, mark + GOOD_ITEM.encode()), Item))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_only_utf8_is_read(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(InputError, match=r"line 1: (invalid UTF-8|broken JSON)"):
        list(read_records(write(tmp_path, GOOD_ITEM.encode(encoding)), Item))


def test_repeated_ids(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="item id 'a' appears twice"):
        read_items(write(tmp_path, GOOD_ITEM, GOOD_ITEM))
    with pytest.raises(InputError, match="query id 'q' appears twice"):
        read_queries(write(tmp_path, GOOD_QUERY, GOOD_QUERY))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_no_records(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"data.jsonl: holds no records"):
        list(read_records(write(tmp_path, content), Item))


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            list(read_records(path, Item))


def test_good_records_before_a_bad_one_are_given(tmp_path: Path) -> None:
    """Files are read as streams."""
    records = read_records(write(tmp_path, GOOD_ITEM, "broken"), Item)
    assert next(records).id == "a"
    with pytest.raises(InputError, match="line 2"):
        next(records)


def test_parquet_equals_json_lines(tmp_path: Path) -> None:
    rows = [{"id": "b", "title": "T", "text": "é", "city": "Köln"}, {"id": "a", "text": "x\ny"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    lines = write(tmp_path, *(json.dumps(row) for row in rows))
    assert read_items(tmp_path / "items.parquet") == read_items(lines)
    queries = [{"query_id": "q", "query": "job", "items": [{"id": "a", "label": 1.0}, {"id": "b", "label": 0.5}]}]
    pq.write_table(pa.Table.from_pylist(queries), tmp_path / "queries.parquet")
    assert read_queries(tmp_path / "queries.parquet") == read_queries(write(tmp_path, *map(json.dumps, queries)))
    requests = [{"query": "job", "items": [{"id": "a", "text": None}, {"id": None, "text": "x"}]}]
    pq.write_table(pa.Table.from_pylist(requests), tmp_path / "requests.parquet")
    found = list(read_records(tmp_path / "requests.parquet", Request))
    assert found == list(read_records(write(tmp_path, *map(json.dumps, requests)), Request))


def test_bad_parquet(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([{"id": "a", "text": "x"}, {"id": "b", "text": None}]), tmp_path / "bad.parquet"
    )
    with pytest.raises(InputError, match=r"bad.parquet: line 2: text: Field required"):
        read_items(tmp_path / "bad.parquet")
    whole = (tmp_path / "bad.parquet").read_bytes()
    for length in (0, 1, 8, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.parquet").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut.parquet: ") as caught:
            read_items(tmp_path / "cut.parquet")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_damaged_parquet(tmp_path: Path, compression: str) -> None:
    """Any flipped byte is read over or told in one line that names the file."""
    rows = [{"id": f"item-{number}", "text": f"Ä job with the number {number} " * 4} for number in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet", compression=compression)
    whole, told = (tmp_path / "items.parquet").read_bytes(), list[str]()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0x81
        (tmp_path / "items.parquet").write_bytes(damaged)
        try:
            read_items(tmp_path / "items.parquet")
        except InputError as error:
            told.append(str(error))
    assert len(told) > 50
    assert all(line.startswith(f"{tmp_path / 'items.parquet'}: ") and "\n" not in line for line in told)


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving does not install it."""
    pq.write_table(pa.Table.from_pylist([{"id": "a", "text": "x"}]), tmp_path / "items.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"items.parquet: reading Parquet needs pyarrow: pip install"):
        read_items(tmp_path / "items.parquet")
