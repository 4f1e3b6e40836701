"""The page at `/`, and the postings of `jaxslm serve --items` that a person can rank there."""

import json
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

from jaxslm.data_files import read_items
from jaxslm.errors import InputError
from jaxslm.serve.engine import Engine
from jaxslm.serve.settings import ServeSettings

MAX_PAGE_ITEMS = 5000
"""A browser holds them all and searches them by words."""

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}


def add_page(app: FastAPI, engine: Engine) -> None:
    """Adds `/`, its static files under `/page/`, and `/demo/items`, which needs a key if the server has keys.

    Raises:
        InputError: the items cannot be read, or are more than a page can hold.
    """
    settings, items = engine.settings, _demo_items(engine.settings)

    @app.get("/demo/items", include_in_schema=False)
    async def demo_items() -> Response:
        """What the page ranks, and what it has to know of this server."""
        about = {"model": engine.model.name, "store": engine.store is not None, "max_items": settings.max_items}
        content = f'{json.dumps(about, ensure_ascii=False)[:-1]}, "items": {items}}}'
        return Response(content, media_type="application/json")

    def add_file(path: str, name: str) -> None:
        body = (files("jaxslm.serve") / "page" / name).read_bytes()

        async def file() -> Response:
            return Response(body, headers=_HEADERS, media_type=_TYPES[name])

        app.get(path, include_in_schema=False)(file)

    add_file("/", "index.html")
    for name in ("page.css", "page.js"):
        add_file(f"/page/{name}", name)


def _demo_items(settings: ServeSettings) -> str:
    """Returns the postings as JSON: there may be thousands, and they do not change."""
    items = [] if settings.items is None else list(read_items(Path(settings.items)).values())
    if len(items) > MAX_PAGE_ITEMS:
        raise InputError(f"{settings.items}: holds {len(items)} items, and the page takes at most {MAX_PAGE_ITEMS}")
    shown = [{"id": item.id, "title": item.title, "text": item.text} for item in items]
    return json.dumps(shown, ensure_ascii=False)
