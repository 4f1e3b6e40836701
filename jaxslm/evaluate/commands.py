"""The verbs `eval`, `compare`, `report` and `calibrate`; like all verbs they import what they need when they run."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jaxslm.options import Checkpoint, NewPath, ScoringDtype
from jaxslm.progress import answer

measuring = typer.Typer()


@measuring.command("eval")
def evaluate(
    model: Checkpoint,
    data: Annotated[Path, typer.Option("--data", help="Folder with items.jsonl and the split's queries.")],
    split: Annotated[str, typer.Option(help="Queries to use: DATA/SPLIT.jsonl or .parquet.")] = "dev",
    candidates: Annotated[int, typer.Option(min=0, help="BM25 candidates per query, beside the judged items.")] = 50,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many queries, a fixed sample.")] = None,
    run_out: Annotated[Path | None, typer.Option("--run-out", help="Write a TREC run; must not exist.")] = None,
    mode: Annotated[
        Literal["text", "compressed", "bi-encoder"],
        typer.Option(help="compressed: items from --store; bi-encoder: cosines, for a checkpoint of `train encoder`."),
    ] = "text",
    store: Annotated[str | None, typer.Option("--store", metavar="URL", help="What `jaxslm encode` filled.")] = None,
    max_item_tokens: Annotated[
        int | None, typer.Option(min=1, help="What a bi-encoder reads of an item; by default as much as a row holds.")
    ] = None,
    dtype: ScoringDtype = None,
) -> None:
    """Re-rank BM25 candidates and report nDCG@10, MRR@10 and Recall@10 beside BM25's own.

    Example: jaxslm eval --model smollm2 --data demo/jobs --split bls --limit 20
    """
    from jaxslm.evaluate.checkpoints import evaluate_checkpoint
    from jaxslm.score.warmup import keep_compiled_programs

    keep_compiled_programs()
    answer(
        evaluate_checkpoint(
            model,
            data,
            split,
            mode=mode,
            store=store,
            max_item_tokens=max_item_tokens,
            candidates=candidates,
            limit=limit,
            run_out=run_out,
            dtype=dtype,
        )
    )


@measuring.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A TREC run, from `jaxslm eval --run-out`.")],
    second: Annotated[Path, typer.Argument(help="Another one over the same queries.")],
    data: Annotated[Path, typer.Option("--data", help="Folder with the split's queries.")],
    split: Annotated[str, typer.Option(help="Judgements to use: DATA/SPLIT.jsonl or .parquet.")] = "dev",
    reference: Annotated[
        Path | None, typer.Option(help="A run whose order both should keep: Kendall's tau of each to it.")
    ] = None,
) -> None:
    """Compare two runs query by query: differences of nDCG@10, MRR@10 and Recall@10 with 95 % intervals.

    Example: jaxslm compare ranker.run encoder.run --data demo/jobs --split dev
    """
    from jaxslm.evaluate.compare import compare_run_files

    answer(compare_run_files(first, second, data, split, reference))


@measuring.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Result files (JSON) of eval, bench and the recipes.")],
    out: NewPath,
) -> None:
    """Turn result files into Markdown, plots (SVG, PNG) and one HTML page.

    Example: jaxslm report results.json serve.json --out report
    """
    from jaxslm.evaluate.report import write_report

    answer({"report": str(write_report(results, out))})


@measuring.command()
def calibrate(
    model: Checkpoint,
    data: Annotated[Path, typer.Option("--data", help="Folder with items.jsonl and the split's queries.")],
    out: NewPath,
    split: Annotated[str, typer.Option(help="Held-out queries: DATA/SPLIT.jsonl or .parquet.")] = "dev",
    method: Annotated[Literal["platt", "temperature"], typer.Option(help="Scale and bias, or scale alone.")] = "platt",
    candidates: Annotated[int, typer.Option(min=0, help="BM25 candidates per query, beside the judged items.")] = 50,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many queries, a fixed sample.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Reliability before and after: .svg or .png to write.")] = None,
) -> None:
    """Copy a checkpoint with a calibration of its probabilities: fitted on half of the queries, measured on the rest.

    Example: jaxslm calibrate --model ranker --data demo/jobs --split dev --limit 100 --out calibrated
    """
    from jaxslm.evaluate.calibrate import calibrate_checkpoint
    from jaxslm.score.warmup import keep_compiled_programs

    keep_compiled_programs()
    answer(calibrate_checkpoint(model, data, out, split, method=method, k=candidates, limit=limit, plot=plot))
