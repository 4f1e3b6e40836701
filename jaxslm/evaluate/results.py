"""Result files as `jaxslm report` reads them: what `jaxslm eval`, `jaxslm bench` and recipes of `scripts/` measured."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from jaxslm.data_files import NonEmpty
from jaxslm.errors import InputError
from jaxslm.evaluate.calibration import CalibrationReport

Interval = tuple[float, float]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[float, Field(ge=0)]


class _Measured(BaseModel):
    """Fields that are not known here are left alone; NaN and Infinity are no measurements."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class Difference(_Measured):
    """A mean over queries of paired differences, with its 95 % interval."""

    mean: float
    ci95: Interval


class Row(_Measured):
    """One measured ranker. Everything but the name may be missing, and is then left out.

    Attributes:
        ndcg_ci95 and the like: 95 % intervals of the means over queries.
        minus_text: nDCG@10 minus that of the same ranker on full text.
        items_per_s_p5, items_per_s_p95: quantiles over repeats. tokens_per_item: that the ranker reads.
        gflop_per_item: arithmetic of one item, its share of the shared prefix included.
        calibration: `dataclasses.asdict` of it.
    """

    name: NonEmpty
    ndcg_at_10: Share | None = None
    ndcg_ci95: Interval | None = None
    rr_at_10: Share | None = None
    rr_ci95: Interval | None = None
    recall_at_10: Share | None = None
    recall_ci95: Interval | None = None
    ndcg_minus_bm25: float | None = None
    ndcg_minus_bm25_ci95: Interval | None = None
    ndcg_minus_dense: float | None = None
    ndcg_minus_dense_ci95: Interval | None = None
    minus_text: Difference | None = None
    items_per_s: Count | None = None
    items_per_s_p5: Count | None = None
    items_per_s_p95: Count | None = None
    tokens_per_item: Count | None = None
    parameters: Count | None = None
    gflop_per_item: Count | None = None
    linear_flops_per_token: Count | None = None
    p99_ms: Count | None = None
    calibration: CalibrationReport | None = None

    @property
    def ndcg_minus_text(self) -> float | None:
        """The mean of `minus_text`."""
        return None if self.minus_text is None else self.minus_text.mean

    @property
    def ndcg_minus_text_ci95(self) -> Interval | None:
        """The interval of `minus_text`."""
        return None if self.minus_text is None else self.minus_text.ci95

    @field_validator("ndcg_ci95", "rr_ci95", "recall_ci95", "ndcg_minus_bm25_ci95", "ndcg_minus_dense_ci95")
    @classmethod
    def _low_before_high(cls, value: Interval | None) -> Interval | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"{list(value)}: an interval's low end comes first")
        return value


class LoadStep(_Measured):
    """A server under one load: latencies of requests from when they were due; None if none was answered."""

    workload: NonEmpty
    offered_items_per_s: Annotated[float, Field(gt=0)]
    p50_ms: Annotated[float, Field(gt=0)] | None
    p95_ms: Annotated[float, Field(gt=0)] | None
    p99_ms: Annotated[float, Field(gt=0)] | None


class _ResultFile(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)
    rows: tuple[Row, ...] = ()
    load: tuple[LoadStep, ...] = ()
    conditions: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """Rows that were measured under the same conditions, and so may stand in one table and one plot."""

    title: str
    rows: Sequence[Row]
    load: Sequence[LoadStep] = ()
    conditions: dict[str, Any] = field(default_factory=dict)


def read_results(paths: Sequence[Path]) -> list[Section]:
    """Returns a section per file of rows; files of one measurement each (`jaxslm bench score`) share a section.

    Raises:
        InputError: no file, or one that cannot be read, is no JSON, holds nothing measured or a field that is not what
            its name says.
    """
    if not paths:
        raise InputError("a report needs one or more result files")
    sections: list[Section] = []
    single: list[tuple[Row, dict[str, Any]]] = []
    for path in paths:
        content = _read(path)
        others = {name: value for name, value in (content.model_extra or {}).items() if name not in Row.model_fields}
        if content.rows or content.load:
            scalars = {name: value for name, value in others.items() if isinstance(value, str | int | float)}
            sections.append(Section(path.stem, content.rows, content.load, scalars | content.conditions))
        else:
            single.append((_single_row(path, content), others))
    if single:
        shared = {
            name: value
            for name, value in single[0][1].items()
            if all(name in others and others[name] == value for _, others in single)
        }
        sections.append(Section("Speed", [row for row, _ in single], conditions=shared))
    return sections


def _read(path: Path) -> _ResultFile:
    try:
        return _ResultFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error)}") from None


def _single_row(path: Path, content: _ResultFile) -> Row:
    """Returns the one measurement of a file without rows; its name is made of what was measured."""
    measured = content.model_extra or {}
    named = [str(measured[part]) for part in ("workload", "model", "dtype") if part in measured]
    if "items_per_s" not in measured and "ndcg_at_10" not in measured:
        raise InputError(f"{path}: holds neither rows nor load nor a measurement (items_per_s, ndcg_at_10)")
    try:
        return Row.model_validate({"name": ", ".join(named) or path.stem} | measured)
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if problem["type"] == "json_invalid":
        return f"broken JSON ({re.sub('^Invalid JSON: ', '', problem['msg'])})"
    where = ".".join(str(part) for part in problem["loc"]) or "the file"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}"
