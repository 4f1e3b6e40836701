"""`jaxslm report`: result files as Markdown, as plots, and as one static HTML page that needs no other file."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxslm.atomic import new_folder, refuse_existing
from jaxslm.evaluate.figures import DARK, LIGHT, SERIES, Drawing, css_variables
from jaxslm.evaluate.plots import bars, differences, frontier, load_curve
from jaxslm.evaluate.reliability import reliability
from jaxslm.evaluate.results import Row, Section, read_results

TITLE = "jaxslm report"


@dataclass(frozen=True)
class Column:
    """A column of the table: the row's field and how it is written; `interval` is the field of its 95 % interval."""

    heading: str
    field: str
    write: Callable[[float], str]
    interval: str | None = None


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.3g}"


def _millions(value: float) -> str:
    return f"{value / 1e6:,.1f} M" if value >= 1e5 else f"{value:,.0f}"


COLUMNS = (
    Column("nDCG@10", "ndcg_at_10", "{:.3f}".format, "ndcg_ci95"),
    Column("minus BM25", "ndcg_minus_bm25", "{:+.3f}".format, "ndcg_minus_bm25_ci95"),
    Column("minus dense", "ndcg_minus_dense", "{:+.3f}".format, "ndcg_minus_dense_ci95"),
    Column("minus full text", "ndcg_minus_text", "{:+.3f}".format, "ndcg_minus_text_ci95"),
    Column("RR@10", "rr_at_10", "{:.3f}".format, "rr_ci95"),
    Column("R@10", "recall_at_10", "{:.3f}".format, "recall_ci95"),
    Column("items/s", "items_per_s", _plain),
    Column("p99, ms", "p99_ms", _plain),
    Column("tokens/item", "tokens_per_item", _plain),
    Column("GFLOP/item", "gflop_per_item", "{:,.3g}".format),
    Column("MFLOP/token", "linear_flops_per_token", lambda value: _plain(value / 1e6)),
    Column("parameters", "parameters", _millions),
)
COSTS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "tokens": ("Tokens per item", "tokens_per_item", _plain),
    "flops": ("GFLOP per item", "gflop_per_item", "{:,.3g}".format),
    "flops-per-token": ("MFLOP per token, without attention", "linear_flops_per_token", lambda x: _plain(x / 1e6)),
    "parameters": ("Parameters", "parameters", _millions),
}


def write_report(results: Sequence[Path], out: Path) -> Path:
    """Writes `index.html`, `report.md` and the plots as SVG and PNG into a new folder; returns the page's path.

    The SVGs follow the reader's light or dark theme, on the page and on their own. Same results, same files.

    Args:
        results: JSON files as `jaxslm.evaluate.results` describes them. out: must not exist.

    Raises:
        InputError: a result file breaks a rule, `out` exists, or matplotlib is not installed.
    """
    refuse_existing(out)
    sections = read_results(results)
    drawings = [_drawings(section) for section in sections]
    with new_folder(out) as folder:
        names = _write_drawings(folder, sections, drawings)
        (folder / "report.md").write_text(_markdown(sections, drawings, names), encoding="utf-8")
        (folder / "index.html").write_text(_html(sections, drawings), encoding="utf-8")
    return out / "index.html"


def _drawings(section: Section) -> dict[str, Drawing]:
    """Returns the plots for which a section has numbers, by short name, in reading order."""
    drawings: dict[str, Drawing] = {}
    if (drawing := frontier(section.rows)) is not None:
        drawings["frontier"] = drawing
    if (drawing := differences(section.rows)) is not None:
        drawings["differences"] = drawing
    for workload in dict.fromkeys(step.workload for step in section.load):
        steps = [step for step in section.load if step.workload == workload]
        if (drawing := load_curve(workload, steps)) is not None:
            drawings[f"load-{_slug(workload)}"] = drawing
    for kind, (title, field, write) in COSTS.items():
        known = [(row.name, float(value)) for row in section.rows if (value := getattr(row, field)) is not None]
        if known:
            names, values = zip(*known, strict=True)
            drawings[kind] = bars(names, values, title=title, write=write)
    curves = [(row.name, row.calibration) for row in section.rows if row.calibration is not None]
    for start in range(0, len(curves), len(SERIES)):  # a plot tells so many lines apart
        drawings[f"calibration-{1 + start // len(SERIES)}"] = reliability(dict(curves[start : start + len(SERIES)]))
    return drawings


def _write_drawings(
    folder: Path, sections: Sequence[Section], drawings: Sequence[dict[str, Drawing]]
) -> list[dict[str, str]]:
    """Writes every plot as SVG and PNG; returns their file names without suffix."""
    names: list[dict[str, str]] = []
    for number, (section, plots) in enumerate(zip(sections, drawings, strict=True), start=1):
        prefix = f"{_slug(section.title)}-" if len(sections) == 1 else f"{number}-{_slug(section.title)}-"
        names.append({kind: prefix + kind for kind in plots})
        for kind, drawing in plots.items():
            (folder / f"{prefix}{kind}.svg").write_text(drawing.svg + "\n", encoding="utf-8")
            (folder / f"{prefix}{kind}.png").write_bytes(drawing.png)
    return names


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Returns headings, and per row its cells as (value, interval); columns that no row has are left out."""
    columns = [column for column in COLUMNS if any(getattr(row, column.field) is not None for row in rows)]
    cells = [[(row.name, ""), *(_cell(row, column) for column in columns)] for row in rows]
    return ["ranker", *(column.heading for column in columns)], cells


def _cell(row: Row, column: Column) -> tuple[str, str]:
    value, interval = getattr(row, column.field), column.interval and getattr(row, column.interval)
    if value is None:
        return "", ""
    ends = f"{column.write(interval[0])} to {column.write(interval[1])}" if interval else ""
    return column.write(value), ends


def _markdown(sections: Sequence[Section], drawings: Sequence[dict[str, Drawing]], names: list[dict[str, str]]) -> str:
    parts = [f"# {TITLE}"]
    for section, plots, files_of in zip(sections, drawings, names, strict=True):
        parts.append(f"## {_markdown_text(section.title)}")
        if section.rows:
            headings, cells = _table(section.rows)
            lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
            for row in cells:
                written = (f"{value} ({ends})" if ends else value for value, ends in row)
                lines.append("| " + " | ".join(map(_markdown_text, written)) + " |")
            parts.append("\n".join(lines))
        for kind, drawing in plots.items():
            parts.append(f"![{_markdown_text(drawing.title)}]({files_of[kind]}.svg)")
            if drawing.caption:
                parts.append(_markdown_text(drawing.caption))
        if section.conditions:
            parts.append("\n".join(f"- {_markdown_text(f'{name}: {said}')}" for name, said in _conditions(section)))
    return "\n\n".join(parts) + "\n"


def _html(sections: Sequence[Section], drawings: Sequence[dict[str, Drawing]]) -> str:
    style = (files("jaxslm.evaluate") / "report.css").read_text(encoding="utf-8")
    body = "\n".join(_html_section(section, plots) for section, plots in zip(sections, drawings, strict=True))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{TITLE}</title>
<style>
:root {{ {css_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(DARK)} }} }}
{style}</style>
</head>
<body>
<header><h1>{TITLE}</h1></header>
<main>
{body}
</main>
</body>
</html>
"""


def _html_section(section: Section, plots: dict[str, Drawing]) -> str:
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>"]
    kinds: dict[str, list[str]] = {"wide": [], "bars": [], "calibration": []}
    for kind in plots:
        group = "calibration" if kind.startswith("calibration-") else "bars" if kind in COSTS else "wide"
        kinds[group].append(kind)
    parts += [_figure(plots[kind], "wide") for kind in kinds["wide"]]
    if section.rows:
        parts.append(_html_table(section.rows))
    for group in ("bars", "calibration"):
        if kinds[group]:
            figures = "\n".join(_figure(plots[kind], group) for kind in kinds[group])
            parts.append(f'<div class="plots {group}">{figures}</div>')
    if section.conditions:
        said = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _conditions(section))
        parts.append(f"<h3>Conditions</h3>\n<dl>{said}</dl>")
    return "\n".join([*parts, "</section>"])


def _figure(drawing: Drawing, kind: str) -> str:
    caption = f"<figcaption>{escape(drawing.caption)}</figcaption>" if drawing.caption else ""
    return f'<figure class="{kind}"><div class="drawing" tabindex="0">{drawing.inline}</div>{caption}</figure>'


def _html_table(rows: Sequence[Row]) -> str:
    headings, cells = _table(rows)
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    lines = []
    for (name, _), *numbers in cells:
        written = "".join(
            f"<td>{escape(value)}" + (f"<small>{escape(ends)}</small>" if ends else "") + "</td>"
            for value, ends in numbers
        )
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{written}</tr>')
    body = "\n".join(lines)
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return f'<div class="table" tabindex="0">{table}</div>'


def _conditions(section: Section) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _said(value)) for name, value in section.conditions.items()]


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _markdown_text(text: str) -> str:
    """Returns text of which nothing is Markdown or HTML, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+|!~$&])", r"\\\1", " ".join(text.split()))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "results"
