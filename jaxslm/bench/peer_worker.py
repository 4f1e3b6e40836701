"""Runs in a peer's interpreter, as a script, with torch and transformers and without this package or jax.

Reads one JSON command a line on stdin, answers one JSON object a line on stdout:

    {"rows": FILE.npy, "labels": [no, yes], "folder": HF_FOLDER, "threads": N, "dtype": "float32"}    once, first
    {"attention": "sdpa", "keep": 1, "batch": 10, "compile": false, "save": FILE.npy or null}       -> {"seconds": s}

`keep` is transformers' `logits_to_keep`: 1 asks for the last token's logits only, 0 for those of every token.
"""

import importlib.metadata
import json
import sys
import time
from typing import Any

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
        self.rows = torch.from_numpy(np.load(setup["rows"])).to(self.device)
        self.models: dict[tuple[str, bool], Any] = {}

    def model(self, attention: str, compiled: bool) -> Any:
        if (attention, compiled) not in self.models:
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.folder, attn_implementation=attention, dtype=self.dtype
            )
            model = model.to(self.device).eval()
            self.models[attention, compiled] = torch.compile(model) if compiled else model
        return self.models[attention, compiled]

    def run(self, attention: str, keep: int, batch: int, compile: bool, save: str | None) -> dict[str, Any]:
        model = self.model(attention, compile)
        parts = []
        start = time.perf_counter()
        with torch.inference_mode():
            for rows in torch.split(self.rows, batch):
                logits = model(rows, logits_to_keep=keep, use_cache=False).logits if keep else model(rows).logits
                parts.append(logits[:, -1, self.labels].float().cpu())
        seconds = time.perf_counter() - start
        if save:
            np.save(save, torch.cat(parts).numpy())
        return {"seconds": seconds}


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not reach the answers
    worker = Worker(json.loads(sys.stdin.readline()))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    print(json.dumps({"versions": versions, "device": worker.device}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = worker.run(**json.loads(line))
        except (RuntimeError, ValueError, ImportError) as error:  # a setting that this peer does not support
            answer = {"error": " ".join(str(error).split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
