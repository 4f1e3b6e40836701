"""The reliability plot of probabilities, drawn as `figures` says how. It needs the extra `report` (matplotlib)."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from jaxslm.atomic import new_file, refuse_unwritable
from jaxslm.errors import InputError
from jaxslm.evaluate.calibration import CalibrationReport
from jaxslm.evaluate.figures import LIGHT, MARKERS, SERIES, Drawing, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png")


def reliability(reports: Mapping[str, CalibrationReport]) -> Drawing:
    """Returns mean label over mean probability: a line per named report, a point per bin, the diagonal as perfect."""

    def plot(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color=LIGHT["muted"], linewidth=1, linestyle="--", label="perfect")
        for (name, report), role, marker in zip(reports.items(), SERIES, MARKERS, strict=False):
            x, y = zip(*((row.mean_probability, row.mean_label) for row in report.bins), strict=True)
            label = f"{name}: ECE {report.ece:.3f}"
            axes.plot(x, y, color=LIGHT[role], marker=marker, markersize=4, linewidth=1.2, label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="mean P(yes) of a bin", ylabel="mean label", aspect="equal")
        axes.legend(loc="best", frameon=False)

    pairs = max(report.pairs for report in reports.values())
    caption = f"Bins of equal mass, {pairs:,} pairs; ECE is the mean distance from the diagonal, weighted by pairs."
    return draw(plot, 480, 480, title="Reliability of P(yes)", caption=caption)


def check_plot(path: Path) -> None:
    """Raises InputError for a path that exists, cannot be created or is of another format, or without matplotlib.

    Call it before long work.
    """
    refuse_unwritable(path)
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: a plot must end in {' or '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise InputError(f"{path}: plots need matplotlib: pip install 'jaxslm[report]'")


def write_plot(path: Path, drawing: Drawing) -> None:
    """Writes a drawing in the format that the path's suffix names. Raises as `check_plot`."""
    check_plot(path)
    with new_file(path) as staging:
        staging.write_bytes(drawing.png if path.suffix == ".png" else drawing.svg.encode())
