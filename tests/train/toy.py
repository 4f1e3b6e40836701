"""Made data with a rule that a tiny model can learn, and settings to train on it in seconds."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxslm.config import load_toml
from jaxslm.train import step
from jaxslm.train.settings import EncoderTraining, RankerTraining
from tests.tiny import tiny_checkpoint, tiny_config

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.toml"
SHORT = ("steps=6", "save_every=2", "evaluation.every=3", "layers=1", "remat=false", "tensorboard=false")
"""Six updates with three saves and two evaluations."""
COLOURS = ("red", "blue", "green", "amber", "black", "white")


def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has rankers trained on one of the simulated devices."""
    monkeypatch.setattr("jaxslm.train.ranker.make_mesh", lambda: step.make_mesh(jax.devices()[:1]))


def write_toy_data(folder: Path, queries: int = 60, seed: int = 0) -> None:
    """Writes items.jsonl, train.jsonl and dev.jsonl: an item is good when its text ends in " job"."""
    generator = np.random.default_rng(seed)
    words = [" ".join(generator.choice(COLOURS, 3)) for _ in range(40)]
    items = [{"id": f"i{n}", "text": f"{word} {'job' if n % 2 else 'python'}"} for n, word in enumerate(words)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, count in (("train", queries), ("dev", 10)):
        lines = []
        for number in range(count):
            chosen = generator.choice(len(items), 12, replace=False)
            judged = [{"id": f"i{n}", "label": float(n % 2)} for n in chosen]
            query = " ".join(generator.choice(COLOURS, 2))
            lines.append({"query_id": f"{name}-{number}", "query": query, "items": judged})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def toy_folder(folder: Path, **model: Any) -> Path:
    """Writes the toy data and a random model of two layers, width 32, to `folder`, which it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    write_toy_data(folder)
    tiny_checkpoint(folder / "tiny", tiny_config("llama", **model), template="yes-no")
    return folder


def toy_ranker(folder: Path, *overrides: str) -> RankerTraining:
    """Returns `configs/tiny.toml` with the paths of `toy_folder`, then with `a.b=value` overrides."""
    return load_toml(CONFIG, RankerTraining, (*_paths(folder), *overrides))


def toy_encoder(folder: Path, *overrides: str) -> EncoderTraining:
    """Returns settings of a short contrastive run on the toy data."""
    tree = (
        "steps=4", "save_every=2", "freeze_embeddings=true", "optimiser.learning_rate=1e-3",
        "data.pairs_per_batch=4", "data.tokens_per_batch=520",
        "data.max_prefix_tokens=104", "data.max_item_tokens=24", "evaluation.every=2",
        "evaluation.k=0",
    )  # fmt: skip
    empty = folder / "empty.toml"
    empty.touch()
    return load_toml(empty, EncoderTraining, (*_paths(folder), *tree, *overrides))


def _paths(folder: Path) -> tuple[str, ...]:
    return (
        f"model={folder}/tiny",
        f"data.items={folder}/items.jsonl",
        f"data.queries={folder}/train.jsonl",
        f"evaluation.items={folder}/items.jsonl",
        f"evaluation.queries={folder}/dev.jsonl",
    )
