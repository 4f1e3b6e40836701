"""Pruned models beside the dense one: recovery at once or in stages, paired differences, speed in turns."""

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from jaxslm.atomic import new_file
from jaxslm.checkpoint import load_manifest
from jaxslm.config import ModelConfig, load_toml
from jaxslm.data_files import Item, Query, file_sha256
from jaxslm.errors import InputError
from jaxslm.evaluate.agreement import kendall_tau
from jaxslm.evaluate.candidates import candidates
from jaxslm.evaluate.rerank import Report
from jaxslm.evaluate.significance import paired_bootstrap
from jaxslm.model.cost import count_parameters, linear_flops_per_token
from jaxslm.prune.checkpoints import prune_checkpoint
from jaxslm.prune.criteria import Criterion
from jaxslm.prune.model import PruneSettings, removes_anything
from jaxslm.score.scorer import Ranker
from jaxslm.train.ranker import train_ranker
from jaxslm.train.settings import RankerTraining, TeacherSettings

NO_MATTER: dict[str, Any] = {"save_every": True, "tensorboard": True, "data": {"epochs": True, "workers": True}}
"""Settings of training that do not tell a recovered checkpoint from others."""


@dataclass(frozen=True)
class Calibrated:
    """The calibration files of a study, as `prune_checkpoint` takes them."""

    queries: Path
    items: Path

    def prune(self, model: Path, out: Path, settings: PruneSettings) -> None:
        """Writes the pruned checkpoint unless it is there; errors as `made_once` and `prune_checkpoint`."""
        made_with = settings.model_dump(mode="json") | {
            "model": load_manifest(model).params_sha256,
            "calibration": contents([str(self.queries), str(self.items)]),
        }
        with made_once(out, made_with) as wanted:
            if wanted:
                prune_checkpoint(model, self.queries, out, settings, items=self.items)


@contextmanager
def made_once(out: Path, made_with: Mapping[str, Any]) -> Iterator[bool]:
    """Yields whether the block is to make the checkpoint `out`; keeps beside it what it was made with.

    Raises:
        InputError: `out` is there, made with something else, or nothing says with what.
    """
    record = out.with_name(f"{out.name}.made-with.json")
    if out.exists():
        _check_record(out, record, made_with)
        yield False
        return
    record.unlink(missing_ok=True)  # of one that was removed
    yield True
    with new_file(record) as staging:
        staging.write_text(json.dumps(made_with, indent=1) + "\n", encoding="utf-8")


def _check_record(out: Path, record: Path, made_with: Mapping[str, Any]) -> None:
    try:
        former = json.loads(record.read_bytes())
    except (OSError, ValueError):
        raise InputError(f"{out}: no {record.name} says with what it was made; remove it to make it anew") from None
    names = [name for name in sorted(former.keys() | made_with.keys()) if former.get(name) != made_with.get(name)]
    if names:
        raise InputError(
            f"{out}: made with another {', '.join(names)} ({record.name}); name another output, or remove it to make"
            " it anew"
        )


def contents(tree: Any) -> Any:
    """Returns settings with the hash of a file in place of its path: it may move, and what it holds counts."""
    if isinstance(tree, dict):
        return {name: contents(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [contents(value) for value in tree]
    return file_sha256(Path(tree)) if isinstance(tree, str) and Path(tree).is_file() else tree


def arms(base: PruneSettings) -> dict[str, PruneSettings]:
    """Returns the settings of every criterion with and without re-fitting, by name."""
    return {
        criterion + ("" if refit else ", not re-fitted"): base.model_copy(
            update={"criterion": criterion, "refit": refit}
        )
        for criterion in get_args(Criterion)
        for refit in (True, False)
    }


def changed(base: PruneSettings, changes: tuple[str, ...]) -> PruneSettings:
    """Returns `base` after `name=value` changes; raises InputError as `load_toml`."""
    stated = tuple(f"{name}={json.dumps(value)}" for name, value in base.model_dump(exclude_defaults=True).items())
    return load_toml(None, PruneSettings, stated + changes)


def recover(pruned: Path, dense: Path, out: Path, recovery: RankerTraining, share: float = 1.0) -> None:
    """Trains a pruned checkpoint with the dense one as teacher, for a share of the steps, unless `out` is there.

    Raises:
        InputError: as `made_once` and `train_ranker`, and when the run was stopped.
    """
    steps = max(1, round(share * recovery.steps))
    teacher = TeacherSettings(checkpoint=str(dense))
    settings = recovery.model_copy(update={"model": str(pruned), "teacher": teacher, "steps": steps})
    made_with = settings.model_dump(mode="json", exclude=NO_MATTER)
    made_with |= {
        **{name: contents(made_with[name]) for name in ("data", "evaluation")},
        "model": load_manifest(pruned).params_sha256,
        "teacher": load_manifest(dense).params_sha256,
    }
    with made_once(out, made_with) as wanted:
        if wanted and not train_ranker(settings, out).finished:
            raise InputError(f"{out}: recovery was stopped; the same command goes on")


def stages(config: ModelConfig, target: PruneSettings) -> list[tuple[PruneSettings, float]]:
    """Returns a gradual schedule: neurons in two steps, then layers in two, each with its share of the recovery.

    More than half of a model goes only in steps, with training between (Muralidharan et al., 2407.14679); the shares
    leave most of the training to the last one. Steps that would remove nothing are left out.
    """
    first = target.drop_layers // 2
    width, keep, multiple = min(config.mlp_width_by_layer), target.mlp_keep, target.width_multiple
    half = keep and max(keep, (width + keep) // 2 // multiple * multiple)
    steps: list[tuple[dict[str, Any], int]] = [
        *(({"mlp_keep": neurons, "drop_layers": 0}, weight) for neurons, weight in {half: 2, keep: 3}.items()),
        *(
            ({"mlp_keep": None, "by_layer": False, "kv_groups_keep": None, "drop_layers": layers}, weight)
            for layers, weight in ((first, 3), (target.drop_layers - first, 12))
        ),
    ]
    found = [(target.model_copy(update=changes), weight) for changes, weight in steps]
    found = [(settings, weight) for settings, weight in found if removes_anything(config, settings)]
    return [(settings, weight / sum(each for _, each in found)) for settings, weight in found]


def prune_gradually(
    dense: Path, out: Path, target: PruneSettings, recovery: RankerTraining, calibrated: Calibrated
) -> Path:
    """Prunes and recovers in `stages`, each from the last one's result; returns the last checkpoint, in `out`."""
    current = dense
    for number, (settings, share) in enumerate(stages(load_manifest(dense).ranker.model, target)):
        pruned, recovered = out / f"{number}-pruned", out / f"{number}-recovered"
        calibrated.prune(current, pruned, settings)
        recover(pruned, dense, recovered, recovery, share)
        current = recovered
    return current


def row(name: str, report: Report, dense: Report, ranker: Ranker) -> dict[str, Any]:
    """Returns a ranker's row of a result file: its difference to the dense one on the same queries, and their tau."""
    difference = paired_bootstrap(report.ranker.per_query(), dense.ranker.per_query())
    tau = kendall_tau(report.run, dense.run)
    model = ranker.config.model
    return {
        **report.to_json(),
        "name": name,
        "parameters": count_parameters(model).total,
        "non_embedding_parameters": count_parameters(model).non_embedding,
        "linear_flops_per_token": linear_flops_per_token(model),
        "prune_seconds": ranker.manifest.metrics.get("prune_seconds"),
        "ndcg_minus_dense": difference.mean,
        "ndcg_minus_dense_ci95": [difference.low, difference.high],
        "kendall_tau_to_dense": None if tau is None else tau.mean,
    }


def speed_in_turns(
    rankers: Mapping[str, Ranker], queries: Sequence[Query], items: Mapping[str, Item], *, k: int, rounds: int = 5
) -> dict[str, float]:
    """Returns the median items per second of each ranker on the same requests, prompts encoded beforehand.

    Rankers take turns, so that a slow moment of the machine hits all of them; a first round compiles and is not
    counted.

    Args:
        queries: one request each: the BM25 list of length `k` and the judged items.
    """
    lists = candidates(queries, items, k)
    texts = {query.query_id: query.query for query in queries}
    taken: dict[str, list[float]] = {name: [] for name in rankers}
    requests = {
        name: [ranker.prompt.encode(texts[each.query_id], [items[item_id] for item_id in each.ids]) for each in lists]
        for name, ranker in rankers.items()
    }
    for _ in range(rounds + 1):
        for name, ranker in rankers.items():
            start = time.perf_counter()
            ranker.score_many(requests[name])
            taken[name].append(time.perf_counter() - start)
    count = sum(len(each.ids) for each in lists)
    return {name: count / statistics.median(seconds[1:]) for name, seconds in taken.items()}
