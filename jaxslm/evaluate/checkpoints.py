"""`jaxslm eval`: a checkpoint on a folder of data, beside BM25 on the same candidates."""

from pathlib import Path
from typing import Any

from jaxslm.atomic import refuse_existing
from jaxslm.data_files import Item, Query, read_items, read_queries
from jaxslm.errors import InputError
from jaxslm.evaluate.rerank import Report, evaluate_ranker, print_report
from jaxslm.evaluate.trec import write_run
from jaxslm.score.scorer import Ranker, load


def read_split(data: Path, split: str) -> tuple[dict[str, Item], list[Query]]:
    """Returns the items of a data folder and the queries of `split`, from JSON Lines or Parquet.

    Raises:
        InputError: a file is missing or breaks its schema.
    """
    return read_items(_data_file(data, "items")), read_queries(_data_file(data, split))


def evaluate_loaded(
    ranker: Ranker, data: Path, split: str, *, name: str, candidates: int = 50, limit: int | None = None
) -> Report:
    """Ranks the candidates of a split's queries by log-odds: the order of P(yes), but without ties near 0 and 1."""
    items, queries = read_split(data, split)

    def score(query: str, chosen: list[Item]) -> Any:
        return ranker.score_request(query, chosen).log_odds

    return evaluate_ranker(score, queries, items, k=candidates, limit=limit, name=name)


def evaluate_checkpoint(
    model: Path, data: Path, split: str, *, candidates: int = 50, limit: int | None = None, run_out: Path | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint, prints the table and returns a result file (DESIGN: rows and conditions) as a dict.

    Raises:
        InputError: `run_out` exists, or the checkpoint or the data break a rule.
    """
    if run_out is not None:
        refuse_existing(run_out)
    for stem in ("items", split):
        _data_file(data, stem)  # missing files are told before the model loads
    report = evaluate_loaded(load(model), data, split, name=model.name, candidates=candidates, limit=limit)
    print_report(report)
    if run_out is not None:
        write_run(run_out, report.run, model.name)
    return report.to_result() | {"data": str(data), "split": split}


def _data_file(data: Path, stem: str) -> Path:
    found = [path for path in (data / f"{stem}.jsonl", data / f"{stem}.parquet") if path.is_file()]
    if not found:
        raise InputError(f"{data}: holds neither {stem}.jsonl nor {stem}.parquet")
    return found[0]
