"""The stages of `jaxslm quickstart`, in order, and what they leave in its folder."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from jaxslm.compress.catalogue import encode_file
from jaxslm.config import load_toml
from jaxslm.convert import convert
from jaxslm.convert.export import export_hf
from jaxslm.demo.fetch import default_parts, fetch_demo
from jaxslm.errors import InputError
from jaxslm.evaluate.report import write_report
from jaxslm.inspect import describe, print_card
from jaxslm.progress import console
from jaxslm.prune.checkpoints import prune_checkpoint
from jaxslm.prune.model import PruneSettings
from jaxslm.quickstart.measure import (
    DENSE,
    SPLIT,
    Contestant,
    combine,
    data_sha256,
    evaluate,
    measure_speed,
    read_json,
    write_json,
)
from jaxslm.quickstart.settings import MeasureSettings, QuickstartSettings
from jaxslm.quickstart.stages import Stage, files_sha256, run_stages, seconds_by_stage
from jaxslm.train.compressor import train_compressor
from jaxslm.train.compressor_settings import CompressorTraining
from jaxslm.train.encoder import train_encoder
from jaxslm.train.loop import TrainResult
from jaxslm.train.ranker import train_ranker
from jaxslm.train.settings import EncoderTraining, RankerTraining

CONFIGS = Path(__file__).parents[2] / "configs"
"""The recipe: what `jaxslm train` reads. It lies beside the package in a checkout of the repository."""

Fetch = Callable[[Path], dict[str, Any]]
"""Fills the data folder and returns what `jaxslm.demo.fetch_demo` does."""
PARTS = ("jobs", "model")
"""The parts of the demo data that the stages read."""
Training = TypeVar("Training", EncoderTraining, RankerTraining, CompressorTraining)


def fetch_needed(out: Path) -> dict[str, Any]:
    """Fetches what the stages read; `fetch_demo` on the same folder adds the rest, a bi-encoder to compare with."""
    return fetch_demo(out, parts=[part for part in default_parts() if part.folder in PARTS])


def run(
    out: Path, *, serve: bool = True, fetch: Fetch = fetch_needed, settings: QuickstartSettings | None = None
) -> dict[str, Any]:
    """Builds a ranker from real weights and data, makes it small and fast, measures each step, serves it.

    Everything lies under `out`; a stage whose result is there is not repeated, and one that was interrupted goes on.

    Args:
        serve: stay with the server at the end until Ctrl-C.

    Returns:
        The result file, with "report", its page; "finished" is False if Ctrl-C came before the end.

    Raises:
        InputError: no network, `out` is no folder or not this program's, or a damaged file in it.
    """
    if not CONFIGS.is_dir():
        raise InputError(f"{CONFIGS}: not there; the quickstart runs in a checkout of the repository")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot create the folder ({error.strerror})") from None
    pipeline = Pipeline(out, fetch, settings or QuickstartSettings())
    try:
        run_stages(pipeline.stages(), out)
        content = read_json(pipeline.results)
        _show(content, pipeline.report / "index.html")
        if serve:
            pipeline.serve(stay=True)
    except KeyboardInterrupt:
        console().print(f"Stopped. What is done stays in {out}; the same command goes on.")
        return {"finished": False, "out": str(out)}
    return content | {"finished": True, "report": str(pipeline.report / "index.html")}


class Pipeline:
    """The stages over one folder."""

    def __init__(self, out: Path, fetch: Fetch, settings: QuickstartSettings) -> None:
        self._out, self._fetch, self._settings = out, fetch, settings
        self.jobs = out / "demo" / "jobs"
        self.start, self.encoder, self.ranker = out / "smollm2", out / "encoder", out / "ranker"
        self.pruned, self.recovered, self.compressed = out / "pruned", out / "recovered", out / "compressed"
        self.encoded, self.evaluations, self.speed = out / "encoded.json", out / "evaluations", out / "speed.json"
        self.results, self.report, self.exported = out / "results.json", out / "report", out / "hf"
        self.served = out / "served.json"
        self.measured = [self.encoder, self.ranker, self.recovered, self.compressed]

    def stages(self) -> list[Stage]:
        """All stages in order."""
        return [*self._making(), *self._measuring()]

    def _making(self) -> list[Stage]:
        return [
            Stage(
                "Data",
                "923 occupations as job postings (O*NET), searches with the postings that fit them, and a small"
                " language model, SmolLM2-135M. 164 MB to download.",
                (8, 20),
                self._fetch_data,
            ),
            Stage(
                "Model",
                "From its 4-bit file to a checkpoint that JAX computes with.",
                (10, 20),
                self._convert,
                self.start,
            ),
            Stage(
                "First lessons",
                "The first 6 of its 30 layers learn to give a search and a fitting posting similar states (contrastive"
                " training).",
                (131, 218),
                self._train_encoder,
                self.encoder,
                self.start,
            ),
            Stage(
                "Ranker",
                "It learns to read a search and a posting together and to answer yes or no; P(yes) is the order.",
                (70, 129),
                self._train_ranker,
                self.ranker,
                self.encoder,
            ),
            Stage(
                "Pruning",
                "A third of the neurons go; those that stay are fitted to what the whole ranker computed.",
                (41, 79),
                self._prune,
                self.pruned,
                self.ranker,
            ),
            Stage(
                "Recovery",
                "The whole ranker teaches the pruned one what it lost (distillation).",
                (49, 82),
                self._recover,
                self.recovered,
                self.pruned,
            ),
            Stage(
                "Compressor",
                "A posting becomes 1 or 8 vectors that the ranker reads in place of its text.",
                (112, 216),
                self._train_compressor,
                self.compressed,
                self.recovered,
            ),
            Stage(
                "Catalogue",
                "All postings become vectors, once, and lie ready in a store (LMDB).",
                (25, 48),
                self._encode,
                self.encoded,
                measured=[self.compressed],
            ),
        ]

    def _measuring(self) -> list[Stage]:
        return [
            Stage(
                "Quality",
                "Searches that no stage has seen: does each ranker put the fitting postings first?",
                (118, 227),
                self._evaluate,
                self.evaluations / "done",
                measured=self.measured,
                made_of=lambda: self.how_measured(SPLIT),
            ),
            Stage(
                "Speed",
                "How many postings a second does each score?",
                (32, 59),
                self._measure_speed,
                self.speed,
                measured=self.measured,
                made_of=lambda: self.how_measured(SPLIT),
            ),
            Stage(
                "Export",
                "The pruned ranker as a folder for `transformers`.",
                (3, 5),
                self._export,
                self.exported,
                measured=[self.recovered],
            ),
            Stage(
                "Server",
                "Scoring over HTTP: a request of each kind.",
                (15, 30),
                lambda: self.serve(stay=False),
                self.served,
                measured=[self.compressed],
            ),
            Stage(
                "Report",
                "Tables and plots as a page.",
                (3, 5),
                self._report,
                self.report,
                measured=self.measured,
                made_of=lambda: files_sha256([self.evaluations, self.speed]),
            ),
        ]

    def serve(self, *, stay: bool) -> None:
        """Starts the server and sends it one request of each kind."""
        from jaxslm.quickstart.serving import try_server

        try_server(self.compressed, self._store(max(self._ks)), self.jobs / "items.jsonl", self._out, stay=stay)

    @cached_property
    def _compressor_training(self) -> CompressorTraining:
        overrides = _paths(**{"compressor.encoder": self.encoder})
        return self._load(
            self._settings.recipe.compressor, CompressorTraining, self.recovered, overrides + self._settings.compressor
        )

    @cached_property
    def _encoder_training(self) -> EncoderTraining:
        return self._load(self._settings.recipe.encoder, EncoderTraining, self.start, self._settings.encoder)

    @cached_property
    def _recovery(self) -> RankerTraining:
        overrides = _paths(**{"teacher.checkpoint": self.ranker}) + self._settings.recover
        return self._load(self._settings.recipe.recover, RankerTraining, self.pruned, overrides)

    @property
    def _ks(self) -> tuple[int, ...]:
        return self._compressor_training.compressor.ks

    def _load(self, name: str, kind: type[Training], model: Path, overrides: tuple[str, ...]) -> Training:
        """Returns a config of the recipe with this folder's paths; of its path of queries, the file's name counts.

        The prompt is the same in all stages, that of the ranker's, since `convert` put it into the first checkpoint;
        quality is measured once, at the end.
        """
        paths = _paths(model=model, **{"data.items": self.jobs / "items.jsonl"})
        settings = load_toml(CONFIGS / f"{name}.toml", kind, paths + overrides)
        queries = str(self.jobs / Path(settings.data.queries).name)
        data = settings.data.model_copy(update={"queries": queries})
        return settings.model_copy(update={"data": data, "evaluation": None, "prompt": None})

    def _fetch_data(self) -> None:
        counts = self._fetch(self._out / "demo")["counts"]
        shown = ("items", "train_task_queries", "train_dwa_queries", "dev_queries", "bls_queries")
        console().print("    " + ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in shown))

    def _convert(self) -> None:
        [gguf] = (self._out / "demo" / "model").glob("*.gguf")
        config = CONFIGS / f"{self._settings.recipe.ranker}.toml"
        prompt = load_toml(config, RankerTraining, self._settings.ranker).prompt
        if prompt is None:
            raise InputError(f"{config}: needs a [prompt]")
        convert(
            str(gguf),
            self.start,
            template=prompt.template,
            instruction=prompt.instruction,
            max_tokens=prompt.max_tokens,
            max_item_tokens=prompt.max_item_tokens,
        )
        print_card(describe(self.start))

    def _train_encoder(self) -> None:
        _go_on(train_encoder(self._encoder_training, self.encoder))

    def _train_ranker(self) -> None:
        settings = self._load(self._settings.recipe.ranker, RankerTraining, self.encoder, self._settings.ranker)
        _go_on(train_ranker(settings, self.ranker))

    def _prune(self) -> None:
        chosen = self._settings
        settings = PruneSettings(
            mlp_keep=chosen.mlp_keep,
            by_layer=chosen.by_layer,
            drop_layers=chosen.drop_layers,
            depth_criterion=chosen.depth_criterion,
            width_multiple=chosen.width_multiple,
            calibration_tokens=chosen.calibration_tokens,
        )
        data = self._recovery.data
        prune_checkpoint(self.ranker, Path(data.queries), self.pruned, settings, items=Path(data.items))

    def _recover(self) -> None:
        _go_on(train_ranker(self._recovery, self.recovered))

    def _train_compressor(self) -> None:
        _go_on(train_compressor(self._compressor_training, self.compressed))

    def _encode(self) -> None:
        stores = {k: str(self._store(k)) for k in self._ks}
        result = encode_file(self.compressed, self.jobs / "items.jsonl", stores, dtype="int8")
        write_json(self.encoded, result)

    def _store(self, k: int) -> Path:
        return self._out / f"store-k{k}"

    def contestants(self) -> list[Contestant]:
        """The rankers that are measured, the dense one first."""
        compressed = [Contestant(f"compressed k={k}", self.compressed, self._store(k)) for k in sorted(self._ks)[::-1]]
        return [Contestant(DENSE, self.ranker), Contestant("pruned", self.recovered), *compressed]

    def how_measured(self, split: str) -> str:
        """What the numbers of a split depend on beside the rankers: how much is measured, and the data."""
        return f"{self._settings.measure.model_dump_json()} {data_sha256(self.jobs, split)}"

    def evaluate(self, split: str, settings: MeasureSettings, folder: Path) -> None:
        """Writes how good each ranker is on a split, as `jaxslm.quickstart.measure.evaluate` does."""
        tokens = self._encoder_training.data.max_item_tokens
        evaluate(self.contestants(), self.encoder, tokens, self.jobs, settings, folder, split)

    def _evaluate(self) -> None:
        self.evaluate(SPLIT, self._settings.measure, self.evaluations)
        (self.evaluations / "done").touch()

    def _measure_speed(self) -> None:
        tokens = self._encoder_training.data.max_item_tokens
        measure_speed(self.contestants(), self.encoder, tokens, self.jobs, self._settings.measure, self.speed)

    def _export(self) -> None:
        export_hf(self.recovered, self.exported)

    def _report(self) -> None:
        conditions = {"seconds": seconds_by_stage(self._out)}
        combine(self.contestants(), self.evaluations, self.speed, conditions, self.results)
        write_report([self.results], self.report)


def _paths(**paths: Path) -> tuple[str, ...]:
    """Overrides that name files of the quickstart's folder."""
    return tuple(f"{name}={json.dumps(str(path))}" for name, path in paths.items())


def _go_on(result: TrainResult) -> None:
    """Training ends well at Ctrl-C; the stages after it must not begin."""
    if result.interrupted:
        raise KeyboardInterrupt


def _show(content: dict[str, Any], page: Path) -> None:
    console().print(_table(content))
    seconds = content["conditions"]["seconds"]
    console().print(
        f"In all {sum(seconds.values()) / 60:.1f} minutes. Report: {page.resolve().as_uri()}", soft_wrap=True
    )


def _table(content: dict[str, Any]) -> Table:
    conditions = content["conditions"]
    table = Table(
        title="Quality and speed, mean [95 % interval]",
        title_justify="left",
        caption=f"{conditions['queries']} held-out queries, {conditions['candidates']} candidates"
        f" ({conditions['candidate_list']}). {conditions['conventions']}. Speed: {conditions['speed']}.",
        caption_justify="left",
    )
    for column in ("ranker", "nDCG@10", "minus full text", "items/s", "tokens/item", "parameters"):
        table.add_column(column, justify="left" if column == "ranker" else "right")
    for row in content["rows"]:
        table.add_row(
            row["name"],
            _interval(row, "ndcg_at_10", "ndcg_ci95", ""),
            _interval(row, "ndcg_minus_dense", "ndcg_minus_dense_ci95", "+"),
            f"{row['items_per_s']:,.{0 if row['items_per_s'] >= 100 else 1}f}" if "items_per_s" in row else "",
            f"{row['tokens_per_item']:.1f}" if "tokens_per_item" in row else "",
            f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else "",
        )
    return table


def _interval(row: dict[str, Any], mean: str, interval: str, sign: str) -> str:
    if mean not in row:
        return ""
    low, high = row[interval]
    return f"{row[mean]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
