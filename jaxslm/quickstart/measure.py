"""What the quickstart measures: quality on the same candidates, and speed on the same requests, of every ranker."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxslm.atomic import new_file
from jaxslm.checkpoint import load_checkpoint
from jaxslm.compress.encoder import identity_of
from jaxslm.compress.splice import text_of
from jaxslm.config import RankerConfig
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.evaluate.candidates import candidates
from jaxslm.evaluate.checkpoints import evaluate_bi_encoder, evaluate_loaded, evaluate_store, read_split
from jaxslm.evaluate.metrics import has_relevant
from jaxslm.evaluate.rerank import Report, sample_queries
from jaxslm.evaluate.significance import paired_bootstrap
from jaxslm.items.lookup import ItemVectors
from jaxslm.items.store import Store, open_store
from jaxslm.model.cost import count_parameters, linear_flops_per_token, scoring_flops
from jaxslm.progress import progress
from jaxslm.quickstart.settings import MeasureSettings
from jaxslm.score.buckets import few_buckets
from jaxslm.score.compressed import VectorScorer
from jaxslm.score.forward import PackRequest
from jaxslm.score.parallel import device_name
from jaxslm.score.scorer import Ranker, VectorRequest

SPLIT = "dev"
DENSE = "full text"
BI_ENCODER = "bi-encoder"
"""The contrastive stage, by the cosine of its states."""

Requests = Sequence[tuple[str, list[Item]]]
"""(query, items) of each request."""


@dataclass(frozen=True)
class Contestant:
    """A ranker that reads text, or with a `store` the embedding tokens in it."""

    name: str
    model: Path
    store: Path | None = None


def evaluate(
    contestants: Sequence[Contestant],
    encoder: Path,
    max_item_tokens: int,
    data: Path,
    settings: MeasureSettings,
    folder: Path,
    split: str = SPLIT,
) -> None:
    """Writes `folder/NAME.json` of each ranker and of the bi-encoder that stage 1 is; files that are there stay."""
    options = {"candidates": settings.candidates, "limit": settings.queries}
    for each in contestants:
        if (path := _file_of(folder, each.name)).exists():
            continue
        ranker = _load(each.model)
        if each.store is None:
            report = evaluate_loaded(ranker, data, split, name=each.name, **options)
        else:
            with open_store(str(each.store), read_only=True) as store:
                report = evaluate_store(ranker, store, data, split, name=each.name, **options)
        _write(path, _evaluated(report))
    if not (path := _file_of(folder, BI_ENCODER)).exists():
        checkpoint = load_checkpoint(encoder)
        report = evaluate_bi_encoder(
            checkpoint, data, split, name=BI_ENCODER, max_item_tokens=max_item_tokens, **options
        )
        _write(path, _evaluated(report))


def measure_speed(contestants: Sequence[Contestant], data: Path, settings: MeasureSettings, out: Path) -> None:
    """Writes the speed and the cost of an item of each ranker, in turns on the same requests, after a first run.

    A run is all that a request needs: the prompt's tokens or the look-up in the store, packing, scoring.
    """
    requests = _requests_of(data, settings)
    with ExitStack() as stack:
        runs = {each.name: _run_of(each, requests, stack) for each in contestants}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        with progress() as bar:
            task = bar.add_task("measuring speed", total=len(runs) * (1 + settings.repeats))
            for repeat in range(1 + settings.repeats):
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    if repeat:  # the first one compiles
                        seconds[name].append(time.perf_counter() - start)
                    bar.advance(task)
        items = sum(len(chosen) for _, chosen in requests)
        rows = {
            name: _speed_row(items / np.array(seconds[name])) | _cost(run.ranker.config, run.packed())
            for name, run in runs.items()
        }
    how = (
        f"{len(requests)} requests, {items} items in all; median of {settings.repeats} runs after a first one, in turns"
    )
    _write(out, {"rows": rows, "conditions": {"speed": how, "device": device_name(), "jax": jax.__version__}})


def quality(contestants: Sequence[Contestant], folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the rows of what `evaluate` wrote, and its conditions; differences to full text are paired by query."""
    names = [*(each.name for each in contestants), BI_ENCODER]
    found = {name: read_json(_file_of(folder, name)) for name in names}
    dense = found[DENSE]["ndcg_per_query"]
    rows = []
    for name, content in found.items():
        row = dict(content["row"])
        if name != DENSE:
            difference = paired_bootstrap(content["ndcg_per_query"], dense)
            row |= {
                "ndcg_minus_dense": difference.mean,
                "ndcg_minus_dense_ci95": [difference.low, difference.high],
            }
        rows.append(row)
    return [*rows, *found[DENSE]["baselines"]], found[DENSE]["conditions"]


def combine(
    contestants: Sequence[Contestant], folder: Path, speed: Path, conditions: Mapping[str, Any], out: Path
) -> None:
    """Writes the result file of `jaxslm report` from what `evaluate` and `measure_speed` wrote."""
    speeds = read_json(speed)
    rows, said = quality(contestants, folder)
    rows = [row | speeds["rows"].get(row["name"], {}) for row in rows]
    _write(out, {"rows": rows, "conditions": said | speeds["conditions"] | dict(conditions)})


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a file that the quickstart wrote; raises InputError if it is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); remove it") from None
    return content


def _load(model: Path) -> Ranker:
    checkpoint = load_checkpoint(model)
    buckets = few_buckets(jax.default_backend(), checkpoint.config, checkpoint.manifest.compressor)
    return Ranker(checkpoint, buckets=buckets)


class _TextRun:
    """A ranker with requests: calling it scores every item's text."""

    def __init__(self, ranker: Ranker, requests: Requests) -> None:
        self.ranker, self._requests = ranker, requests

    def __call__(self) -> None:
        """Scores every item of every request."""
        self.ranker.score_many([self.ranker.prompt.encode(query, items) for query, items in self._requests])

    def packed(self) -> list[PackRequest]:
        """Returns the requests in token ids."""
        encoded = [self.ranker.prompt.encode(query, items) for query, items in self._requests]
        return [PackRequest(each.prefix_ids, each.item_ids) for each in encoded]


class _StoreRun:
    """A ranker with requests: calling it scores every item's vectors, from the store."""

    def __init__(self, ranker: Ranker, scorer: VectorScorer, requests: Requests, store: Store) -> None:
        self.ranker, self._scorer, self._requests = ranker, scorer, requests
        self._vectors = ItemVectors(store, identity_of(ranker.manifest))
        compressor = ranker.manifest.compressor
        self._fields = compressor.text_fields if compressor is not None else ()

    def __call__(self) -> None:
        """Scores every item of every request."""
        self.ranker.score_vectors_many(self._looked_up())

    def packed(self) -> list[PackRequest]:
        """Returns the requests in token ids."""
        return [part for request in self._looked_up() for _, part in self._scorer.pack(request)]

    def _looked_up(self) -> list[VectorRequest]:
        requests = []
        for query, items in self._requests:
            found = self._vectors.get([item.id for item in items]).vectors
            texts = [text_of(item, self._fields) for item in items] if self._fields else None
            requests.append(VectorRequest(query, [each for each in found if each is not None], texts))
        return requests


def _run_of(contestant: Contestant, requests: Requests, stack: ExitStack) -> _TextRun | _StoreRun:
    ranker = _load(contestant.model)
    if contestant.store is None:
        return _TextRun(ranker, requests)
    if ranker.vector_scorer is None:
        raise InputError(f"{contestant.model}: reads no embedding tokens")
    store = stack.enter_context(open_store(str(contestant.store), read_only=True))
    return _StoreRun(ranker, ranker.vector_scorer, requests, store)


def _cost(config: RankerConfig, requests: Sequence[PackRequest]) -> dict[str, float]:
    """Returns what an item costs, tokens that the ranker reads of it and arithmetic, and the ranker's size."""
    model = config.model
    lengths = [len(ids) for request in requests for ids in request.item_ids]
    flops = 0
    for request in requests:
        mean = round(np.mean([len(ids) for ids in request.item_ids]))
        flops += scoring_flops(model, len(request.prefix_ids), mean, len(request.item_ids), shared=True)
    return {
        "tokens_per_item": float(np.mean(lengths)),
        "gflop_per_item": flops / len(lengths) / 1e9,
        "parameters": count_parameters(model).total,
        "linear_flops_per_token": linear_flops_per_token(model),
    }


def _requests_of(data: Path, settings: MeasureSettings) -> Requests:
    """Returns held-out queries, each with as many of BM25's candidates as a request has items."""
    items, queries = read_split(data, SPLIT)
    eligible = [query for query in queries if has_relevant({judged.id: judged.label for judged in query.items})]
    chosen = sample_queries(eligible, settings.speed_requests)
    lists = candidates(chosen, items, settings.speed_items)
    return [
        (query.query, [items[item_id] for item_id in each.ids[: settings.speed_items]])
        for query, each in zip(chosen, lists, strict=True)
    ]


def _speed_row(rates: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(rates, [0.05, 0.5, 0.95]).tolist()
    return {"items_per_s": middle, "items_per_s_p5": low, "items_per_s_p95": high}


def _evaluated(report: Report) -> dict[str, Any]:
    """What is kept of a report: the speed of an evaluation, compilation included, is not."""
    *baselines, row = report.to_result()["rows"]
    return {
        "row": {name: value for name, value in row.items() if name not in ("items_per_s", "seconds")},
        "baselines": baselines,
        "ndcg_per_query": report.ranker.per_query(),
        "conditions": report.conditions(),
    }


def _file_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '-').replace('=', '')}.json"


def _write(path: Path, content: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)
    with new_file(path) as staging:
        staging.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
