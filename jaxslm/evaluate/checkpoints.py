"""`jaxslm eval`: a checkpoint on a folder of data, beside BM25 on the same candidates."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxslm.atomic import refuse_unwritable
from jaxslm.checkpoint import Checkpoint, load_checkpoint
from jaxslm.compress.encoder import identity_of
from jaxslm.compress.splice import text_of
from jaxslm.config import ComputeDtype
from jaxslm.data_files import Item, Query, read_items, read_queries
from jaxslm.errors import InputError
from jaxslm.evaluate.candidates import CandidateList
from jaxslm.evaluate.rerank import Check, Report, accept, evaluate_ranker, print_report
from jaxslm.evaluate.trec import check_ids, write_run
from jaxslm.items.lookup import ItemVectors, Status
from jaxslm.items.store import Store, open_store
from jaxslm.score.bi_encoder import BiEncoder
from jaxslm.score.scorer import Ranker, compute_dtype, load

_IDS_AT_ONCE = 1000
_IDS_NAMED = 3


def read_split(data: Path, split: str) -> tuple[dict[str, Item], list[Query]]:
    """Returns the items of a data folder and the queries of `split`, from JSON Lines or Parquet.

    Raises:
        InputError: a file is missing or breaks its schema.
    """
    return read_items(data_file(data, "items")), read_queries(data_file(data, split))


def evaluate_loaded(
    ranker: Ranker,
    data: Path,
    split: str,
    *,
    name: str,
    candidates: int = 50,
    limit: int | None = None,
    check: Check = accept,
) -> Report:
    """Ranks the candidates of a split's queries by log-odds."""
    items, queries = read_split(data, split)
    return evaluate_ranker(ranker.log_odds, queries, items, k=candidates, limit=limit, name=name, check=check)


def evaluate_bi_encoder(
    checkpoint: Checkpoint,
    data: Path,
    split: str,
    *,
    name: str,
    candidates: int = 50,
    limit: int | None = None,
    check: Check = accept,
    max_item_tokens: int,
    dtype: DTypeLike | None = None,
) -> Report:
    """Ranks the candidates of a split's queries by the cosine of mean states, as `jaxslm train encoder` learns them."""
    items, queries = read_split(data, split)
    used = jnp.dtype(dtype or compute_dtype())
    encoder = BiEncoder(checkpoint.config.model, checkpoint.prompt, used, max_item_tokens=max_item_tokens)
    encoder.load(checkpoint.params)
    return evaluate_ranker(encoder.score, queries, items, k=candidates, limit=limit, name=name, check=check)


def evaluate_store(
    ranker: Ranker,
    store: Store,
    data: Path,
    split: str,
    *,
    name: str,
    candidates: int = 50,
    limit: int | None = None,
    check: Check = accept,
) -> Report:
    """Ranks the candidates of a split's queries by log-odds on the embedding tokens that a store has of them.

    Raises:
        InputError: candidates are not in the store, or their records are stale or corrupt: an evaluation is of all or
            none, and how many cannot be scored for which reason is told before the first is.
        StoreUnavailable: the store fails.
    """
    items, queries = read_split(data, split)
    known = ItemVectors(store, identity_of(ranker.manifest))
    known.check_store()
    fields = ranker.manifest.compressor.text_fields if ranker.manifest.compressor is not None else ()

    def check_store(lists: Sequence[CandidateList]) -> None:
        check(lists)
        ids = list(dict.fromkeys(chain.from_iterable(each.ids for each in lists)))
        parts = (ids[start : start + _IDS_AT_ONCE] for start in range(0, len(ids), _IDS_AT_ONCE))
        _refuse_missing(store, ids, list(chain.from_iterable(known.get(part).status for part in parts)))

    def score(query: str, chosen: list[Item]) -> Any:
        ids = [item.id for item in chosen]
        lookup = known.get(ids)
        _refuse_missing(store, ids, lookup.status)  # it may have gone since the check
        vectors = [each for each in lookup.vectors if each is not None]
        texts = [text_of(item, fields) for item in chosen] if fields else None
        return ranker.score_vectors(query, vectors, texts).log_odds

    return evaluate_ranker(score, queries, items, k=candidates, limit=limit, name=name, check=check_store)


def _refuse_missing(store: Store, ids: Sequence[str], status: Sequence[Status]) -> None:
    missing = defaultdict(list)
    for item_id, why in zip(ids, status, strict=True):
        if why != "found":
            missing[why].append(item_id)
    if not missing:
        return
    told = []
    for why, found in sorted(missing.items()):
        first = ", ".join(map(repr, found[:_IDS_NAMED])) + (", ..." if len(found) > _IDS_NAMED else "")
        told.append(f"{len(found)} {why.replace('_', ' ')} ({first})")
    raise InputError(
        f"store {store.url}: {sum(map(len, missing.values()))} of {len(ids)} candidates cannot be scored:"
        f" {', '.join(told)}; `jaxslm encode` fills it"
    )


def evaluate_checkpoint(
    model: Path,
    data: Path,
    split: str,
    *,
    mode: Literal["text", "compressed", "bi-encoder"] = "text",
    store: str | None = None,
    max_item_tokens: int | None = None,
    candidates: int = 50,
    limit: int | None = None,
    run_out: Path | None = None,
    dtype: ComputeDtype | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint, prints the table and returns a result file (DESIGN: rows and conditions) as a dict.

    Args:
        mode: "text" scores whole rows as a ranker; "compressed" reads items as embedding tokens from `store`;
            "bi-encoder" compares mean states of query and item.
        max_item_tokens: of the bi-encoder; the prompt's `max_tokens` if None. A ranker's prompt has its own limit.
        dtype: compute dtype; float32 on a CPU and bfloat16 elsewhere if None.

    Raises:
        InputError: `run_out` exists or cannot hold what it is to hold, or the checkpoint or the data break a rule.
    """
    name = model.name or model.resolve().name  # "." has no name of its own
    tag = "-".join(name.split())
    options: dict[str, Any] = {"name": name, "candidates": candidates, "limit": limit}
    if run_out is not None:
        refuse_unwritable(run_out)
        options["check"] = lambda lists: check_ids(run_out, {each.query_id: each.ids for each in lists}, tag)
    for stem in ("items", split):
        data_file(data, stem)  # missing files are told before the model loads
    if (mode == "compressed") != (store is not None):
        raise InputError("mode compressed and a store belong together")
    used = jnp.dtype(dtype or compute_dtype())
    conditions: dict[str, Any] = {"mode": mode, "dtype": used.name}
    if mode == "bi-encoder":
        checkpoint = load_checkpoint(model)
        conditions["max_item_tokens"] = max_item_tokens or checkpoint.config.prompt.max_tokens
        report = evaluate_bi_encoder(
            checkpoint, data, split, max_item_tokens=conditions["max_item_tokens"], dtype=used, **options
        )
    elif max_item_tokens is not None:
        raise InputError("max_item_tokens is the bi-encoder's: a ranker's rows are cut by its prompt")
    elif store is not None:
        with open_store(store, read_only=True) as opened:
            conditions["store"] = opened.url
            report = evaluate_store(load(model, used), opened, data, split, **options)
    else:
        report = evaluate_loaded(load(model, used), data, split, **options)
    print_report(report)
    if run_out is not None:
        write_run(run_out, report.run, tag)
    result = report.to_result()
    return result | {"conditions": result["conditions"] | conditions, "data": str(data), "split": split}


def data_file(data: Path, stem: str) -> Path:
    """Returns `data/stem.jsonl` or `data/stem.parquet`; raises InputError if there is neither."""
    found = [path for path in (data / f"{stem}.jsonl", data / f"{stem}.parquet") if path.is_file()]
    if not found:
        raise InputError(f"{data}: holds neither {stem}.jsonl nor {stem}.parquet")
    return found[0]
