"""The data files of the project: JSON Lines or Parquet, one schema per kind, every error with its line number.

items    `{"id": str, "title"?: str, "text": str, ...other string fields}`
queries  `{"query_id": str, "query": str, "items": [{"id": str, "label": float in [0, 1]}]}` (also `train`, `dev`)
requests `{"query": str, "items": [{"id"?: str, "text"?: str}]}`: the input of `jaxslm score`
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from jaxslm.errors import InputError

NonEmpty = Annotated[str, StringConstraints(strip_whitespace=False, pattern=r"\S")]


class Item(BaseModel):
    """A document to rank. Fields beyond these are kept; they must be strings."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    __pydantic_extra__: dict[str, str]
    id: NonEmpty
    title: str | None = None
    text: str


class Judged(BaseModel):
    """An item of a query with its relevance: a grade scaled to [0, 1] or a probability."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    id: NonEmpty
    label: Annotated[float, Field(ge=0, le=1)]


class Query(BaseModel):
    """A query with its judged items. Items that are not listed count as irrelevant."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    query_id: NonEmpty
    query: NonEmpty
    items: Annotated[tuple[Judged, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _ids_are_unique(self) -> "Query":
        ids = [item.id for item in self.items]
        if len(set(ids)) != len(ids):
            raise ValueError("item ids must be unique within a query")
        return self


class RequestItem(BaseModel):
    """An item of a score request: its text, or the id under which the item store knows it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    id: NonEmpty | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _id_or_text(self) -> "RequestItem":
        if self.id is None and self.text is None:
            raise ValueError("an item needs a text or an id")
        return self


class Request(BaseModel):
    """One line of the input of `jaxslm score`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    query: NonEmpty
    items: Annotated[tuple[RequestItem, ...], Field(min_length=1, strict=False)]


Record = TypeVar("Record", bound=BaseModel)


def read_records(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Yields the records of a `.jsonl` or `.parquet` file in order, each checked against `kind`.

    Raises:
        InputError: no such file, no records, invalid UTF-8, broken JSON or a record that breaks the schema;
            the message holds the path, the line (counted from 1), the field and the rule.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    number = 0
    for number, row in rows:
        try:
            record = kind.model_validate(row)
        except ValidationError as error:
            raise InputError(f"{path}: line {number}: {_first_problem(error)}") from None
        yield record
    if number == 0:
        raise InputError(f"{path}: holds no records")


def read_items(path: Path) -> dict[str, Item]:
    """Returns the items of a file by id, in file order. Raises InputError as `read_records`, and on a repeated id."""
    return items_by_id(str(path), read_records(path, Item))


def read_queries(path: Path) -> list[Query]:
    """Returns the queries of a file in order. Raises InputError as `read_records`, and on a repeated query id."""
    return distinct_queries(str(path), read_records(path, Query))


def items_by_id(where: str, records: Iterable[Item]) -> dict[str, Item]:
    """Returns the items of a source by id, in order. Raises InputError on a repeated id, and if there are none."""
    items: dict[str, Item] = {}
    for item in records:
        if item.id in items:
            raise InputError(f"{where}: item id {item.id!r} appears twice")
        items[item.id] = item
    if not items:
        raise InputError(f"{where}: holds no records")
    return items


def distinct_queries(where: str, records: Iterable[Query]) -> list[Query]:
    """Returns the queries of a source in order. Raises InputError on a repeated query id, and if there are none."""
    queries: dict[str, Query] = {}
    for query in records:
        if query.query_id in queries:
            raise InputError(f"{where}: query id {query.query_id!r} appears twice")
        queries[query.query_id] = query
    if not queries:
        raise InputError(f"{where}: holds no records")
    return list(queries.values())


def with_item_id(error: InputError, items: Sequence[str | Item]) -> str:
    """Returns the words of an error that may begin with "item N: ", as a prompt's do: the item's id stands for N."""
    found = re.match(r"item (\d+): ", str(error))
    if found and isinstance(item := items[int(found[1])], Item):
        return f"item {item.id!r}: {str(error)[found.end() :]}"
    return str(error)


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                # The encoding is not left to `json`: it would guess UTF-16 and let broken surrogates pass.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text, parse_constant=_no_constant)
                if "\\ud" in text.lower():
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: line {number}: invalid UTF-8 at byte {error.start}") from None
            except UnicodeEncodeError:
                raise InputError(f"{path}: line {number}: half of a surrogate pair, which is not text") from None
            except RecursionError:
                raise InputError(f"{path}: line {number}: broken JSON (nested too deeply)") from None
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: line {number}: broken JSON ({error.msg}, column {error.colno})") from None
            except ValueError as error:  # NaN, or a number of thousands of digits
                raise InputError(f"{path}: line {number}: broken JSON ({str(error).partition(';')[0]})") from None
            yield number, row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise InputError(f"{path}: reading Parquet needs pyarrow: pip install 'jaxslm[train]'") from None

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, {key: value for key, value in row.items() if value is not None}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # a damaged page may give any of these
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a Parquet file, or a damaged one ({reason})") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "record"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_pattern_mismatch":
        message = "must not be empty"
    return f"{where}: {message}"
