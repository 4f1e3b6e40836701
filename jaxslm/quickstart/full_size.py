"""The same pipeline at full size for one GPU: stages that stop by the clock and go on in the next call."""

import importlib.metadata
import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from jaxslm.atomic import new_file
from jaxslm.bench.score import bench_score
from jaxslm.config import Positive
from jaxslm.errors import InputError
from jaxslm.evaluate.report import write_report
from jaxslm.progress import console
from jaxslm.quickstart.int8 import write_int8
from jaxslm.quickstart.measure import SPLIT, combine
from jaxslm.quickstart.pipeline import Pipeline
from jaxslm.quickstart.settings import MeasureSettings, Overrides, QuickstartSettings, RecipeSettings
from jaxslm.quickstart.stages import LOG, Stage, files_sha256, run_stages, seconds_by_stage

SPLITS = ("dev", "bls")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")
"""Whose versions the results name."""


class FullSizeSettings(QuickstartSettings):
    """Settings of a full-size run.

    Attributes:
        bench: (model, workload) pairs of `jaxslm bench score`, the model one of the pipeline's checkpoints.
    """

    recipe: RecipeSettings = RecipeSettings(
        encoder="smollm2-135m-encoder",
        ranker="smollm2-135m",
        recover="smollm2-135m",
        compressor="smollm2-135m-compressor",
    )
    encoder: Overrides = ()
    ranker: Overrides = ()
    recover: Overrides = (
        "comparison_layer=false",
        "steps=600",
        "data.queries=demo/jobs/train-mixed.jsonl",
        "data.seed=1",
        "losses={binary_cross_entropy=0.1, list_softmax=0.25, distillation=1.0, list_distillation=0.5,"
        " every_state=1.0}",
        "optimiser.learning_rate=1e-4",
        "optimiser.warmup_steps=50",
    )
    compressor: Overrides = ()
    mlp_keep: Positive = 768
    by_layer: bool = False  # the kernels are tuned for one width
    drop_layers: int = 6
    calibration_tokens: int = 65_536
    measure: MeasureSettings = MeasureSettings(queries=400, candidates=50, speed_requests=8, speed_items=250)
    bench: Annotated[tuple[Annotated[tuple[str, str], Field(strict=False)], ...], Field(strict=False)] = (
        ("ranker", "text_300"),
        ("recovered", "text_300"),
        ("recovered", "latent_8"),
        ("recovered", "latent_1"),
    )


class FullSize(Pipeline):
    """The stages over one folder, whose `demo` was carried there."""

    def __init__(self, out: Path, settings: FullSizeSettings) -> None:
        super().__init__(out, _never_fetched, settings)
        self._bench, self.int8 = settings.bench, out / "recovered.int8.safetensors"

    def stages(self) -> list[Stage]:
        """All stages in order."""
        trained = [
            ("Model", "From its 4-bit file to a checkpoint.", self._convert, self.start, None),
            ("Contrastive start", "All layers.", self._train_encoder, self.encoder, self.start),
            ("Ranker", "The teacher of all that follows.", self._train_ranker, self.ranker, self.encoder),
            ("Pruning", "Half of the work of a token goes.", self._prune, self.pruned, self.ranker),
            ("Recovery", "The ranker teaches the pruned one.", self._recover, self.recovered, self.pruned),
            ("Compressor", "Items as 1 or 8 vectors.", self._train_compressor, self.compressed, self.recovered),
        ]
        stages = [Stage(title, words, None, run, result, parent) for title, words, run, result, parent in trained]
        vectors = "Every item's vectors, int8, in LMDB."
        stages.append(Stage("Catalogue", vectors, None, self._encode, self.encoded, measured=[self.compressed]))
        for split in SPLITS:
            run, done = partial(self._evaluate_split, split), self.evaluations / split / "done"
            title, how = f"Quality, {split}", partial(self.how_measured, split)
            stages.append(Stage(title, "Held-out queries.", None, run, done, measured=self.measured, made_of=how))
        whole, how = "Whole requests, host work included.", partial(self.how_measured, SPLIT)
        stages.append(Stage("Speed", whole, None, self._measure_speed, self.speed, measured=self.measured, made_of=how))
        for model, workload in self._bench:
            run, done = partial(self._bench_score, model, workload), self._bench_file(model, workload)
            title, measured = f"Device, {model}, {workload}", [self._out / model]
            stages.append(Stage(title, "Beside the floor of this device.", None, run, done, measured=measured))
        weights = "The recovered ranker in int8."
        stages.append(Stage("Weights", weights, None, self._pack, self.int8, measured=[self.recovered]))
        told = partial(files_sha256, [self.evaluations, self.speed, *(self._bench_file(*each) for each in self._bench)])
        words = "Tables and plots."
        stages.append(Stage("Report", words, None, self._report, self.report, measured=self.measured, made_of=told))
        return stages

    def results_of(self, split: str) -> Path:
        """Returns the result file of a split."""
        return self._out / f"results-{split}.json"

    def to_carry_home(self) -> list[Path]:
        """Returns what a finished run leaves that is small: results, report, logs, weights.

        Raises:
            InputError: it is not finished.
        """
        if not self.report.exists():
            raise InputError(f"{self._out}: not finished; `scripts/reproduce_gpu run` goes on")
        found = [path for kind in ("bench-*.json", "*.training/log.jsonl") for path in sorted(self._out.glob(kind))]
        results = [*map(self.results_of, SPLITS), self.speed, self.encoded, self._out / LOG]
        return [*results, *found, self.evaluations, self.report, self.int8]

    def _evaluate_split(self, split: str) -> None:
        folder = self.evaluations / split
        self.evaluate(split, self._settings.measure, folder)
        (folder / "done").touch()

    def _bench_file(self, model: str, workload: str) -> Path:
        return self._out / f"bench-{model}-{workload}.json"

    def _bench_score(self, model: str, workload: str) -> None:
        result = bench_score(workload, str(self._out / model))
        with new_file(self._bench_file(model, workload)) as staging:
            staging.write_text(json.dumps(result | {"model": model}, indent=1) + "\n", encoding="utf-8")

    def _pack(self) -> None:
        write_int8(self.recovered, self.int8)

    def _report(self) -> None:
        conditions: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "seconds": seconds_by_stage(self._out),
        }
        results = [self.results_of(split) for split in SPLITS]
        for split, path in zip(SPLITS, results, strict=True):
            said = conditions | {"split": split}
            combine(self.contestants(), self.evaluations / split, self.speed, said, path)
        write_report([*results, *(self._bench_file(*each) for each in self._bench)], self.report)


def run(out: Path, settings: FullSizeSettings) -> bool:
    """Goes on with the run in `out`; returns whether it is finished. Ctrl-C, or SIGINT, ends the call and no more.

    Raises:
        InputError: `out` lacks the data or the model, or holds a damaged file.
    """
    if not (out / "demo" / "jobs").is_dir():
        raise InputError(f"{out / 'demo'}: not there; `scripts/reproduce_gpu receive` puts it there")
    pipeline = FullSize(out, settings)
    try:
        run_stages(pipeline.stages(), out)
    except KeyboardInterrupt:
        console().print("Time is up. What is done stays; the same command goes on.")
        return False
    return True


def _never_fetched(_: Path) -> dict[str, Any]:
    raise InputError("the full-size run has no network")
