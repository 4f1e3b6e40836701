"""How good the rankers of a quickstart are, on more queries than it measures and on other splits.

    python scripts/quality_study.py --quickstart quickstart --splits dev bls dev-titles --limit 200 --out quality

Writes `quality/result.json`: nDCG@10 of every ranker, and of the contrastive stage as a bi-encoder, within BM25's top
and the judged items; the difference to full text is paired by query; intervals are 95 %. Beside it is a file for each
ranker and split with nDCG@10 by query.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxslm.atomic import new_folder
from jaxslm.config import validate
from jaxslm.demo import fetch_demo
from jaxslm.errors import InputError, exit_on_input_error
from jaxslm.quickstart.measure import quality
from jaxslm.quickstart.pipeline import Pipeline
from jaxslm.quickstart.settings import MeasureSettings, QuickstartSettings
from jaxslm.score.parallel import device_name


def study(pipeline: Pipeline, splits: Sequence[str], settings: MeasureSettings, out: Path) -> dict[str, Any]:
    """Measures the rankers of a quickstart on these splits; returns the result, which it writes into a new folder.

    Raises:
        InputError: the quickstart has not come so far, a split is not there, or `out` is.
    """
    if not pipeline.encoded.exists():
        raise InputError(f"{pipeline.encoded}: missing; this is of a quickstart that has encoded its postings")
    rows = []
    with new_folder(out) as folder:
        for split in splits:
            pipeline.evaluate(split, settings, folder / split)
            of_split, conditions = quality(pipeline.contestants(), folder / split)
            rows += [row | {"name": f"{row['name']}, {split}", "queries": conditions["queries"]} for row in of_split]
        said = {name: conditions[name] for name in ("candidate_list", "conventions")}
        said |= {"date": time.strftime("%Y-%m-%d"), "device": device_name(), "jax": jax.__version__}
        result = {"rows": rows, "conditions": said}
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quickstart", type=Path, required=True, metavar="FOLDER", help="what `jaxslm quickstart` made"
    )
    parser.add_argument("--splits", nargs="+", default=["dev", "bls", "dev-titles"])
    parser.add_argument("--limit", type=int, default=200, help="queries a split, a fixed sample; all if it has fewer")
    parser.add_argument("--candidates", type=int, default=20, help="BM25 candidates beside the judged items")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to write; must not exist")
    options = parser.parse_args()
    settings = validate(MeasureSettings, {"queries": options.limit, "candidates": options.candidates}, "options")
    pipeline = Pipeline(options.quickstart, fetch_demo, QuickstartSettings())
    result = study(pipeline, options.splits, settings, options.out)
    rows = [{name: row[name] for name in ("name", "ndcg_at_10")} for row in result["rows"]]
    print(json.dumps({"out": str(options.out), "rows": rows}))


if __name__ == "__main__":
    with exit_on_input_error("quality_study"):
        main()
