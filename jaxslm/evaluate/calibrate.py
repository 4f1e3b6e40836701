"""`jaxslm calibrate`: a scale for a checkpoint's probabilities, fitted on held-out pairs and measured on others."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from jaxslm.atomic import refuse_unwritable
from jaxslm.checkpoint import copy_calibrated
from jaxslm.config import Calibration
from jaxslm.data_files import Item, Query
from jaxslm.errors import InputError
from jaxslm.evaluate.calibration import CalibrationReport, calibration_report, fit_platt, fit_temperature
from jaxslm.evaluate.candidates import candidates
from jaxslm.evaluate.checkpoints import read_split
from jaxslm.evaluate.metrics import Run, labels_of, stable_hash
from jaxslm.evaluate.reliability import check_plot, reliability, write_plot
from jaxslm.evaluate.rerank import Score, sample_queries, score_candidates
from jaxslm.progress import console

FITS = {"platt": fit_platt, "temperature": fit_temperature}
MEASURES = ("ece", "brier", "nll")


@dataclass(frozen=True)
class Pairs:
    """Scored pairs: `logits` z_yes - z_no and `labels` in [0, 1], float64 [n]."""

    logits: np.ndarray
    labels: np.ndarray


def calibrate_checkpoint(
    model: Path,
    data: Path,
    out: Path,
    split: str,
    *,
    method: Literal["platt", "temperature"] = "platt",
    k: int = 50,
    limit: int | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Writes a copy of a checkpoint that carries a calibration; returns what it is worth, as a result file.

    Half of the split's queries (by a hash of their ids) fit it, the other half measure it before and after. A query's
    pairs are its judged items and BM25's best `k`, those without a judgement as irrelevant: what a search engine
    scores.

    Args:
        k: length of the BM25 list; 0 takes judged pairs alone. limit: use only this many queries, a fixed sample.
        plot: reliability before and after, .svg or .png.

    Raises:
        InputError: an output exists or cannot be created, files break a rule, or the pairs cannot be fitted.
    """
    refuse_unwritable(out)
    if plot is not None:
        check_plot(plot)
    items, queries = read_split(data, split)
    from jaxslm.score.scorer import load

    fitting, measuring = held_out_pairs(load(model).log_odds, sample_queries(queries, limit), items, k)
    calibration = FITS[method](fitting.logits, fitting.labels)
    reports = {
        "before": calibration_report(Calibration().apply(measuring.logits), measuring.labels),
        "after": calibration_report(calibration.apply(measuring.logits), measuring.labels),
    }
    console().print(_table(calibration, reports))
    numbers = {when: {name: getattr(report, name) for name in MEASURES} for when, report in reports.items()}
    if plot is not None:
        write_plot(plot, reliability(reports))
    copy_calibrated(model, out, calibration, {f"calibrated_{name}": numbers["after"][name] for name in MEASURES})
    return {
        "checkpoint": str(out),
        "calibration": calibration.model_dump(),
        "pairs_fitted": len(fitting.labels),
        "pairs_measured": len(measuring.labels),
        **numbers,
        "rows": [
            {"name": f"{model.name}, {when} calibration", "calibration": asdict(report)}
            for when, report in reports.items()
        ],
        "plot": None if plot is None else str(plot),
    }


def held_out_pairs(score: Score, queries: Sequence[Query], items: Mapping[str, Item], k: int) -> tuple[Pairs, Pairs]:
    """Returns (pairs to fit on, pairs to measure on): every query is on one side, whatever order the file has.

    Raises:
        InputError: a side gets no query, or as `candidates` and `score_candidates`.
    """
    sides = [[query for query in queries if stable_hash("calibration", query.query_id) % 2 == side] for side in (0, 1)]
    if not all(sides):
        raise InputError(f"calibration needs more queries: {len(queries)} do not make two halves")
    lists = candidates(queries, items, k)
    run, _ = score_candidates(score, queries, lists, items)
    labels = labels_of(queries)

    def pairs(side: Sequence[Query]) -> Pairs:
        return pairs_of({query.query_id: run[query.query_id] for query in side}, labels)

    return pairs(sides[0]), pairs(sides[1])


def pairs_of(run: Run, labels: Mapping[str, Mapping[str, float]]) -> Pairs:
    """Returns the pairs of a run of log-odds; a candidate without a judgement counts as irrelevant."""
    rows = [
        (logit, labels[query_id].get(item_id, 0.0)) for query_id, row in run.items() for item_id, logit in row.items()
    ]
    logits, relevance = np.array(rows, np.float64).T
    return Pairs(logits, relevance)


def _table(calibration: Calibration, reports: Mapping[str, CalibrationReport]) -> Table:
    pairs = reports["after"].pairs
    table = Table(
        title=f"P(yes) = sigmoid({calibration.scale:.4g} z {calibration.bias:+.4g}), {calibration.method}",
        caption=f"{pairs:,} pairs of queries that were not fitted on; ECE over bins of equal mass",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("probabilities")
    for name in MEASURES:
        table.add_column(name.upper() if name != "brier" else "Brier", justify="right")
    for when, report in reports.items():
        table.add_row(f"{when} calibration", *(f"{getattr(report, name):.4f}" for name in MEASURES))
    return table
