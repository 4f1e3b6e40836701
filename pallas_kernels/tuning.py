"""The table of measurements: which implementation of an op was fastest on a device, and with which tiles.

One small JSON file, written by `scripts/tune_kernels.py` on the device itself. Without it, or without a row that is
near enough, XLA is the default and kernels use their own safe tiles.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

XLA = "xla"
MOSAIC_GPU = "mosaic_gpu"

TILES = {
    "gated_mlp": ("f", "d", "stages"),
    "prefix_item_attention": ("keys", "stages", "queries", "weights_in_registers"),
}
"""The names of each op's tile sizes: the fields of its `Tiles`, whose modules take over a second to import."""

PATH = Path(__file__).with_name("tuning.json")
MAX_ROWS = 50
"""A table that one can read: rows stand for the shapes around them, so few are needed."""

NEAR = 2.0
"""A row serves shapes whose sizes are each within this factor of its own, but for those in FAR."""

FAR = {"M": 16.0, "Q": 16.0, "Q/M": 4.0, "P": 4.0, "T": 4.0}
"""Rows, queries, lengths of prefixes and items: how much there is of a thing decides less than what it looks like. Few
tokens are queries in the last layer, which is another problem than the layers below."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        device: its name as JAX gives it. shape: sizes by axis letter. fastest: XLA or MOSAIC_GPU.
        tiles: the kernel's best tiles. seconds: best time by implementation.
    """

    op: str
    device: str
    dtype: str
    shape: Mapping[str, int]
    fastest: str
    tiles: Mapping[str, int]
    seconds: Mapping[str, float]


@cache
def table(path: Path = PATH) -> tuple[Row, ...]:
    """Returns the rows of the file, none if it is absent.

    Raises:
        ValueError: a file of another form, or a row with a name or number that means nothing here; names both.
    """
    if not path.is_file():
        return ()
    try:
        rows = tuple(Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: not a table of kernel measurements ({error}); scripts/tune_kernels.py writes one"
        ) from error
    for number, row in enumerate(rows, start=1):
        if (problem := _problem(row)) is not None:
            raise ValueError(f"{path}: row {number}: {problem}")
    return rows


def _problem(row: Row) -> str | None:
    """Says what is wrong with a row; None if nothing is."""
    for name, value, known in (("op", row.op, tuple(TILES)), ("fastest", row.fastest, (XLA, MOSAIC_GPU))):
        if value not in known:
            return f"{name} {value!r}: must be one of {', '.join(known)}"
    for name, sizes in (("shape", row.shape), ("tiles", row.tiles)):
        if not isinstance(sizes, dict):
            return f"{name} must be numbers by name"
        for key, size in sizes.items():
            if type(size) is not int:
                return f"{name}: {key}={size!r} must be a whole number"
    unknown = set(row.tiles) - set(TILES[row.op])
    return f"tiles: {min(unknown)!r} is none of {row.op}'s, which are {', '.join(TILES[row.op])}" if unknown else None


def nearest(
    op: str, device: str | None, dtype: str, shape: Mapping[str, int], rows: Sequence[Row] | None = None
) -> list[Row]:
    """Returns the rows of this op, device and dtype that serve the shape, those whose sizes are nearest in ratio first.

    Args:
        device: None for all.
        rows: the table of the file if None.
    """
    found = []
    for row in table() if rows is None else rows:
        same = (row.op, row.dtype, row.shape.keys()) == (op, dtype, shape.keys()) and device in (None, row.device)
        if same:
            ratios = _log_ratios(row.shape, shape)
            if all(ratio < math.log(FAR.get(axis, NEAR)) + 1e-9 for axis, ratio in ratios.items()):
                found.append((sum(ratios.values()), row))
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def _log_ratios(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, float]:
    """|log(a / b)| by axis, and of Q / M where there are queries; a size of 0 is as far as can be from any other."""
    logs = [{axis: math.log(max(size, 1e-9)) for axis, size in shape.items()} for shape in (a, b)]
    for each in logs:
        if "Q" in each:
            each["Q/M"] = each["Q"] - each["M"]
    return {axis: abs(logs[0][axis] - logs[1][axis]) for axis in logs[0]}


def write(rows: Sequence[Row], path: Path = PATH) -> None:
    """Writes the table; raises ValueError for more than MAX_ROWS rows."""
    check_size(len(rows))
    text = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"rows": [\n{text}\n]}}\n', encoding="utf-8")
    table.cache_clear()


def check_size(rows: int) -> None:
    """Raises ValueError for more than MAX_ROWS rows: to be called before they are measured."""
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows of measurements: at most {MAX_ROWS}, each stands for the shapes around it")
