"""Made calibration files and calibration sets for the tests of pruning."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxslm.prompt import Prompt
from jaxslm.prune.calibrate import Calibration, read_calibration
from tests.tiny import tiny_ranker_config, tiny_tokenizer_json

WORDS = ("python", "developer", "engineer", "nurse", "baker", "welder", "pilot", "teacher", "lawyer", "cook", "painter")
PROMPT: dict[str, Any] = {"template": "yes-no", "instruction": "Match?", "max_tokens": 256}


def prompt() -> Prompt:
    return Prompt(tiny_tokenizer_json(), tiny_ranker_config(**PROMPT).prompt)


def write_requests(path: Path, requests: int = 12, seed: int = 0) -> Path:
    """Requests of 1 to 6 items, as `jaxslm score` reads them; returns `path`."""
    generator = np.random.default_rng(seed)
    rows = [
        {"query": _words(generator, 4), "items": [{"text": _words(generator, 12)} for _ in range(1 + row % 6)]}
        for row in range(requests)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_queries(folder: Path, queries: int = 12, seed: int = 0) -> tuple[Path, Path]:
    """Queries that judge 20 items each, one of them relevant, and the items; returns both paths."""
    generator = np.random.default_rng(seed)
    items = [{"id": f"i{number}", "title": "A job", "text": _words(generator, 12)} for number in range(40)]
    rows = []
    for number in range(queries):
        ids = generator.choice(40, 20, replace=False)
        judged = [{"id": f"i{each}", "label": float(place == 7)} for place, each in enumerate(ids)]
        rows.append({"query_id": str(number), "query": _words(generator, 4), "items": judged})
    paths = folder / "queries.jsonl", folder / "items.jsonl"
    paths[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths[1].write_text("".join(json.dumps(item) + "\n" for item in items))
    return paths


def requests_calibration(folder: Path, **changes: Any) -> Calibration:
    path = write_requests(folder / "requests.jsonl")
    return read_calibration(path, None, prompt(), **({"max_tokens": 100_000} | changes))


def _words(generator: np.random.Generator, most: int) -> str:
    return " ".join(generator.choice(WORDS, size=generator.integers(1, most + 1)))
