"""The MiniLM bi-encoder of the demo data, evaluated on the candidates of `jaxslm eval`: a baseline for trained rankers.

    python scripts/bi_encoder_baseline.py --demo demo --split dev --limit 400 --run-out minilm.run

Needs torch (not a dependency of the package). Prints one JSON object last, as `jaxslm eval` does.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxslm.data_files import Item
from jaxslm.errors import exit_on_input_error
from jaxslm.evaluate.candidates import document_text
from jaxslm.evaluate.checkpoints import read_split
from jaxslm.evaluate.rerank import evaluate_ranker, print_report
from jaxslm.evaluate.trec import write_run


class MiniLM:
    """all-MiniLM-L6-v2: mean of the final states over real tokens, then unit length (its model card)."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()
        self._items: dict[str, np.ndarray] = {}

    def encode(self, texts: list[str]) -> np.ndarray:
        """Returns unit vectors, float32 [len(texts), 384]; texts are cut at 256 tokens as the model was trained."""
        parts = []
        for start in range(0, len(texts), 64):
            batch = self._tokenizer(
                texts[start : start + 64], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            with self._torch.inference_mode():
                states: Any = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            parts.append(((states * mask).sum(1) / mask.sum(1)).numpy())
        vectors = np.concatenate(parts)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def add(self, items: list[Item]) -> None:
        """Encodes items once."""
        vectors = self.encode([document_text(item) for item in items])
        self._items |= {item.id: vector for item, vector in zip(items, vectors, strict=True)}

    def score(self, query: str, items: list[Item]) -> np.ndarray:
        """Returns the cosine of the query and each item."""
        return np.stack([self._items[item.id] for item in items]) @ self.encode([query])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True, help="folder of `jaxslm fetch-demo`")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--run-out", type=Path)
    arguments = parser.parse_args()
    items, queries = read_split(arguments.demo / "jobs", arguments.split)
    model = MiniLM(arguments.demo / "bi-encoder")
    model.add(list(items.values()))
    limit, k = arguments.limit, arguments.candidates
    report = evaluate_ranker(model.score, queries, items, k=k, limit=limit, name="MiniLM bi-encoder")
    print_report(report)
    if arguments.run_out:
        write_run(arguments.run_out, report.run, "minilm")
    print(json.dumps(report.to_result() | {"split": arguments.split}))


if __name__ == "__main__":
    with exit_on_input_error("bi_encoder_baseline"):
        main()
