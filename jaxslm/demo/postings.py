"""Composes job postings from the O*NET tables: one posting per occupation that has tasks. Pure functions of text."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TASKS_IN_POSTING = 8


@dataclass(frozen=True)
class Occupation:
    """An occupation: its code (`11-1011.00`), title, description and task statements in file order."""

    code: str
    title: str
    description: str
    tasks: tuple[str, ...]
    task_ids: tuple[str, ...]

    @property
    def posting_tasks(self) -> tuple[str, ...]:
        """The tasks that the posting shows; the others may become queries."""
        return self.tasks[:TASKS_IN_POSTING]


def read_occupations(occupations_text: str, tasks_text: str) -> list[Occupation]:
    """Returns the occupations that have at least one task, sorted by code.

    Args:
        occupations_text: tab-separated table with the columns O*NET-SOC Code, Title, Description.
        tasks_text: comma-separated table with O*NET-SOC Code, Task ID and Task; a task has one row per work activity.
    """
    tasks: dict[str, dict[str, str]] = {}
    for row in task_rows(tasks_text):
        tasks.setdefault(row["O*NET-SOC Code"], {})[row["Task ID"]] = row["Task"]
    table = csv.DictReader(io.StringIO(occupations_text), delimiter="\t")
    described = {row["O*NET-SOC Code"]: row for row in table}
    return [
        Occupation(
            code=code,
            title=described[code]["Title"],
            description=described[code]["Description"],
            tasks=tuple(tasks[code].values()),
            task_ids=tuple(tasks[code]),
        )
        for code in sorted(tasks)
        if code in described
    ]


def read_work_activities(tasks_text: str) -> dict[str, tuple[str, set[str]]]:
    """Returns the detailed work activities of the task table: id -> (title, codes of the occupations mapped to it)."""
    activities: dict[str, tuple[str, set[str]]] = {}
    for row in task_rows(tasks_text):
        activities.setdefault(row["DWA ID"], (row["DWA Title"], set()))[1].add(row["O*NET-SOC Code"])
    return activities


def task_rows(tasks_text: str) -> Iterable[Mapping[str, str]]:
    """Returns the rows of the task table, with or without a byte order mark in front."""
    return csv.DictReader(io.StringIO(tasks_text.removeprefix("\ufeff")))


def posting(occupation: Occupation) -> dict[str, str]:
    """Returns the item of an occupation: id, title, and the text without the title, so that no prompt repeats it."""
    text = occupation.description + "\n" + " ".join(occupation.posting_tasks)
    return {"id": occupation.code, "title": occupation.title, "text": text}
