"""`jaxslm compare`: two TREC runs over the same queries, with paired intervals."""

from pathlib import Path
from typing import Any

from rich.table import Table

from jaxslm.data_files import read_queries
from jaxslm.evaluate.agreement import kendall_tau
from jaxslm.evaluate.checkpoints import data_file
from jaxslm.evaluate.metrics import CONVENTIONS, MEASURES, Estimate, evaluate_run, labels_of
from jaxslm.evaluate.significance import PairedDifference, compare_runs
from jaxslm.evaluate.trec import read_run
from jaxslm.progress import console


def compare_run_files(first: Path, second: Path, data: Path, split: str) -> dict[str, Any]:
    """Compares the runs of two files (`jaxslm eval --run-out`), prints a table and returns it as a JSON-able dict.

    Each measure: both means over the queries that the runs answer, their difference, its 95 % interval (paired
    bootstrap), and the share of resamples in which the first run is not better. "No loss" is this interval. Beside
    them, how alike the runs order the items that both score (`kendall_tau`); None where they cannot be compared.

    Raises:
        InputError: a file is missing or broken, no judged query has a relevant item, or the runs answer different
            queries.
    """
    labels = labels_of(read_queries(data_file(data, split)))
    runs = [read_run(first), read_run(second)]
    differences = {measure: compare_runs(labels, runs[0], runs[1], measure) for measure in MEASURES}
    answered = {query_id: judged for query_id, judged in labels.items() if runs[0].get(query_id)}
    means = [evaluate_run(answered, run, resamples=1).estimates for run in runs]
    tau = kendall_tau(*runs)
    console().print(_table(first, second, means, differences, tau))
    return {
        "first": str(first),
        "second": str(second),
        "queries": differences["ndcg_at_10"].queries,
        "measures": {
            measure: {
                "first": means[0][measure].mean,
                "second": means[1][measure].mean,
                "difference": found.mean,
                "ci95": [found.low, found.high],
                "share_not_better": found.share_not_better,
            }
            for measure, found in differences.items()
        },
        "kendall_tau": None if tau is None else {"mean": tau.mean, "ci95": [tau.low, tau.high]},
        "conventions": CONVENTIONS,
    }


def _table(
    first: Path, second: Path, means: list[Any], differences: dict[str, PairedDifference], tau: Estimate | None
) -> Table:
    alike = "" if tau is None else f"the same order: Kendall's tau {tau.mean:.3f} [{tau.low:.3f}, {tau.high:.3f}]\n"
    queries = differences["ndcg_at_10"].queries
    table = Table(
        title=f"{first.name} minus {second.name}, {queries:,} queries",
        title_justify="left",
        caption=alike + CONVENTIONS,
        caption_justify="left",
    )
    for column in ("measure", first.name, second.name, "difference [95 % interval]"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for measure, found in differences.items():
        interval = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        table.add_row(MEASURES[measure], *(f"{each[measure].mean:.4f}" for each in means), interval)
    return table
