"""Queries with graded relevance from the O*NET tables and the title index, split by occupation group. All pure."""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jaxslm.demo.postings import Occupation

DEV_SHARE = 0.18
HIGHEST_GRADE = 3
TITLE_SHARE = 0.25
"""Of the queries of a mixed file."""


@dataclass(frozen=True)
class GradedQuery:
    """A query and the grade (1 to 3) of every posting that is at all relevant to it."""

    query_id: str
    query: str
    grades: Mapping[str, int]


@dataclass(frozen=True)
class SplitQueries:
    """The queries of both sides, and how many were dropped, by reason."""

    train: list[GradedQuery]
    dev: list[GradedQuery]
    dropped: dict[str, int]


def minor_group(code: str) -> str:
    """Returns the group of an occupation code by which the data is split: its first four characters."""
    return code[:4]


def split_groups(codes: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns the (train, dev) minor groups: a fixed share of the groups, lowest sha256 of the name first, is dev."""
    groups = sorted({minor_group(code) for code in codes}, key=_hash)
    count = round(DEV_SHARE * len(groups))
    return sorted(groups[count:]), sorted(groups[:count])


def grade_postings(relevant: Collection[str], codes: Iterable[str]) -> dict[str, int]:
    """Returns code -> grade for every posting near a relevant one; the best grade where several are near.

    3: the same code. 2: the same broad occupation (first six characters). 1: the same minor group (first four). Sharing
    only the major group (first two) is no relevance here: that would list about 60 postings per query instead of 20,
    and it would carry labels across the split, whose unit is the minor group.
    """
    exact = set(relevant)
    broad = {code[:6] for code in relevant}
    minor = {minor_group(code) for code in relevant}
    grades = {}
    for code in codes:
        if code in exact:
            grades[code] = HIGHEST_GRADE
        elif code[:6] in broad:
            grades[code] = 2
        elif minor_group(code) in minor:
            grades[code] = 1
    return grades


def task_and_activity_queries(
    occupations: Sequence[Occupation], activities: Mapping[str, tuple[str, set[str]]]
) -> SplitQueries:
    """Returns the queries made of the tasks that no posting shows and of the work activity titles.

    Statements with the same words are one query, relevant to all their occupations. Dropped are queries whose words
    stand in some posting, and queries whose relevant occupations lie on both sides of the split.
    """
    codes = [occupation.code for occupation in occupations]
    shown = {words(task) for occupation in occupations for task in occupation.posting_tasks}
    _, dev_groups = split_groups(codes)
    result = SplitQueries([], [], {"words_in_a_posting": 0, "relevant_in_both_splits": 0})
    for query_id, text, relevant in _candidates(occupations, activities):
        sides = {minor_group(code) in dev_groups for code in relevant}
        if words(text) in shown:
            result.dropped["words_in_a_posting"] += 1
        elif len(sides) == 2:
            result.dropped["relevant_in_both_splits"] += 1
        else:
            side = result.dev if True in sides else result.train
            side.append(GradedQuery(query_id, text, grade_postings(relevant, codes)))
    return SplitQueries(in_order(result.train), in_order(result.dev), result.dropped)


def in_order(queries: Iterable[GradedQuery]) -> list[GradedQuery]:
    """Returns the queries in the order of a file: by hash, which makes its first n lines a fair sample of it."""
    return sorted(queries, key=lambda query: _hash(query.query_id))


def posting_title_queries(
    occupations: Sequence[Occupation], kept_out: Iterable[str]
) -> tuple[list[GradedQuery], list[GradedQuery]]:
    """Returns the postings' own titles of the (train, dev) sides as queries: short ones, as people type them.

    Those of the dev side choose a model; those of the training side are for distillation, by a teacher's scores first.

    Args:
        kept_out: queries for evaluation; a title that is one of them, up to punctuation and a plural s, is left out.
    """
    codes = [occupation.code for occupation in occupations]
    _, dev_groups = split_groups(codes)
    evaluated = {_singular(text) for text in kept_out}
    sides: tuple[list[GradedQuery], list[GradedQuery]] = ([], [])
    for occupation in occupations:
        if _singular(occupation.title) not in evaluated:
            grades = grade_postings({occupation.code}, codes)
            query = GradedQuery(f"title-{occupation.code}", occupation.title, grades)
            sides[minor_group(occupation.code) in dev_groups].append(query)
    return in_order(sides[0]), in_order(sides[1])


def mixed_queries(queries: Sequence[GradedQuery], titles: Sequence[GradedQuery]) -> list[GradedQuery]:
    """Returns titles and the first of other queries, so many that TITLE_SHARE are titles: searches of every length."""
    others = queries[: round(len(titles) / TITLE_SHARE) - len(titles)]
    return in_order([*titles, *others])


def title_queries(occupations: Sequence[Occupation], titles: Mapping[str, Mapping[str, str]]) -> list[GradedQuery]:
    """Returns one query per search title whose profile bears the title of an occupation.

    A search title that is the occupation's own title, up to punctuation and a plural s, asks nothing and is left out.

    Args:
        occupations: the occupations that have postings.
        titles: key -> {"raw": search title, "canonical": title of the profile it leads to}.
    """
    codes = [occupation.code for occupation in occupations]
    by_title = {occupation.title.casefold(): occupation for occupation in occupations}
    relevant: dict[str, set[str]] = {}
    for entry in titles.values():
        occupation = by_title.get(entry["canonical"].casefold())
        if occupation and _singular(entry["raw"]) != _singular(occupation.title):
            relevant.setdefault(entry["raw"], set()).add(occupation.code)
    queries = [
        GradedQuery(f"bls-{number:04d}", text, grade_postings(relevant[text], codes))
        for number, text in enumerate(sorted(relevant), start=1)
    ]
    return in_order(queries)


def query_record(query: GradedQuery) -> dict[str, object]:
    """Returns the line of the query file: the best item first, label = grade / 3."""
    ranked = sorted(query.grades.items(), key=lambda pair: (-pair[1], pair[0]))
    items = [{"id": code, "label": grade / HIGHEST_GRADE} for code, grade in ranked]
    return {"query_id": query.query_id, "query": query.query, "items": items}


def qrels_lines(query: GradedQuery) -> list[str]:
    """Returns the TREC judgements of a query: `query_id 0 item_id grade`."""
    return [f"{query.query_id} 0 {code} {grade}" for code, grade in sorted(query.grades.items())]


def _candidates(
    occupations: Sequence[Occupation], activities: Mapping[str, tuple[str, set[str]]]
) -> list[tuple[str, str, set[str]]]:
    """Every distinct text as (query id, text, relevant codes); the id is that of its first statement."""
    known = {occupation.code for occupation in occupations}
    merged: dict[str, tuple[str, str, set[str]]] = {}
    for occupation in occupations:
        first = len(occupation.posting_tasks)
        for task_id, task in zip(occupation.task_ids[first:], occupation.tasks[first:], strict=True):
            merged.setdefault(words(task), (f"task-{task_id}", task, set()))[2].add(occupation.code)
    for activity_id, (title, codes) in sorted(activities.items()):
        if codes & known:
            merged.setdefault(words(title), (f"dwa-{activity_id}", title, set()))[2].update(codes & known)
    return list(merged.values())


def words(text: str) -> str:
    """The text without case and punctuation: two texts with the same words are one query."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _singular(title: str) -> str:
    return re.sub(r"s\b", "", re.sub(r"[^a-z0-9 ]+", "", title.lower()))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
