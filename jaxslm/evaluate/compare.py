"""`jaxslm compare`: two TREC runs over the same queries, with paired intervals."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from jaxslm.data_files import read_queries
from jaxslm.errors import InputError
from jaxslm.evaluate.agreement import kendall_tau, tau_by_query
from jaxslm.evaluate.checkpoints import data_file
from jaxslm.evaluate.metrics import CONVENTIONS, MEASURES, Estimate, Labels, Run, evaluate_run, labels_of
from jaxslm.evaluate.significance import PairedDifference, compare_runs, paired_bootstrap
from jaxslm.evaluate.trec import read_run
from jaxslm.progress import console


def compare_run_files(
    first: Path, second: Path, data: Path, split: str, reference: Path | None = None
) -> dict[str, Any]:
    """Compares the runs of two files (`jaxslm eval --run-out`), prints a table and returns it as a JSON-able dict.

    Each measure: both means over the queries that the runs answer, their difference, its 95 % interval (paired
    bootstrap), and the share of resamples in which the first run is not better. "No loss" is this interval. Beside
    them, how alike the runs order the items that both score (`kendall_tau`); None where they cannot be compared.

    Args:
        reference: a run, for example the dense ranker's, whose order both are to keep: the result has the tau of each
            to it, and their paired difference, as `kendall_tau_to_reference` (else None).

    Raises:
        InputError: a file is missing or broken, a run answers no query of the split, none of those that it answers has
            a relevant item, the runs answer different ones, or none can be compared with the reference's.
    """
    judged_in = data_file(data, split)
    labels = labels_of(read_queries(judged_in))
    runs = [read_run(first), read_run(second)]
    for path, run in zip((first, second), runs, strict=True):
        _tell_unjudged(path, run, labels, judged_in)
    differences = {measure: compare_runs(labels, runs[0], runs[1], measure) for measure in MEASURES}
    answered = {query_id: judged for query_id, judged in labels.items() if runs[0].get(query_id)}
    means = [evaluate_run(answered, run, resamples=1).estimates for run in runs]
    tau = kendall_tau(*runs)
    kept = None if reference is None else _kept_order(runs, reference)
    console().print(_table(first, second, means, differences, tau))
    if kept is not None:
        console().print(_kept_line(kept), markup=False, soft_wrap=True)
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
        "kendall_tau_to_reference": kept,
        "conventions": CONVENTIONS,
    }


def _tell_unjudged(path: Path, run: Run, labels: Labels, judged_in: Path) -> None:
    """Says how many queries of a run the split lacks. Raises InputError if it has none of them: it is another split."""
    unjudged = run.keys() - labels.keys()
    if not unjudged:
        return
    whole = f"the {len(run):,} queries of {path}"
    if len(unjudged) == len(run):
        raise InputError(f"{judged_in}: holds none of {whole}")
    line = f"{judged_in}: lacks {len(unjudged):,} of {whole}, which are left out"
    console().print(line, markup=False, soft_wrap=True)


def _kept_order(runs: Sequence[Run], reference: Path) -> dict[str, Any]:
    target = read_run(reference)
    taus = [tau_by_query(run, target) for run in runs]
    shared = taus[0].keys() & taus[1].keys()
    if not shared:
        raise InputError(f"{reference}: no query whose order both runs can be compared with")
    a, b = ({query_id: each[query_id] for query_id in sorted(shared)} for each in taus)
    found = paired_bootstrap(a, b)
    return {
        "reference": str(reference),
        "queries": found.queries,
        "first": fmean(a.values()),
        "second": fmean(b.values()),
        "difference": found.mean,
        "ci95": [found.low, found.high],
    }


def _kept_line(kept: dict[str, Any]) -> str:
    low, high = kept["ci95"]
    return (
        f"Kendall's tau to {kept['reference']}: {kept['first']:.3f} and {kept['second']:.3f}, "
        f"difference {kept['difference']:+.3f} [{low:+.3f}, {high:+.3f}], {kept['queries']:,} queries"
    )


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
