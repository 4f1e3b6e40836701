"""`jaxslm bench growth`: how speed changes with items per request, prefix length and item length, and how it should."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxslm.atomic import new_folder
from jaxslm.bench.score import timed
from jaxslm.bench.workloads import Workload, model_named, random_requests
from jaxslm.evaluate.figures import LIGHT, MARKERS, SERIES, Drawing, draw
from jaxslm.evaluate.reliability import check_plot, write_plot
from jaxslm.model.cost import scoring_flops
from jaxslm.model.depth import first_layers
from jaxslm.progress import console
from jaxslm.score.buckets import default_buckets
from jaxslm.score.compiled import CompiledScorer
from jaxslm.score.forward import Forward, PackRequest
from jaxslm.score.parallel import device_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENOUGH_S = 3.0
"""A point is not timed again once its timings add up to this."""


@dataclass(frozen=True)
class Curve:
    """One plot. `axis`: the field of `Workload` that takes the values; each shape is a line of its own."""

    axis: str
    label: str
    values: Sequence[int]
    shapes: Sequence[Workload]


# Both sides of edges of the default buckets (prefixes of 64, 256 and 1024 tokens, items of 16, 64, 256), so that a step
# shows if there is one.
CURVES = (
    Curve(
        "items",
        "items per request",
        (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
        (Workload("items of 9 tokens", 60, 9, 0), Workload("items of 150 tokens", 50, 150, 0)),
    ),
    Curve(
        "prefix_tokens",
        "prefix tokens",
        (8, 16, 32, 64, 65, 128, 256, 257, 512, 1024, 1100),
        (Workload("50 items of 9 tokens", 0, 9, 50), Workload("10 items of 150 tokens", 0, 150, 10)),
    ),
    Curve(
        "item_tokens",
        "tokens per item",
        (2, 4, 9, 16, 17, 32, 64, 65, 128, 256, 257, 512, 1024),
        (Workload("20 items, prefix of 60", 60, 0, 20),),
    ),
)


def bench_growth(
    model: str,
    out: Path,
    *,
    layers: int | None = None,
    dtype: str | None = None,
    repeats: int = 5,
    curves: Sequence[Curve] = CURVES,
) -> dict[str, Any]:
    """Measures the curves with the platform's default buckets; writes `growth.json` and a plot of each (SVG, PNG).

    A row of the file has `items_per_s` (median; `_p5`, `_p95`), `gflop_per_item` (arithmetic of a request over its
    items), `forwards`, `padding_fraction`, and `of_fastest`: FLOP/s as a share of the fastest point of its line. Where
    that share stays the same, cost grows as arithmetic does.

    Args:
        model: as `bench_score`. out: a folder that must not exist. layers: only the model's first so many.
        repeats: timings of a point, fewer if it takes seconds.

    Raises:
        InputError: an unknown model, or one of fewer layers, `out` exists, or matplotlib is missing.
    """
    check_plot(out / "items.svg")
    with new_folder(out) as folder:
        used = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
        config, params = model_named(model, used)
        if layers is not None:
            shape, params = first_layers(config.model, params, layers)
            config = config.model_copy(update={"model": shape})
        buckets = default_buckets(jax.default_backend())
        scorer = CompiledScorer(config, params, dtype=used, devices=jax.local_devices()[:1], buckets=buckets)
        rows = [row for curve in curves for row in _measured(scorer, curve, repeats)]
        conditions = {"model": model, "layers": config.model.num_layers, "dtype": used.name, "device": device_name()}
        conditions |= {"jax": jax.__version__, "repeats": repeats, "buckets": "default"}
        (folder / "growth.json").write_text(json.dumps({"rows": rows, "conditions": conditions}, indent=1) + "\n")
        for curve in curves:
            drawing = growth_plot(curve, [row for row in rows if row["axis"] == curve.axis])
            for suffix in ("svg", "png"):
                write_plot(folder / f"{curve.axis}.{suffix}", drawing)
    return {
        "out": str(out),
        "points": len(rows),
        "least_of_fastest": min(row["of_fastest"] for row in rows),
    } | conditions


def _measured(scorer: CompiledScorer, curve: Curve, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for shape in curve.shapes:
        changes: list[dict[str, Any]] = [{curve.axis: value} for value in curve.values]
        points = [_point(scorer, replace(shape, **change), repeats) for change in changes]
        fastest = max(point["gflop_per_s"] for point in points)
        for value, point in zip(curve.values, points, strict=True):
            row = {"name": f"{shape.name}, {value} {curve.label}", "line": shape.name, "axis": curve.axis, "at": value}
            rows.append(row | point | {"of_fastest": point["gflop_per_s"] / fastest})
            console().print(
                f"{row['name']}: {point['items_per_s']:.1f} items/s, {point['forwards']} passes,"
                f" {point['padding_fraction']:.0%} padding, {rows[-1]['of_fastest']:.0%} of the line's best FLOP/s",
                soft_wrap=True,
            )
    return rows


def _point(scorer: CompiledScorer, shape: Workload, repeats: int) -> dict[str, Any]:
    requests = random_requests(shape, scorer.config.model, 1)
    forwards = _warm(scorer, requests)
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < ENOUGH_S:
        seconds.append(timed(lambda: scorer.logits(requests)))
    rates = shape.items / np.array(seconds)
    flops = scoring_flops(scorer.config.model, shape.prefix_tokens, shape.item_tokens, shape.items, shared=True)
    places = sum(forward.bucket.tokens for forward in forwards)
    return {
        "items_per_s": float(np.median(rates)),
        "items_per_s_p5": float(np.quantile(rates, 0.05)),
        "items_per_s_p95": float(np.quantile(rates, 0.95)),
        "gflop_per_item": flops / shape.items / 1e9,
        "gflop_per_s": float(np.median(rates)) * flops / shape.items / 1e9,
        "forwards": len(forwards),
        "padding_fraction": 1 - sum(forward.real_tokens for forward in forwards) / places,
        "timings": len(seconds),
    }


def _warm(scorer: CompiledScorer, requests: Sequence[PackRequest]) -> list[Forward]:
    """Returns the passes of these requests, whose shapes are compiled and have run afterwards."""
    forwards = [forward for group in scorer.packer.pack(requests) for forward in group]
    for bucket in dict.fromkeys(forward.bucket for forward in forwards):
        scorer.run_empty(bucket)
    return forwards


def growth_plot(curve: Curve, rows: Sequence[dict[str, Any]]) -> Drawing:
    """Returns items/s against the curve's axis, and dashed what arithmetic alone makes of each line's fastest point."""
    lines = {shape.name: [row for row in rows if row["line"] == shape.name] for shape in curve.shapes}
    logs = np.log([[row["items_per_s"] for row in points] for points in lines.values()])
    apart = int(np.argmax(np.ptp(logs, axis=0))) if len(logs) > 1 else len(curve.values) // 2  # where names have room

    def plot(axes: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes.set(xscale="log", yscale="log", xlabel=curve.label, ylabel="items/s")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
            axis.set_minor_formatter(NullFormatter())
        for (name, points), marker, role in zip(lines.items(), MARKERS, SERIES, strict=False):
            places, rates = [row["at"] for row in points], [row["items_per_s"] for row in points]
            least, most = ([row[f"items_per_s_{end}"] for row in points] for end in ("p5", "p95"))
            axes.fill_between(places, least, most, color=LIGHT[role], alpha=0.2, linewidth=0)
            axes.plot(places, rates, color=LIGHT[role], marker=marker, markersize=4.5, linewidth=1.4)
            axes.plot(
                places,
                [row["items_per_s"] / row["of_fastest"] for row in points],
                color=LIGHT["muted"],
                linewidth=1.2,
                dashes=(5, 3),
                zorder=0,
            )
            label = (places[apart], rates[apart])
            side = "right" if apart else "left"
            axes.annotate(name, label, (-3, -8), textcoords="offset points", ha=side, va="top")

    said = "; ".join(
        f"{name}: " + ", ".join(f"{row['items_per_s']:,.3g} at {row['at']}" for row in points)
        for name, points in lines.items()
    )
    return draw(
        plot,
        760,
        400,
        title=f"Items per second against {curve.label}. {said}",
        caption="Dashed: the arithmetic of each point at the FLOP/s of its line's fastest point. Shaded: p5 to p95.",
    )
