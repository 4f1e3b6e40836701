"""The report: what is measured is shown and nothing else, whatever the names hold; bad files are one line."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from jaxslm.errors import InputError
from jaxslm.evaluate import plots
from jaxslm.evaluate.calibration import calibration_report
from jaxslm.evaluate.figures import DARK, LIGHT, Drawing, draw
from jaxslm.evaluate.plots import frontier
from jaxslm.evaluate.report import write_report
from jaxslm.evaluate.results import Row
from tests.browser import VIEWS, chromium, keep_screenshot, watched_page

EVIL = "<script>alert(1)</script> | $x_1$ & `b` 雇用"


def calibration(seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    probabilities = generator.random(300)
    return asdict(calibration_report(probabilities, (generator.random(300) < probabilities).astype(float)))


def ranking() -> dict[str, Any]:
    """A result file with a row of every kind."""
    cost = {"tokens_per_item": 912.4, "parameters": 44_123_456, "gflop_per_item": 42.3}
    rows = [
        {"name": "random order", "ndcg_at_10": 0.2},
        {"name": "BM25", "ndcg_at_10": 0.55, "ndcg_ci95": [0.53, 0.57], "rr_at_10": 0.3},
        {"name": "full text", "ndcg_at_10": 0.71, "ndcg_ci95": [0.69, 0.73], "items_per_s": 21.3, **cost}
        | {"ndcg_minus_dense": 0.0, "ndcg_minus_dense_ci95": [0.0, 0.0]}
        | {"calibration": calibration(0)},
        {
            "name": "k=8",
            "minus_text": {"mean": -0.0123, "ci95": [-0.02, 0.004]},
            "ndcg_minus_dense": -0.0321,
            "ndcg_minus_dense_ci95": [-0.05, -0.01],
            "ndcg_at_10": 0.7,
            "ndcg_ci95": [0.68, 0.72],
            "items_per_s": 1310.0,
            "items_per_s_p5": 1200,
        },
        {"name": EVIL, "ndcg_at_10": 0.6, "items_per_s": 900.0, "calibration": calibration(1)},
    ]
    return {"rows": rows, "conditions": {"queries": 400, "who": EVIL, "versions": {"jax": "0.11.2"}}}


def serving() -> dict[str, Any]:
    """What `jaxslm bench serve` writes."""
    steps = [
        {
            "workload": "text_300",
            "offered_items_per_s": rate,
            "p50_ms": rate,
            "p95_ms": 2.0 * rate,
            "p99_ms": 9.0 * rate,
        }
        for rate in (10.0, 20.0, 80.0)
    ]
    steps.append({"workload": "text_300", "offered_items_per_s": 90.0, "p50_ms": None, "p95_ms": None, "p99_ms": None})
    return {"rows": [{"name": "text_300", "items_per_s": 20.0, "p99_ms": 180.0}], "load": steps, "workload": "text_300"}


def save(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    files = [save(folder / "frontier.json", ranking()), save(folder / "serve.json", serving())]
    return write_report(files, folder / "out").parent


def test_the_page_shows_every_number_and_needs_nothing_from_elsewhere(report: Path) -> None:
    page = Page(report / "index.html")
    numbers = ("0.710", "0.690 to 0.730", "21.3", "1,310", "912", "42.3", "44.1 M", "180", "-0.012", "-0.020 to +0.004")
    for said in (*numbers, "400", "jax 0.11.2", EVIL):
        assert said in page.text
    assert "script" not in page.tags
    addresses = [value for name, value in page.attributes if name in ("src", "href", "xlink:href") and value]
    assert all(value.startswith("#") for value in addresses)
    assert not re.search(r"url\((?!#)|@import", (report / "index.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == len(list(report.glob("*.svg")))


def test_every_plot_is_there_as_svg_and_png(report: Path) -> None:
    kinds = {"frontier", "differences", "load-text-300", "tokens", "flops", "parameters", "calibration-1"}
    for suffix in (".svg", ".png"):
        names = {re.sub(r"^\d-(frontier|serve)-", "", path.stem) for path in report.glob(f"*{suffix}")}
        assert names == kinds
    for path in report.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_svgs_are_well_formed_named_and_follow_the_theme(report: Path) -> None:
    for path in report.glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.get("role") == "img"
        assert root.get("aria-label")
        text = path.read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in text
        drawn = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"<style>:root.*?</style>", "", text)))
        assert drawn <= {"#000000"}  # what is invisible; the rest is var(--role)
        assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(LIGHT) == set(DARK)


def test_points_and_lines_have_their_names_beside_them(report: Path) -> None:
    frontier = ElementTree.parse(report / "1-frontier-frontier.svg").getroot()
    written = "".join(frontier.itertext())
    for name in ("full text", "k=8", "BM25, 0.550", "random order, 0.200", EVIL[:20]):
        assert name in written
    differences = "".join(ElementTree.parse(report / "1-frontier-differences.svg").getroot().itertext())
    assert "k=8" in differences
    assert "full text" not in differences  # it is what others are compared with
    load = "".join(ElementTree.parse(report / "2-serve-load-text-300.svg").getroot().itertext())
    assert all(name in load for name in ("p50", "p95", "p99", "500 ms"))


def test_names_lie_free_and_nearest_their_own_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rankers nearly as fast and as good as one another, and wide intervals beside one another."""
    measured = {
        "full text": (36.1, 0.452),
        "pruned": (39.1, 0.465),
        "compressed k=8": (446.0, 0.449),
        "compressed k=1": (824.0, 0.456),
        "bi-encoder": (4200.0, 0.431),
        "BM25": (180_000.0, 0.215),
    }
    rows = [
        Row(name=name, items_per_s=speed, ndcg_at_10=quality, ndcg_ci95=(quality - 0.08, quality + 0.08))
        for name, (speed, quality) in measured.items()
    ]
    drawn = []

    def keep(plot: Callable[[Axes], None], width: int, height: int, **said: str) -> Drawing:
        figure = Figure((width / 100, height / 100), layout="constrained")
        axes = figure.add_subplot()
        plot(axes)
        figure.draw_without_rendering()
        drawn.append(axes)
        return draw(plot, width, height, **said)

    monkeypatch.setattr(plots, "draw", keep)
    frontier(rows)
    [axes] = drawn
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts if isinstance(text, Annotation)}
    assert boxes.keys() == measured.keys()
    for name, box in boxes.items():
        assert not any(box.overlaps(other) for whose, other in boxes.items() if whose != name)
        away = {}
        for row in rows:
            assert row.ndcg_ci95
            (x, low), (_, high) = (axes.transData.transform((row.items_per_s, y)) for y in row.ndcg_ci95)
            assert not box.overlaps(Bbox.from_extents(x, low, x, high))
            across, along = max(box.x0 - x, x - box.x1, 0), max(box.y0 - high, low - box.y1, 0)
            away[row.name] = np.hypot(across, along)
        assert min(away, key=away.__getitem__) == name


def test_markdown_has_the_table_and_the_plots(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables[:6]}
    assert len(widths) == 1
    assert "<script>" not in text
    for name in re.findall(r"\]\(([^)]+\.svg)\)", text):
        assert (report / name).is_file()


@pytest.mark.slow
def test_the_same_results_give_the_same_files(tmp_path: Path) -> None:
    results = save(tmp_path / "r.json", ranking())
    first, second = (write_report([results], tmp_path / name).parent for name in ("a", "b"))
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_files_of_one_measurement_share_a_table(tmp_path: Path) -> None:
    files = [
        save(
            tmp_path / f"{k}.json",
            {"workload": f"latent_{k}", "model": "m", "items_per_s": 10.0 * k, "jax": "1", "k": k},
        )
        for k in (1, 8)
    ]
    page = Page(write_report(files, tmp_path / "out"))
    assert page.tags.count("table") == 1
    assert "latent_1, m" in page.text
    assert "latent_8, m" in page.text
    assert {"jax"} == {"jax", "k"} & set(re.findall(r"<dt>(\w+)</dt>", (tmp_path / "out/index.html").read_text()))


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    page = Page(write_report([save(tmp_path / "r.json", {"rows": [{"name": "only a name"}]})], tmp_path / "out"))
    assert "svg" not in page.tags
    assert page.tags.count("td") == 0
    assert "only a name" in page.text


@pytest.mark.parametrize("view", VIEWS)
def test_a_browser_shows_it_in_light_dark_and_narrow(report: Path, view: str) -> None:
    problems: list[str] = []
    with chromium() as browser:
        page = watched_page(browser, view, problems)
        page.goto((report / "index.html").as_uri())
        keep_screenshot(page, f"report-{view}")
        texts = page.locator("svg text").evaluate_all("all => all.map(text => getComputedStyle(text).fill)")
    assert problems == []
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) > 380 for colour in texts]
    assert all(bright) if VIEWS[view][0] == "dark" else not any(bright)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "broken JSON"),
        ("[1]", "the file"),
        ("{}", "neither rows nor load nor a measurement"),
        ('{"rows": []}', "neither rows nor load nor a measurement"),
        ('{"rows": [{"ndcg_at_10": 0.5}]}', "rows.0.name"),
        ('{"rows": [{"name": "a", "ndcg_at_10": 1.5}]}', "rows.0.ndcg_at_10"),
        ('{"rows": [{"name": "a", "ndcg_at_10": "0.5"}]}', "rows.0.ndcg_at_10"),
        ('{"rows": [{"name": "a", "items_per_s": NaN}]}', "r.json: "),
        ('{"rows": [{"name": "a", "items_per_s": -1}]}', "rows.0.items_per_s"),
        ('{"rows": [{"name": "a", "ndcg_ci95": [0.6, 0.5]}]}', "low end comes first"),
        ('{"items_per_s": "fast"}', "items_per_s"),
        (json.dumps({"load": [serving()["load"][0] | {"p50_ms": 0}]}), "load.0.p50_ms"),
    ],
)
def test_a_bad_file_is_one_line_and_nothing_is_written(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(said)) as error:
        write_report([path], tmp_path / "out")
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["r.json"]


def test_absent_files_and_existing_outputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        write_report([tmp_path / "none.json"], tmp_path / "out")
    with pytest.raises(InputError, match="one or more"):
        write_report([], tmp_path / "out")
    with pytest.raises(InputError, match="exists"):
        write_report([tmp_path / "none.json"], tmp_path)
