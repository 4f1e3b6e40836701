"""Writes the `jobs/` folder: postings, graded queries of both sides, title queries, and the split."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxslm.demo.postings import posting, read_occupations, read_work_activities
from jaxslm.demo.queries import (
    GradedQuery,
    minor_group,
    mixed_queries,
    posting_title_queries,
    qrels_lines,
    query_record,
    split_groups,
    task_and_activity_queries,
    title_queries,
)


def write_jobs(
    folder: Path, *, occupations_text: str, tasks_text: str, titles: Mapping[str, Mapping[str, str]]
) -> dict[str, int]:
    """Writes items.jsonl, {train,train-mixed,dev,dev-titles,bls}.{jsonl,qrels} and split.json; same input, same bytes.

    Args:
        folder: an existing folder.
        occupations_text: see `read_occupations`.
        tasks_text: see `read_occupations`.
        titles: see `title_queries`.

    Returns:
        The counts of items, tasks, groups, queries, labels and dropped queries.
    """
    occupations = read_occupations(occupations_text, tasks_text)
    codes = [occupation.code for occupation in occupations]
    train_groups, dev_groups = split_groups(codes)
    queries = task_and_activity_queries(occupations, read_work_activities(tasks_text))
    _write_json_lines(folder / "items.jsonl", (posting(occupation) for occupation in occupations))
    counts = {
        "items": len(codes),
        "tasks": sum(len(occupation.tasks) for occupation in occupations),
        "groups": len(train_groups) + len(dev_groups),
        "dev_groups": len(dev_groups),
        "train_items": sum(minor_group(code) in train_groups for code in codes),
        "dev_items": sum(minor_group(code) in dev_groups for code in codes),
        **{f"dropped_{reason}": count for reason, count in queries.dropped.items()},
    }
    for name, side in (("train", queries.train), ("dev", queries.dev)):
        counts |= _write_queries(folder, name, side)
        counts |= {f"{name}_{kind}_queries": _count_kind(side, kind) for kind in ("task", "dwa")}
    bls = title_queries(occupations, titles)
    train_titles, dev_titles = posting_title_queries(occupations, [query.query for query in bls])
    counts |= _write_queries(folder, "train-mixed", mixed_queries(queries.train, train_titles))
    counts |= _write_queries(folder, "dev-titles", dev_titles)
    counts |= _write_queries(folder, "bls", bls)
    split = json.dumps({"train_groups": train_groups, "dev_groups": dev_groups}, indent=1)
    (folder / "split.json").write_text(split + "\n", encoding="utf-8")
    return counts


def _write_queries(folder: Path, name: str, queries: Sequence[GradedQuery]) -> dict[str, int]:
    """Writes a query file in both forms; returns how many queries and labels it has."""
    _write_json_lines(folder / f"{name}.jsonl", (query_record(query) for query in queries))
    lines = (line + "\n" for query in queries for line in qrels_lines(query))
    (folder / f"{name}.qrels").write_text("".join(lines), encoding="utf-8")
    return {f"{name}_queries": len(queries), f"{name}_labels": sum(len(query.grades) for query in queries)}


def _count_kind(queries: Sequence[GradedQuery], kind: str) -> int:
    return sum(query.query_id.startswith(f"{kind}-") for query in queries)


def _write_json_lines(path: Path, records: Iterable[object]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
