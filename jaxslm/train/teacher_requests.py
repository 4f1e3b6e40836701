"""`jaxslm teacher-requests`: the pairs that a teacher is to score, as `jaxslm score` reads them.

Its answers become `data.teacher_scores`. That way any ranker can teach, whatever its tokenizer and prompt, and it reads
every pair once, not once per epoch.
"""

from pathlib import Path
from typing import Any

from jaxslm.atomic import new_file, refuse_existing
from jaxslm.data_files import Item, Request, RequestItem, items_by_id
from jaxslm.errors import InputError
from jaxslm.evaluate.candidates import Bm25
from jaxslm.progress import progress
from jaxslm.train.data_settings import DataSettings
from jaxslm.train.sources import checked_queries, read_source


def write_teacher_requests(settings: DataSettings, out: Path) -> dict[str, Any]:
    """Writes a request per training query: its judged items and the pool of its hard negatives, with ids and texts.

    These are the items that `ranker_batches` with the same settings puts into a query's lists, but for random
    negatives, which no file can foresee: their teacher is unknown, and the losses leave them out. An item's text is
    title, newline, text, which a prompt turns into the same ids as the item itself.

    Returns:
        The numbers of requests and items, as the command line prints them.

    Raises:
        InputError: `out` exists, or a file breaks a rule of `read_training_data`: a repeated id, an item without text,
            a query that judges an unknown item.
    """
    refuse_existing(out)
    items = items_by_id(settings.items, read_source(settings.items, Item, streaming=settings.streaming))
    empty = next((item_id for item_id, item in items.items() if not _text(item)), None)
    if empty is not None:
        raise InputError(f"{settings.items}: item {empty!r}: has no text")
    queries = list(checked_queries(settings, items))
    judged = {each.id for query in queries for each in query.items}
    searched = settings.hard_negatives > 0 and settings.hard_negative_pool > 0
    bm25 = Bm25({item_id: item for item_id, item in items.items() if item_id in judged}) if searched else None
    pairs = 0
    with new_file(out) as staging, staging.open("w", encoding="utf-8") as lines, progress() as bar:
        task = bar.add_task("teacher requests", total=len(queries))
        for query in queries:
            found = bm25.search(query.query, settings.hard_negative_pool) if bm25 is not None else []
            ids = dict.fromkeys([*(each.id for each in query.items), *(item_id for item_id, _ in found)])
            rows = tuple(RequestItem(id=item_id, text=_text(items[item_id])) for item_id in ids)
            lines.write(Request(query=query.query, items=rows).model_dump_json() + "\n")
            pairs += len(rows)
            bar.advance(task)
    return {"requests": len(queries), "items": pairs, "out": str(out)}


def _text(item: Item) -> str:
    return f"{(item.title or '').strip()}\n{item.text.strip()}".strip()
