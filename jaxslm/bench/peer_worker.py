"""Runs in a peer's interpreter, as a script, with torch and transformers and without this package or jax.

Reads one JSON command a line on stdin, answers one JSON object a line on stdout:

    {"rows": FILE.npy, "prefix": P, "labels": [no, yes], "folder": HF_FOLDER, "classifier": HF_FOLDER, "threads": N,
     "dtype": "float32"}                                                                            once, first
    {"attention": "sdpa", "keep": 1, "batch": 10, "compile": false, "cross_encoder": false,
     "save": FILE.npy or null}                                                                      -> {"seconds": s}

`keep` is transformers' `logits_to_keep`: 1 asks for the last token's logits only, 0 for those of every token.
`cross_encoder` calls `CrossEncoder.predict` of sentence-transformers with (query, item) as text, the first P tokens of
a row being the query, each token the word `<number>`; it does its own tokenisation, and only `batch` applies.
"""

import importlib.metadata
import json
import sys
import time
from contextlib import suppress
from typing import Any

# The folder of this script comes first, and its `kernels.py` would stand for the package that transformers looks for.
sys.path.pop(0)

import numpy as np
import torch
from transformers import AutoModelForCausalLM


class Worker:
    """One model, loaded once per attention implementation and compilation mode."""

    def __init__(self, setup: dict[str, Any]) -> None:
        if setup["threads"]:
            torch.set_num_threads(setup["threads"])
        self.folder, self.labels = setup["folder"], setup["labels"]
        self.dtype = getattr(torch, setup["dtype"])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        rows = np.load(setup["rows"])
        self.rows = torch.from_numpy(rows).to(self.device)
        self.pairs = [(words(row[: setup["prefix"]]), words(row[setup["prefix"] :])) for row in rows]
        self.classifier = setup["classifier"]
        self.models: dict[tuple[str, bool], Any] = {}
        self.encoder: Any = None

    def model(self, attention: str, compiled: bool) -> Any:
        if (attention, compiled) not in self.models:
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.folder, attn_implementation=attention, dtype=self.dtype
            )
            model = model.to(self.device).eval()
            self.models[attention, compiled] = torch.compile(model) if compiled else model
        return self.models[attention, compiled]

    def run(self, cross_encoder: bool, batch: int, save: str | None, **call: Any) -> dict[str, Any]:
        start, scores = self.predict(batch) if cross_encoder else self.forward(batch, **call)
        seconds = time.perf_counter() - start
        if save:
            np.save(save, scores)
        return {"seconds": seconds}

    def predict(self, batch: int) -> tuple[float, np.ndarray]:
        """Returns when the call began, the model being loaded, and its logits."""
        if self.encoder is None:
            from sentence_transformers import CrossEncoder

            loaded = {"dtype": self.dtype}
            self.encoder = CrossEncoder(self.classifier, device=self.device, model_kwargs=loaded)
        start = time.perf_counter()
        identity = torch.nn.Identity()
        return start, self.encoder.predict(
            self.pairs, batch_size=batch, activation_fn=identity, show_progress_bar=False
        )

    def forward(self, batch: int, attention: str, keep: int, compile: bool) -> tuple[float, np.ndarray]:
        """As `predict`, through transformers."""
        model = self.model(attention, compile)
        parts = []
        start = time.perf_counter()
        with torch.inference_mode():
            for rows in torch.split(self.rows, batch):
                logits = model(rows, logits_to_keep=keep, use_cache=False).logits if keep else model(rows).logits
                parts.append(logits[:, -1, self.labels].float().cpu())
        return start, torch.cat(parts).numpy()


def words(row: np.ndarray) -> str:
    return " ".join(f"<{number}>" for number in row)


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not reach the answers
    worker = Worker(json.loads(sys.stdin.readline()))
    versions = {}
    for name in ("torch", "transformers", "sentence-transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    print(json.dumps({"versions": versions, "device": worker.device}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = worker.run(**json.loads(line))
        except (RuntimeError, ValueError, ImportError) as error:  # a setting that this peer does not support
            answer = {"error": " ".join(str(error).split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
