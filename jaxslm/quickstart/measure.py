"""What the quickstart measures: quality on the same candidates, and speed on the same requests, of every ranker."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxslm.atomic import new_file
from jaxslm.checkpoint import load_checkpoint
from jaxslm.compress.encoder import identity_of
from jaxslm.compress.splice import text_of
from jaxslm.config import Calibration, RankerConfig
from jaxslm.data_files import Item, Query, file_sha256
from jaxslm.errors import InputError
from jaxslm.evaluate.calibrate import pairs_of
from jaxslm.evaluate.calibration import calibration_report
from jaxslm.evaluate.candidates import Bm25, candidates
from jaxslm.evaluate.checkpoints import data_file, evaluate_bi_encoder, evaluate_loaded, evaluate_store, read_split
from jaxslm.evaluate.metrics import has_relevant, labels_of
from jaxslm.evaluate.rerank import Report, sample_queries
from jaxslm.evaluate.significance import paired_bootstrap
from jaxslm.items.lookup import ItemVectors
from jaxslm.items.store import Store, open_store
from jaxslm.model.cost import count_parameters, linear_flops_per_token, scoring_flops
from jaxslm.progress import progress
from jaxslm.quickstart.settings import MeasureSettings
from jaxslm.quickstart.stages import identity
from jaxslm.score.bi_encoder import BiEncoder
from jaxslm.score.compressed import VectorScorer
from jaxslm.score.forward import PackRequest
from jaxslm.score.parallel import device_name
from jaxslm.score.scorer import Ranker, VectorRequest, compute_dtype, load_few_shapes

SPLIT = "dev"
DENSE = "full text"
BI_ENCODER = "bi-encoder"
"""The contrastive stage, by the cosine of its states."""
CALIBRATION = "P(yes) against labels; a candidate without a judgement counts as irrelevant"

Run = Callable[[], object]
"""Scores every item of every request."""
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
    """Writes `folder/NAME.json` of each ranker and of the bi-encoder that stage 1 is.

    Files that are there stay, unless they are of another checkpoint than the one that is there now, other candidates or
    queries, or another data set: a table compares rankers on the same lists.
    """
    options: dict[str, Any] = {"candidates": settings.candidates, "limit": settings.queries}
    lists = options | {"split": split, "data_sha256": data_sha256(data, split)}
    labels = labels_of(read_split(data, split)[1])
    for each in contestants:
        if _is_of(path := _file_of(folder, each.name), each.model, lists):
            continue
        ranker = load_few_shapes(each.model)
        if each.store is None:
            report = evaluate_loaded(ranker, data, split, name=each.name, **options)
        else:
            with open_store(str(each.store), read_only=True) as store:
                report = evaluate_store(ranker, store, data, split, name=each.name, **options)
        content = _evaluated(report, each.model, lists)
        pairs = pairs_of(report.run, labels)
        content["row"]["calibration"] = asdict(calibration_report(Calibration().apply(pairs.logits), pairs.labels))
        content["conditions"]["calibration"] = CALIBRATION
        write_json(path, content)
    if not _is_of(path := _file_of(folder, BI_ENCODER), encoder, lists):
        checkpoint = load_checkpoint(encoder)
        report = evaluate_bi_encoder(
            checkpoint, data, split, name=BI_ENCODER, max_item_tokens=max_item_tokens, **options
        )
        write_json(path, _evaluated(report, encoder, lists))


def data_sha256(data: Path, split: str) -> str:
    """Returns what tells the items and the queries of a split from others: the hashes of their files."""
    return " ".join(file_sha256(data_file(data, name)) for name in ("items", split))


def measure_speed(
    contestants: Sequence[Contestant],
    encoder: Path,
    max_item_tokens: int,
    data: Path,
    settings: MeasureSettings,
    out: Path,
) -> None:
    """Writes the speed of each ranker, of the bi-encoder and of BM25, and what an item costs the rankers.

    They take turns on the same requests, after a first run. A ranker's run is all that a request needs: the prompt's
    tokens or the look-up in the store, packing, scoring. What the others can do before a query comes is done before.
    """
    postings, queries = read_split(data, SPLIT)
    requests = _requests_of(postings, queries, settings)
    with ExitStack() as stack:
        runs = {each.name: _run_of(each, requests, stack) for each in contestants}
        references = {
            BI_ENCODER: _bi_encoder_run(encoder, max_item_tokens, requests),
            "BM25": _bm25_run(postings, requests),
        }
        seconds = _timed(runs | references, settings.repeats)
        items = sum(len(chosen) for _, chosen in requests)
        rows = {name: _speed_row(items / np.array(each)) for name, each in seconds.items()}
        for name, run in runs.items():
            rows[name] |= _cost(run.ranker.config, run.packed())
    how = (
        f"{len(requests)} requests, {items} items in all; median of {settings.repeats} runs after a first one, in"
        f" turns; the bi-encoder's postings encoded and BM25's index of all {len(postings):,} built before"
    )
    write_json(out, {"rows": rows, "conditions": {"speed": how, "device": device_name(), "jax": jax.__version__}})


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
    write_json(out, {"rows": rows, "conditions": said | speeds["conditions"] | dict(conditions)})


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a file that the quickstart wrote; raises InputError if it is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); remove it") from None
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file of the quickstart, whole or not at all, in place of an older one."""
    path.unlink(missing_ok=True)
    with new_file(path) as staging:
        staging.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
    ranker = load_few_shapes(contestant.model)
    if contestant.store is None:
        return _TextRun(ranker, requests)
    store = stack.enter_context(open_store(str(contestant.store), read_only=True))
    return _StoreRun(ranker, ranker.required_vector_scorer, requests, store)


def _bi_encoder_run(encoder: Path, max_item_tokens: int, requests: Requests) -> Run:
    """Encodes queries and takes cosines; the first call encodes the postings too."""
    checkpoint = load_checkpoint(encoder)
    model = BiEncoder(checkpoint.config.model, checkpoint.prompt, compute_dtype(), max_item_tokens=max_item_tokens)
    model.load(checkpoint.params)
    return lambda: [model.score(query, items) for query, items in requests]


def _bm25_run(postings: Mapping[str, Item], requests: Requests) -> Run:
    """Finds the items of the requests, which are BM25's own, as search does: it scores all postings for them."""
    index = Bm25(postings)
    return lambda: [index.search(query, len(items)) for query, items in requests]


def _timed(runs: Mapping[str, Run], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each call of each, in turns; the first calls, which compile, do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with progress() as bar:
        task = bar.add_task("measuring speed", total=len(runs) * (1 + repeats))
        for repeat in range(1 + repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
                bar.advance(task)
    return seconds


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


def _requests_of(items: Mapping[str, Item], queries: Sequence[Query], settings: MeasureSettings) -> Requests:
    """Returns queries, each with as many of BM25's candidates as a request has items."""
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


def _is_of(path: Path, model: Path, lists: Mapping[str, Any]) -> bool:
    """Returns whether a file of `evaluate` is there, of this checkpoint and on these lists."""
    if not path.exists():
        return False
    content = read_json(path)
    return content.get("model") == identity(model) and content.get("lists") == lists


def _evaluated(report: Report, model: Path, lists: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a report: the speed of an evaluation, compilation included, is not."""
    *baselines, row = report.to_result()["rows"]
    return {
        "model": identity(model),
        "lists": dict(lists),
        "row": {name: value for name, value in row.items() if name not in ("items_per_s", "seconds")},
        "baselines": baselines,
        "ndcg_per_query": report.ranker.per_query(),
        "conditions": report.conditions(),
    }


def _file_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '-').replace('=', '')}.json"
