"""The plots of a report beside `reliability`'s: every point and line has its name beside it and a shape of its own."""

from collections.abc import Callable, Sequence
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxslm.evaluate.figures import LIGHT, MARKERS, SERIES, Drawing, draw
from jaxslm.evaluate.results import LoadStep, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

LATENCY_TARGET_MS = 500.0
WIDE_RANGE = 4.0  # largest over smallest value from which on an axis is logarithmic
Bar = tuple[tuple[float, float], tuple[float, float]]
"""The ends (x, y) of an error bar, the lower or left one first."""
DASHES = ((5, 3), (1.5, 2), (7, 2, 1.5, 2))
_LABEL_PLACES = tuple((9.0 * x, 9.0 * y) for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1.6, 0), (-1.6, 0)))
"""Of a name beside a point, in typographic points from it: over and under it is its interval."""
_END_PLACES = ((1, (3.0, 3.0)), (1, (-3.0, 3.0)), (0, (3.0, -3.0)), (0, (-3.0, -3.0)))
"""Of a name at an end of the interval, the upper one first, where the way beside the point is crossed."""
_CROWDED = 40.0  # covered square pixels that weigh as much as being as near to another point as to one's own


def frontier(rows: Sequence[Row]) -> Drawing | None:
    """Returns nDCG@10 against items/s, or None if no row has both. Rows without a speed are horizontal lines."""
    points = [(row, row.items_per_s, row.ndcg_at_10) for row in rows if row.ndcg_at_10 is not None and row.items_per_s]
    lines = [(row, row.ndcg_at_10) for row in rows if row.ndcg_at_10 is not None and not row.items_per_s]
    if not points:
        return None

    def plot(axes: "Axes") -> None:
        speeds = [x for _, x, _ in points]
        _scale(axes, "x", speeds)
        span = max(speeds) / min(speeds)
        left, right = max(1.25, span**0.18), max(1.4, span**0.3)  # a name fits to the right of the fastest
        axes.set(xlim=(min(speeds) / left, max(speeds) * right), xlabel="items/s", ylabel="nDCG@10")
        best = _undominated([(x, y) for _, x, y in points])
        axes.plot(*zip(*best, strict=True), color=LIGHT["muted"], linewidth=1, zorder=1)
        for (row, x, y), marker, role in zip(points, cycle(MARKERS), cycle(SERIES), strict=False):
            _point(axes, row, (x, y), marker, LIGHT[role])
        for (_, y), dashes in zip(lines, cycle(DASHES), strict=False):
            axes.axhline(y, color=LIGHT["muted"], linewidth=1.2, dashes=dashes, zorder=1)
        axes.margins(y=0.1)
        edge = axes.get_xlim()[1]  # outside, where nothing is crossed
        _label_ends(axes, [(f"{_shortened(row.name, 20)}, {y:.3f}", edge, y) for row, y in lines])
        _label_points(axes, points, best, [y for _, y in lines])

    said = [f"{row.name} {y:.3f} at {x:,.3g} items/s" for row, x, y in points]
    said += [f"{row.name} {y:.3f}" for row, y in lines]
    return draw(
        plot,
        760,
        440,
        title="nDCG@10 against items/s: " + "; ".join(said),
        caption="Up and to the right is better; the line joins what nothing else beats in both. Vertical bars: 95 %"
        " interval of the mean over queries; horizontal ones: repeats."
        + (" Dashed: references whose speed was not measured." if lines else ""),
    )


def bars(names: Sequence[str], values: Sequence[float], *, title: str, write: Callable[[float], str]) -> Drawing:
    """Returns one horizontal bar per name, the first on top, each with its value written behind it."""

    def plot(axes: "Axes") -> None:
        places = range(len(names))
        axes.barh(places, values, height=0.62, color=LIGHT["series-1"])
        axes.set_yticks(places, [_shortened(name, 24) for name in names])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.xaxis.set_visible(False)
        axes.grid(visible=False)
        for side in ("bottom", "left"):
            axes.spines[side].set_visible(False)
        axes.set_xlim(0, 1.35 * max(values) or 1.0)
        for place, value in zip(places, values, strict=True):
            axes.annotate(write(value), (value, place), (4, 0), textcoords="offset points", va="center")

    said = ", ".join(f"{name} {write(value)}" for name, value in zip(names, values, strict=True))
    return draw(plot, 350, 20 + 26 * len(names), title=f"{title}: {said}", caption=title)


def differences(rows: Sequence[Row]) -> Drawing | None:
    """Returns each ranker's nDCG@10 minus the dense one's with its interval, or None if no row has both."""
    known = [
        (row.name, row.ndcg_minus_dense, row.ndcg_minus_dense_ci95)
        for row in rows
        if row.ndcg_minus_dense is not None and row.ndcg_minus_dense_ci95 not in (None, (0.0, 0.0))  # the dense one
    ]
    if not known:
        return None
    names, means, intervals = zip(*known, strict=True)

    def plot(axes: "Axes") -> None:
        places = range(len(names))
        errors = [[mean - low, high - mean] for mean, (low, high) in zip(means, intervals, strict=True)]
        axes.errorbar(
            means,
            places,
            xerr=np.transpose(errors),
            fmt=MARKERS[0],
            color=LIGHT["series-1"],
            elinewidth=1.2,
            capsize=2.5,
        )
        axes.axvline(0, color=LIGHT["ink"], linewidth=1.2, zorder=1)
        axes.set_yticks(places, [_shortened(name, 24) for name in names])
        axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="nDCG@10 minus the dense ranker's")
        axes.grid(visible=False, axis="y")

    said = ", ".join(f"{name} {mean:+.3f}" for name, mean in zip(names, means, strict=True))
    return draw(
        plot,
        760,
        60 + 26 * len(names),
        title=f"nDCG@10 minus the dense ranker's: {said}",
        caption="Paired by query, with 95 % intervals. Left of the line at 0 something is lost; an interval across it"
        " shows neither loss nor gain.",
    )


def load_curve(workload: str, steps: Sequence[LoadStep]) -> Drawing | None:
    """Returns latency percentiles against the offered load with the target of 500 ms, or None if nothing was scored."""
    known = [
        (step.offered_items_per_s, (step.p50_ms, step.p95_ms, step.p99_ms))
        for step in steps
        if step.p50_ms is not None and step.p95_ms is not None and step.p99_ms is not None
    ]
    if not known:
        return None
    loads, percentiles = zip(*sorted(known), strict=True)
    lines = dict(zip(("p50", "p95", "p99"), zip(*percentiles, strict=True), strict=True))

    def plot(axes: "Axes") -> None:
        _scale(axes, "x", loads)
        _scale(axes, "y", [LATENCY_TARGET_MS, *(value for values in lines.values() for value in values)])
        axes.set(xlabel="offered load, items/s", ylabel="latency, ms")
        for values, marker, role in zip(lines.values(), MARKERS, SERIES, strict=False):
            axes.plot(loads, values, color=LIGHT[role], marker=marker, markersize=4.5, linewidth=1.4)
        axes.axhline(LATENCY_TARGET_MS, color=LIGHT["muted"], dashes=DASHES[0], linewidth=1.2, zorder=1)
        axes.margins(x=0.12)
        _label_line(axes, f"{LATENCY_TARGET_MS:g} ms", LATENCY_TARGET_MS)
        _label_ends(axes, [(name, loads[-1], values[-1]) for name, values in lines.items()])

    said = "; ".join(f"{x:,.3g} items/s: p99 {p99:.3g} ms" for x, p99 in zip(loads, lines["p99"], strict=True))
    return draw(
        plot,
        760,
        400,
        title=f"Latency against load, {workload}: {said}",
        caption=f"{workload}: latency from when a request was due, not from when it was sent, so that waiting counts.",
    )


def _point(axes: "Axes", row: Row, place: tuple[float, float], marker: str, colour: str) -> None:
    x, y = place
    (_, low), (_, high), (slow, _), (fast, _) = [end for bar in _intervals(row, x, y) for end in bar]
    errors = [[max(0.0, y - low)], [max(0.0, high - y)]], [[max(0.0, x - slow)], [max(0.0, fast - x)]]
    axes.errorbar(x, y, *errors, marker=marker, markersize=7, color=colour, elinewidth=1.2, capsize=2.5, zorder=3)


def _intervals(row: Row, x: float, y: float) -> list[Bar]:
    """Returns a row's error bars, the vertical one first; one that was not measured has no length."""
    low, high = row.ndcg_ci95 or (y, y)
    return [((x, low), (x, high)), ((row.items_per_s_p5 or x, y), (row.items_per_s_p95 or x, y))]


def _undominated(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that no other one beats in both coordinates, by rising x."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(places, reverse=True):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]


def _scale(axes: "Axes", which: str, values: Sequence[float]) -> None:
    """Makes an axis logarithmic if its values, all positive, span much; writes its ticks as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis: Any = axes.xaxis if which == "x" else axes.yaxis
    span = max(values) / min(values)
    if span > WIDE_RANGE:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 1000 else (1.0,)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _label_line(axes: "Axes", name: str, height: float) -> None:
    """Writes a name over a horizontal line, at the left."""
    place, axis = (0.006, height), axes.get_yaxis_transform()
    axes.annotate(name, place, (0, 2.5), xycoords=axis, textcoords="offset points", va="bottom", color=LIGHT["muted"])


def _label_points(
    axes: "Axes",
    points: Sequence[tuple[Row, float, float]],
    line: Sequence[tuple[float, float]],
    levels: Sequence[float],
) -> None:
    """Writes each point's name beside it, where it covers least of what is there already and no other point is as near.

    Args:
        points: (row, x, y) of each. line: corners of a line. levels: heights of horizontal lines.
    """
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    pixels = axes.transData.transform
    intervals = [_intervals(row, x, y) for row, x, y in points]
    heads = [_box(*pixels((x, y)) - 6, *pixels((x, y)) + 6) for _, x, y in points]
    bars, across = ([_box(*pixels(a) - 1, *pixels(b) + 1) for a, b in each] for each in zip(*intervals, strict=True))
    taken = [*heads, *bars, *across]
    for start, end in pairwise(pixels(line)):
        taken += [_box(*place - 3, *place + 3) for place in np.linspace(start, end, 40)]
    taken += [text.get_window_extent() for text in axes.texts]
    inside = axes.get_window_extent()
    heights = [pixels((points[0][1], level))[1] for level in levels]
    taken += [_box(inside.x0, height - 2, inside.x1, height + 2) for height in heights]
    for index, (row, x, y) in enumerate(points):
        tried = [((x, y), offset) for offset in _LABEL_PLACES]
        tried += [(intervals[index][0][end], offset) for end, offset in _END_PLACES]
        costs = []
        for place, offset in tried:
            text = _annotate(axes, row.name, place, offset)
            box = text.get_window_extent()
            text.remove()
            outside = box.width * box.height - _overlap(box, inside)
            covered = sum(_overlap(box, other) for other in taken) + 3 * outside
            crowding = _crowding(box, heads, index) + _crowding(box, bars, index)
            costs.append(round(covered + _CROWDED * crowding))
        text = _annotate(axes, row.name, *tried[costs.index(min(costs))])
        taken.append(text.get_window_extent())


def _crowding(label: "Bbox", marks: Sequence["Bbox"], own: int) -> float:
    """Returns how far a label's middle line is from its own mark, as a share of the way to the nearest other one."""
    middle = (label.y0 + label.y1) / 2
    away = [
        np.hypot(max(label.x0 - mark.x1, 0.0, mark.x0 - label.x1), max(middle - mark.y1, 0.0, mark.y0 - middle))
        for mark in marks
    ]
    others = away[:own] + away[own + 1 :]
    return float(away[own] / max(1.0, min(others))) if others else 0.0


def _annotate(axes: "Axes", name: str, place: tuple[float, float], offset: tuple[float, float]) -> "Annotation":
    right, up = offset
    return axes.annotate(
        _shortened(name, 40),
        place,
        offset,
        textcoords="offset points",
        ha="left" if right > 0 else "right",
        va="center" if up == 0 else "bottom" if up > 0 else "top",
    )


def _label_ends(axes: "Axes", ends: Sequence[tuple[str, float, float]]) -> None:
    """Writes names behind the right ends of lines, moved apart where they would touch."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    pixels_per_point = axes.figure.dpi / 72
    lowest = float("-inf")
    for name, x, y in sorted(ends, key=lambda end: end[2]):
        at = float(axes.transData.transform((x, y))[1])
        place = max(at, lowest)
        lowest = place + 11 * pixels_per_point
        offset = (8, (place - at) / pixels_per_point)
        axes.annotate(name, (x, y), offset, textcoords="offset points", va="center")


def _box(x0: float, y0: float, x1: float, y1: float) -> "Bbox":
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x0, y0, x1, y1)


def _overlap(a: "Bbox", b: "Bbox") -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(0.0, width) * max(0.0, height))


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
