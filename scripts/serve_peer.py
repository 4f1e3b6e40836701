"""A peer to compare with: `sentence-transformers`' CrossEncoder behind FastAPI, serving a ranker that we export.

Runs in an interpreter of its own, with torch and without this package:

    python3.11 -m venv peer && peer/bin/pip install torch sentence-transformers fastapi uvicorn
    jaxslm export --model ranker --format hf --classifier --out ranker-hf
    peer/bin/python scripts/serve_peer.py ranker-hf --port 8001

It answers `/v1/score` (query and items as texts) and `/rerank`, so that `jaxslm bench serve --workload text_300` sends
it what it sends to `jaxslm serve`. It is what a team writes in an afternoon: requests are scored one after the other in
padded batches, and the prompt is repeated for every item.
"""

import argparse
import json
import re
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Response
from sentence_transformers import CrossEncoder


class Peer:
    """The model, and the prompt that its card states."""

    def __init__(self, folder: Path, dtype: str, batch: int) -> None:
        self.model = CrossEncoder(str(folder), model_kwargs={"dtype": dtype}, activation_fn=torch.nn.Identity())
        card = re.search(r"```json\n(.*?)\n```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        assert card, "the folder's README.md states no prompt: make it with `jaxslm export --classifier`"
        head, tail = json.loads(card[1]).split(" {item}")
        self.before, self.after_query = head.split(" {query}")
        self.tail, self.batch, self.lock = tail, batch, threading.Lock()

    def score(self, query: str, items: list[str]) -> tuple[list[float], int]:
        """Returns z_yes - z_no per item, and the tokens of the request with those of the query once."""
        head = f"{self.before} {query.strip()}{self.after_query}"
        tails = [f" {item.strip()}{self.tail}" for item in items]
        with self.lock:
            logits = self.model.predict([(head, tail) for tail in tails], batch_size=self.batch).tolist()
        ids = self.model.tokenizer([head, *tails], add_special_tokens=False)["input_ids"]
        return logits, sum(map(len, ids))


def create_app(peer: Peer) -> FastAPI:
    """Returns the application."""
    app = FastAPI()

    @app.post("/v1/score")
    def score(body: dict[str, Any], response: Response) -> dict[str, Any]:
        logits, tokens = peer.score(body["query"], body["items"])
        response.headers["x-compute-tokens"] = str(tokens)
        yes = torch.sigmoid(torch.tensor(logits)).tolist()
        return {"scores": [[1 - p, p] for p in yes], "logits": logits, "model": "peer"}

    @app.post("/rerank")
    def rerank(body: dict[str, Any]) -> dict[str, Any]:
        logits, _ = peer.score(body["query"], body["documents"])
        yes = torch.sigmoid(torch.tensor(logits)).tolist()
        order = sorted(range(len(yes)), key=lambda place: -yes[place])[: body.get("top_n")]
        return {"results": [{"index": place, "relevance_score": yes[place]} for place in order]}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of `jaxslm export --classifier`")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=32, help="items that are computed together")
    options = parser.parse_args()
    uvicorn.run(create_app(Peer(options.folder, options.dtype, options.batch)), port=options.port, log_level="warning")
