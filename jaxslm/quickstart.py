"""`jaxslm quickstart`: real postings scored by a real model, each stage in words, finished stages reused."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxslm.atomic import new_file
from jaxslm.demo import fetch_demo
from jaxslm.errors import InputError
from jaxslm.progress import console

INSTRUCTION = "Judge whether the job posting is what the searcher is looking for."
CANDIDATES, QUERIES = 50, 12
MODEL_NAME = "SmolLM2-135M, untrained for ranking"


def run(out: Path, fetch: Callable[[Path], dict[str, Any]] = fetch_demo) -> dict[str, Any]:
    """Fetches the demo, converts the model, evaluates it on a sample of queries; returns the result file.

    Everything lies under `out`; a stage whose result is there is not repeated.

    Args:
        fetch: fills the data folder and returns what `jaxslm.demo.fetch_demo` does.

    Raises:
        InputError: no network, or a folder that is not this program's.
    """
    data, model, results = out / "demo", out / "smollm2", out / "results.json"
    _fetch(data, fetch)
    _convert(data, model)
    _show(model)
    if not results.is_file():
        _evaluate(data / "jobs", model, results)
    else:
        _say(4, f"{results} is there: showing it. Remove the file to measure again.")
    try:
        content: dict[str, Any] = json.loads(results.read_bytes())
        console().print(_table(content))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{results}: damaged ({error!r}); remove it") from None
    _closing(out)
    return content


def _say(stage: int, text: str) -> None:
    console().print(f"[bold]{stage}/4[/bold] {text}")


def _fetch(data: Path, fetch: Callable[[Path], dict[str, Any]]) -> None:
    _say(1, "Data: 923 occupations as job postings (O*NET), and titles that people search for (BLS); a small model.")
    counts = fetch(data)["counts"]
    shown = ("items", "train_task_queries", "train_dwa_queries", "dev_queries", "bls_queries")
    console().print("    " + ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in shown))


def _convert(data: Path, model: Path) -> None:
    from jaxslm.checkpoint import load_manifest
    from jaxslm.convert import convert

    _say(2, "Model: SmolLM2-135M-Instruct, from a 4-bit GGUF file to a checkpoint. About 20 seconds.")
    if (model / "manifest.json").is_file():
        load_manifest(model)
        console().print(f"    {model} is there.")
        return
    [gguf] = (data / "model").glob("*.gguf")
    convert(str(gguf), model, template="yes-no", instruction=INSTRUCTION)


def _show(model: Path) -> None:
    from jaxslm.inspect import describe, print_card

    _say(3, "What that is:")
    print_card(describe(model))


def _evaluate(jobs: Path, model: Path, results: Path) -> None:
    from jaxslm.evaluate.checkpoints import evaluate_loaded
    from jaxslm.score.scorer import load

    _say(
        4,
        f"Ranking: for {QUERIES} searched titles, BM25 proposes {CANDIDATES} postings (and the right ones are added);"
        " the model reads each and answers yes or no; P(yes) orders them. About five minutes on two cores.",
    )
    start = time.perf_counter()
    ranker = load(model)
    _show_example(ranker)
    report = evaluate_loaded(ranker, jobs, "bls", name=MODEL_NAME, candidates=CANDIDATES, limit=QUERIES)
    content = report.to_result()
    content["conditions"] |= {
        "split": "bls",
        "params_sha256": ranker.manifest.params_sha256,
        "dtype": str(ranker.dtype),
        "versions": ranker.manifest.versions,
        "seconds_with_loading_and_compiling": round(time.perf_counter() - start, 1),
    }
    with new_file(results) as staging:
        staging.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _show_example(ranker: Any) -> None:
    query = "python developer"
    texts = ["Writes web services in Python and reviews code.", "Drives a truck across the country."]
    for text, probability in zip(texts, ranker.score(query, texts), strict=True):
        console().print(f"    P(yes) = {probability:.3f} for '{query}' and '{text}'")


def _table(content: dict[str, Any]) -> Table:
    conditions = content["conditions"]
    table = Table(
        title="Ranking quality, mean [95 % interval]",
        title_justify="left",
        caption=f"{conditions['queries']} BLS titles, {conditions['candidates']} candidates"
        f" ({conditions['candidate_list']}). {conditions['conventions']}",
        caption_justify="left",
    )
    for column in ("ranker", "nDCG@10", "MRR@10", "Recall@10", "items/s"):
        table.add_column(column, justify="left" if column == "ranker" else "right")
    for row in content["rows"]:
        low, high = row["ndcg_ci95"]
        speed = f"{row['items_per_s']:.1f}" if "items_per_s" in row else ""
        quality = f"{row['ndcg_at_10']:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(row["name"], quality, f"{row['rr_at_10']:.3f}", f"{row['recall_at_10']:.3f}", speed)
    return table


def _closing(out: Path) -> None:
    console().print(
        "The model was never taught to rank, and it shows: that is what training is for. Next, for example:\n"
        f"    jaxslm score --model {out}/smollm2 --input requests.jsonl --output scores.jsonl\n"
        f"    jaxslm eval --model {out}/smollm2 --data {out}/demo/jobs --split dev --limit 50"
    )
