"""The page at `/`: a person types a query and sees postings ranked, by text and by stored vectors."""

import json
import re
from collections.abc import Iterator
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from jaxslm.errors import InputError
from jaxslm.serve import demo
from jaxslm.serve.run import Server
from jaxslm.serve.settings import Keys, ServeSettings
from tests.browser import VIEWS, chromium, keep_screenshot, watched_page
from tests.serve.tiny_server import ADMIN, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MARKUP = "<img src=x onerror=document.title='broken'>"
KEY = "a-key-of-the-page"
TITLES = ("Python developer", "Truck driver", "Nurse", "Baker", "Teacher", "Web developer", "Carpenter", MARKUP)
ITEMS = [
    {"id": f"i{number}", "title": title, "text": f"Works as a {title.lower()} every day, with care."}
    for number, title in enumerate(TITLES)
]
NOT_STORED = "i6"


def write_items(path: Path) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return str(path)


@pytest.fixture(scope="module")
def site(files: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with postings for its page, all but one of them in its store."""
    folder = tmp_path_factory.mktemp("page")
    items = write_items(folder / "items.jsonl")
    settings = ServeSettings(**files, store=str(folder / "store"), items=items, deadline_ms=120_000.0)
    with running(settings) as server:
        stored = [item for item in ITEMS if item["id"] != NOT_STORED]
        body = {"items": stored, "vectors_per_item": 2}
        assert httpx.put(f"{server.url}/v1/items", json=body, headers=ADMIN, timeout=120).json()["encoded"] == len(
            stored
        )
        yield server


@pytest.fixture(scope="module")
def guarded(files: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants a key, without an item store."""
    items = write_items(tmp_path_factory.mktemp("guarded") / "items.jsonl")
    with running(ServeSettings(**files, items=items, deadline_ms=120_000.0), Keys(api=frozenset({KEY}))) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as browser:
        yield browser


def shown(page: "Page", column: int) -> list[str]:
    return page.locator(".column").nth(column).locator(".title").all_inner_texts()


def test_files_are_in_the_package_and_name_no_other_host() -> None:
    for name in demo._TYPES:
        text = (package_files("jaxslm.serve") / "page" / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]|innerHTML|eval\(", text)


def test_the_page_is_open_and_its_postings_want_a_key(guarded: Server) -> None:
    for path, kind in (("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/page.css", "text/css")):
        answer = httpx.get(guarded.url + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert httpx.get(f"{guarded.url}/demo/items").status_code == 401
    content = httpx.get(f"{guarded.url}/demo/items", headers={"x-api-key": KEY}).json()
    assert [item["id"] for item in content["items"]] == [item["id"] for item in ITEMS]
    assert content["store"] is False
    for path in ("/page/", "/page/page.html", "/page/../app.py", "/page/%2e%2e/app.py"):
        assert httpx.get(guarded.url + path, headers={"x-api-key": KEY}).status_code == 404


def test_more_postings_than_a_page_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MAX_PAGE_ITEMS", 3)
    settings = ServeSettings(model="m", items=write_items(tmp_path / "items.jsonl"))
    with pytest.raises(InputError, match="8 items, and the page takes at most 3"):
        demo._demo_items(settings)


@pytest.mark.parametrize("view", VIEWS)
def test_a_query_gives_two_rankings(site: Server, browser: "Browser", view: str) -> None:
    problems: list[str] = []
    page = watched_page(browser, view, problems)
    page.goto(site.url)
    page.get_by_label("What are you looking for?").fill("python developer")
    page.keyboard.press("Enter")
    page.get_by_text("times as fast").wait_for()
    body = {"query": "python developer", "documents": [{"title": i["title"], "text": i["text"]} for i in ITEMS]}
    results = httpx.post(f"{site.url}/v1/rerank", json=body, timeout=60).json()["results"]
    assert shown(page, 0) == [TITLES[result["index"]] for result in results]
    scores = [float(text) for text in page.locator(".column").first.locator(".score").all_inner_texts()]
    assert scores == pytest.approx([result["relevance_score"] for result in results], abs=1e-3)
    assert sorted(shown(page, 1)) == sorted(title for title in TITLES if title != "Carpenter")
    assert "1 not in the store" in page.locator(".summary").nth(1).inner_text()
    assert page.locator(".split").count() == 2
    assert "broken" not in page.title()
    page.locator("summary").first.click()
    keep_screenshot(page, f"page-{view}")
    page.close()
    assert problems == []


def test_words_find_their_plural_and_what_is_not_found_is_said(site: Server, browser: "Browser") -> None:
    page = watched_page(browser, "light", [])
    page.goto(site.url)
    for query, said in (("zebra", True), (f"{TITLES[0].split()[-1]}s", False)):
        page.get_by_label("What are you looking for?").fill(query)
        page.keyboard.press("Enter")
        page.get_by_text("times as fast").wait_for()
        assert ("No posting has a word of this" in page.locator("#status").inner_text()) == said
    page.close()


def test_it_works_from_the_keyboard_alone(site: Server, browser: "Browser") -> None:
    page = watched_page(browser, "light", [])
    page.goto(site.url)
    page.keyboard.type("nurse")  # the field has the focus
    page.keyboard.press("Enter")
    page.get_by_text("times as fast").wait_for()
    assert page.locator("#status").get_attribute("aria-live") == "polite"
    for _ in range(3):  # number of postings, button, first posting
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("details[open] .text").count() == 1
    page.close()


def test_a_key_is_asked_for_and_used(guarded: Server, browser: "Browser") -> None:
    page = watched_page(browser, "light", [])
    page.goto(guarded.url)
    key = page.get_by_label("API key of this server")
    key.wait_for()
    page.get_by_label("What are you looking for?").fill("nurse")
    key.fill("a-wrong-key")
    key.press("Enter")
    page.locator("#status.error", has_text="a valid API key is needed").wait_for()
    key.fill(KEY)
    key.press("Enter")
    page.get_by_text("Ranked 8 postings").wait_for()
    assert page.locator(".column").count() == 1
    page.close()


def test_own_postings_without_a_file(server: Server, browser: "Browser") -> None:
    page = watched_page(browser, "light", [])
    page.goto(server.url)
    page.get_by_label("Postings, one per line").fill("Bakes bread.\n\nDrives a truck.")
    page.get_by_label("What are you looking for?").fill("baker")
    page.get_by_role("button", name="Rank").click()
    page.get_by_text("Ranked 2 postings").wait_for()
    assert sorted(shown(page, 0)) == ["Bakes bread.", "Drives a truck."]
    page.close()
