"""Criteria of pruning beside the dense ranker: one-shot and recovered, paired intervals, items/s in the same run.

    python scripts/prune_study.py --dense ranker --data demo/jobs --out study --mlp-keep 768 --drop-layers 2 \\
        --recovery configs/cpu-recover.toml --recover osscar --gradual --limit 400
    python scripts/prune_study.py --dense ranker --data demo/jobs --out study \\
        --arm last drop_layers=2 depth_criterion=last --arm influence drop_layers=2 depth_criterion=block-influence

Checkpoints in --out are reused, so a stopped study goes on and a finished one takes further arms; one that was made
with other settings, from another dense ranker or on other data is refused. Prints one JSON object last and writes it to
OUT/result.json, in place of an older one, a result file for `jaxslm report`; beside it a TREC run of each ranker and
split, for `jaxslm compare` of any two.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from jaxslm.atomic import new_file
from jaxslm.config import ComputeDtype, load_toml
from jaxslm.errors import InputError, exit_on_input_error
from jaxslm.evaluate.checkpoints import evaluate_loaded, read_split
from jaxslm.evaluate.rerank import sample_queries
from jaxslm.evaluate.trec import write_run
from jaxslm.prune.model import PruneSettings
from jaxslm.prune.study import Calibrated, arms, changed, prune_gradually, recover, row, speed_in_turns
from jaxslm.score.scorer import load_few_shapes
from jaxslm.train.settings import RankerTraining


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("dense", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--recovery", type=Path, help="settings of `jaxslm train ranker`; model and teacher are set")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="a.b=value in --recovery")
    parser.add_argument("--recover", nargs="*", default=[], help="names of arms to recover")
    parser.add_argument("--only", nargs="*", help="names of arms; all criteria with and without re-fitting")
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="in place of the criteria: settings of pruning that differ from the flags below",
    )
    parser.add_argument("--gradual", action="store_true", help="recover the first arm's target in four stages too")
    parser.add_argument("--splits", nargs="*", default=["dev"], help="for example dev bls")
    parser.add_argument("--limit", type=int, help="queries of each split")
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--speed-queries", type=int, default=10)
    parser.add_argument(
        "--dtype", choices=get_args(ComputeDtype), help="scores of all rankers; the device's by default"
    )
    for name, field in PruneSettings.model_fields.items():
        if name not in ("criterion", "refit", "by_layer"):
            kind = str if name == "depth_criterion" else int
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=field.default)
    return parser.parse_args()


def choose(options: argparse.Namespace, base: PruneSettings) -> dict[str, PruneSettings]:
    """Returns the settings of the arms that are asked for, by name.

    Raises:
        InputError: an option names an arm that is not there, or recovery has no settings.
    """
    known = {name: changed(base, tuple(changes)) for name, *changes in options.arm} or arms(base)
    only = options.only or known
    chosen = {name: arm for name, arm in known.items() if name in only}
    for option, names, there in (("--only", only, known), ("--recover", options.recover, chosen)):
        for name in names:
            if name not in there:
                raise InputError(f"{option} {name}: no such arm; there are: {'; '.join(there)}")
    if options.recovery is None and (options.recover or options.gradual):
        raise InputError(f"{'--recover' if options.recover else '--gradual'}: needs --recovery")
    return chosen


def main() -> None:
    options = parse()
    fields = PruneSettings.model_fields.keys() & vars(options).keys()
    flags = {name: value for name in fields if (value := getattr(options, name)) is not None}
    base = changed(PruneSettings(), tuple(f"{name}={value}" for name, value in flags.items()))
    calibrated = Calibrated(options.data / "train-mixed.jsonl", options.data / "items.jsonl")
    chosen = choose(options, base)
    paths = {"dense": options.dense}

    def place(name: str) -> Path:
        return options.out / name.replace(", ", "-").replace(" ", "-")

    recovery = load_toml(options.recovery, RankerTraining, tuple(options.overrides)) if options.recovery else None
    for name, settings in chosen.items():
        paths[name] = place(name)
        calibrated.prune(options.dense, paths[name], settings)
        if recovery and name in options.recover:
            after = f"{name}, recovered"
            paths[after] = place(after)
            recover(paths[name], options.dense, paths[after], recovery)
    if recovery and options.gradual:
        target = next(iter(chosen.values()))
        folder = options.out / "gradual"
        paths["gradual"] = prune_gradually(options.dense, folder, target, recovery, calibrated)
    rankers = {name: load_few_shapes(path, options.dtype) for name, path in paths.items()}
    items, queries = read_split(options.data, options.splits[0])
    speed = speed_in_turns(rankers, sample_queries(queries, options.speed_queries), items, k=options.candidates)
    splits: dict[str, Any] = {}
    rows, conditions = [], {"settings": base.model_dump(), "dtype": rankers["dense"].dtype.name, "splits": splits}
    lists = {"candidates": options.candidates, "limit": options.limit}
    for split in options.splits:
        dense = evaluate_loaded(rankers["dense"], options.data, split, name="dense", **lists)
        splits[split] = dense.conditions()
        for name, ranker in rankers.items():
            report = dense if name == "dense" else evaluate_loaded(ranker, options.data, split, name=name, **lists)
            measured = row(f"{name}, {split}", report, dense, ranker)
            run = place(f"{name}, {split}.run")
            run.unlink(missing_ok=True)  # an older study's
            write_run(run, report.run)
            rows.append(measured | {"items_per_s": round(speed[name], 2)})
            print(
                f"{name}, {split}: nDCG@10 {measured['ndcg_at_10']:.3f}, tau {measured['kendall_tau_to_dense']}",
                file=sys.stderr,
            )
    result = {"rows": rows, "conditions": conditions}
    path = options.out / "result.json"
    path.unlink(missing_ok=True)  # as above
    with new_file(path) as file:
        file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    with exit_on_input_error("prune_study"):
        main()
