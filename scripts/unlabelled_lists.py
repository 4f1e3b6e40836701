"""Queries that nobody judged, as lists that a teacher labels in recovery: a search log is all that it takes.

    python scripts/unlabelled_lists.py --encoder quickstart/encoder --queries titles.txt \\
        --judged quickstart/demo/jobs/train-mixed.jsonl --items quickstart/demo/jobs/items.jsonl \\
        --exclude quickstart/demo/jobs/bls.jsonl quickstart/demo/jobs/dev.jsonl --limit 2000 --out mixed.jsonl
    jaxslm train ranker --config configs/cpu-recover.toml --set data.queries=mixed.jsonl \\
        --set losses.binary_cross_entropy=0.0 --out recovered

The file holds the judged queries and these in one random order. A query that nobody judged lists the items nearest to
it by the contrastive stage, with label 0: `list_softmax` leaves such lists out, but `binary_cross_entropy` would learn
from them and must be 0. Prints one JSON object last.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxslm.atomic import new_file, refuse_existing
from jaxslm.checkpoint import load_checkpoint
from jaxslm.data_files import Item, read_items, read_queries
from jaxslm.demo.queries import words
from jaxslm.errors import InputError, exit_on_input_error
from jaxslm.score.bi_encoder import BiEncoder


def choose(log: Path, known: set[str], limit: int, generator: np.random.Generator) -> list[str]:
    """Returns up to `limit` different lines of the log, drawn at random, whose `words` are not in `known`."""
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{log}: cannot be read ({error})") from None
    fresh = sorted({line.strip() for line in lines if words(line) and words(line) not in known})
    if not fresh:
        raise InputError(f"{log}: no line that is not among the judged or excluded queries")
    return [fresh[place] for place in generator.choice(len(fresh), min(limit, len(fresh)), replace=False)]


def lists(texts: list[str], encoder: BiEncoder, pool: list[Item], count: int) -> list[dict[str, Any]]:
    """Returns each text as a query with the `count` items of the pool whose mean states are nearest to its own."""
    found = []
    for number, text in enumerate(texts):
        nearest = np.argsort(-encoder.score(text, pool))[:count]
        judged = [{"id": pool[place].id, "label": 0.0} for place in nearest]
        found.append({"query_id": f"unlabelled-{number}", "query": text, "items": judged})
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", type=Path, required=True, help="checkpoint of `jaxslm train encoder`")
    parser.add_argument("--queries", type=Path, required=True, help="text, one query a line")
    parser.add_argument(
        "--judged", type=Path, required=True, help="training queries; only items that they name are used"
    )
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument(
        "--exclude", type=Path, nargs="*", default=[], help="query files for evaluation, to be kept out"
    )
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--candidates", type=int, default=15, help="items of each list")
    parser.add_argument("--max-item-tokens", type=int, default=40, help="what the encoder reads of an item")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    refuse_existing(options.out)
    for name in ("limit", "candidates", "max_item_tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"{name}: {getattr(options, name)}, must be at least 1")
    items, judged = read_items(options.items), read_queries(options.judged)
    named = sorted({each.id for query in judged for each in query.items})
    if missing := [item_id for item_id in named if item_id not in items]:
        raise InputError(
            f"{options.judged}: names {len(missing)} items that {options.items} lacks, first {missing[0]!r}"
        )
    known = {words(query.query) for path in (options.judged, *options.exclude) for query in read_queries(path)}
    known |= {words(item.title) for item in items.values() if item.title}
    generator = np.random.default_rng(0)
    chosen = choose(options.queries, known, options.limit, generator)
    checkpoint = load_checkpoint(options.encoder)
    encoder = BiEncoder(
        checkpoint.config.model, checkpoint.prompt, jnp.dtype("float32"), max_item_tokens=options.max_item_tokens
    )
    encoder.load(checkpoint.params)
    made = lists(chosen, encoder, [items[item_id] for item_id in named], options.candidates)
    records = [query.model_dump() for query in judged] + made
    generator.shuffle(records)
    with new_file(options.out) as file:
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{len(chosen):,} queries that nobody judged, beside {len(judged):,}", file=sys.stderr)
    print(json.dumps({"queries": str(options.out), "judged": len(judged), "unlabelled": len(chosen)}))


if __name__ == "__main__":
    with exit_on_input_error("unlabelled_lists"):
        main()
