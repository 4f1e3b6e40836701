"""How good the rankers of a quickstart are, on more queries than it measures and on other splits.

    python scripts/quality_study.py --quickstart quickstart --splits dev bls dev-titles --limit 200 --out quality

Writes `quality/result.json`: nDCG@10 of every ranker, and of the contrastive stage as a bi-encoder, within BM25's top
and the judged items; the difference to full text is paired by query; intervals are 95 %. Beside it is a file for each
ranker and split with nDCG@10 by query; what is there is not computed again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxslm.atomic import new_file
from jaxslm.config import validate
from jaxslm.demo import fetch_demo
from jaxslm.errors import InputError, exit_on_input_error
from jaxslm.quickstart.measure import quality
from jaxslm.quickstart.pipeline import Pipeline
from jaxslm.quickstart.settings import MeasureSettings, QuickstartSettings
from jaxslm.score.parallel import device_name


def study(pipeline: Pipeline, splits: Sequence[str], settings: MeasureSettings, out: Path) -> Path:
    """Measures the rankers of a quickstart on these splits; returns the result file in `out`.

    Raises:
        InputError: the quickstart has not come so far, a split is not there, or a file in `out` is damaged.
    """
    if not pipeline.encoded.exists():
        raise InputError(f"{pipeline.encoded}: missing; this is of a quickstart that has encoded its postings")
    rows = []
    for split in splits:
        pipeline.evaluate(split, settings, out / split)
        of_split, conditions = quality(pipeline.contestants(), out / split)
        rows += [row | {"name": f"{row['name']}, {split}", "queries": conditions["queries"]} for row in of_split]
    said = {name: conditions[name] for name in ("candidate_list", "conventions")}
    said |= {"date": time.strftime("%Y-%m-%d"), "device": device_name(), "jax": jax.__version__}
    path = out / "result.json"
    path.unlink(missing_ok=True)
    with new_file(path) as staging:
        staging.write_text(json.dumps({"rows": rows, "conditions": said}, indent=1) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quickstart", type=Path, required=True, metavar="FOLDER", help="what `jaxslm quickstart` made"
    )
    parser.add_argument("--splits", nargs="+", default=["dev", "bls", "dev-titles"])
    parser.add_argument("--limit", type=int, default=200, help="queries a split, a fixed sample; all if it has fewer")
    parser.add_argument("--candidates", type=int, default=20, help="BM25 candidates beside the judged items")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="to write; goes on where it was stopped"
    )
    options = parser.parse_args()
    settings = validate(MeasureSettings, {"queries": options.limit, "candidates": options.candidates}, "options")
    pipeline = Pipeline(options.quickstart, fetch_demo, QuickstartSettings())
    path = study(pipeline, options.splits, settings, options.out)
    rows = [{name: row[name] for name in ("name", "ndcg_at_10")} for row in json.loads(path.read_bytes())["rows"]]
    print(json.dumps({"out": str(path), "rows": rows}))


if __name__ == "__main__":
    with exit_on_input_error("quality_study"):
        main()
