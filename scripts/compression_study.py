"""Embedding tokens against full text: nDCG@10 with paired intervals, tokens, speed, int8 records, slices.

    python scripts/compression_study.py --data demo/jobs --out study compressed compressed-last compressed-no-teacher
    python scripts/compression_study.py --data demo/jobs --split bls --full-text ranker --out study-bls compressed

Each argument is a checkpoint of `jaxslm train compressor`, an arm of the study; all are compared with the ranker of
--full-text, or with what the first one's ranker has become. Writes OUT/compression.json, a result file of `jaxslm
report`, which draws it.
"""

import argparse
import json
from pathlib import Path

from jaxslm.atomic import new_folder
from jaxslm.errors import exit_on_input_error
from jaxslm.evaluate.checkpoints import read_split
from jaxslm.evaluate.compression import study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--data", type=Path, required=True, help="folder with items and queries")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--full-text", type=Path, metavar="CHECKPOINT", help="the ranker that the arms were made from")
    parser.add_argument("--limit", type=int, help="queries, a fixed sample; all if not given")
    parser.add_argument("--candidates", type=int, default=50, help="BM25 candidates beside the judged items")
    parser.add_argument("--repeats", type=int, default=3, help="warm passes of the speed measurement")
    options = parser.parse_args()
    with new_folder(options.out) as folder:
        items, queries = read_split(options.data, options.split)
        result = study(
            options.arms,
            items,
            queries,
            full_text=options.full_text,
            candidates=options.candidates,
            limit=options.limit,
            repeats=options.repeats,
        )
        result |= {"data": str(options.data), "split": options.split}
        (folder / "compression.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows = [{name: row[name] for name in ("name", "ndcg_at_10", "minus_text", "items_per_s")} for row in result["rows"]]
    print(json.dumps({"out": str(options.out), "rows": rows}))


if __name__ == "__main__":
    with exit_on_input_error("compression_study"):
        main()
