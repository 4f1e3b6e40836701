"""How figures look and are saved: PNG on white, and SVG whose colours follow the reader's light or dark theme."""

import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

from jaxslm.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = {
    "ink": "#1d2330",
    "muted": "#5b6475",
    "grid": "#dde1e8",
    "series-1": "#1f5fbf",
    "series-2": "#b4530a",
    "series-3": "#1b7f5c",
    "series-4": "#8a3fa8",
}
"""Colours by role. Figures are drawn with these; each is unique, so that the SVG's can be told apart and renamed."""
DARK = {
    "ink": "#e8eaf0",
    "muted": "#a2abbb",
    "grid": "#39414f",
    "series-1": "#82b4ff",
    "series-2": "#ffb066",
    "series-3": "#63d6aa",
    "series-4": "#d8a1f2",
}
SERIES = tuple(role for role in LIGHT if role.startswith("series"))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
"""Series and points differ in shape too: colour is never the only difference."""

PIXELS_PER_INCH = 100  # of the lengths that figures are given in
PNG_DPI = 200
SYSTEM_FONTS = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LIGHT["muted"],
    "axes.grid": True,
    "axes.labelcolor": LIGHT["ink"],
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and scaled
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # names may hold dollar signs
    "xtick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.color": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["ink"],
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure.

    Attributes:
        title: what it shows, in words; readers that see no picture get this. caption: how to read it.
        inline: SVG for an HTML page that defines the colours as CSS variables. svg: the same as a file of its own.
        png: on white.
    """

    title: str
    caption: str
    inline: str
    svg: str
    png: bytes


def css_variables(colours: dict[str, str]) -> str:
    """Returns CSS declarations of the colours, "--ink: #1d2330; …"."""
    return " ".join(f"--{role}: {colour};" for role, colour in colours.items())


def draw(plot: Callable[["Axes"], None], width: int, height: int, *, title: str, caption: str = "") -> Drawing:
    """Returns a figure of one pair of axes; the same data give the same bytes.

    Args:
        plot: draws on the axes. width, height: in CSS pixels.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("plots need matplotlib: pip install 'jaxslm[report]'") from None

    style: Any = _STYLE | {"svg.hashsalt": title}
    # A glyph that is missing here need not be: the SVG is drawn with its reader's fonts.
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure((width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), PIXELS_PER_INCH, layout="constrained")
        plot(figure.add_subplot())
        svg, png = _svg(figure, title), BytesIO()
        figure.savefig(png, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    theme = (
        f"<style>:root {{ color-scheme: light dark; {css_variables(LIGHT)} }}"
        f" @media (prefers-color-scheme: dark) {{ :root {{ {css_variables(DARK)} }} }}</style>"
    )
    head, tag, rest = svg.partition(">")
    return Drawing(title, caption, svg, head + tag + theme + rest, png.getvalue())


def _svg(figure: "Figure", title: str) -> str:
    """Returns the `svg` element, its colours as CSS variables."""
    text = StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=empty)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("'DejaVu Sans'", SYSTEM_FONTS)
    svg = _light_colour().sub(lambda found: f"var(--{_role(found.group())})", svg)
    label = f'<svg role="img" aria-label="{escape(title)}" '
    return svg.replace("<svg ", label, 1).strip()


@functools.cache
def _light_colour() -> re.Pattern[str]:
    return re.compile("|".join(LIGHT.values()))


def _role(colour: str) -> str:
    return next(role for role, light in LIGHT.items() if light == colour)
