"""`jaxslm prune`: a checkpoint in, a smaller one out, with the masks that lead from one to the other."""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from jaxslm.atomic import refuse_existing
from jaxslm.checkpoint import Checkpoint, load_checkpoint, load_manifest, save_checkpoint
from jaxslm.data_files import Item, read_records
from jaxslm.errors import InputError
from jaxslm.prune.calibrate import Calibration, read_calibration, request_texts
from jaxslm.prune.depth import order_kept
from jaxslm.prune.masks import Masks
from jaxslm.prune.model import Pruned, PruneSettings, check_target, prune_model, removes_anything
from jaxslm.prune.report import describe, print_result
from jaxslm.prune.vocab import cut_vocabulary

MASKS = "masks"
"""The checkpoint's item that holds the masks over its parent's parts."""


def prune_checkpoint(
    model: Path,
    calibration: Path,
    out: Path,
    settings: PruneSettings,
    *,
    items: Path | None = None,
    vocab_keep: Path | None = None,
) -> dict[str, Any]:
    """Prunes a checkpoint, prints what it did and returns it as a JSON-able dict.

    The result's parent is `model`; a compressor stays as it is, for its vectors have the model's width.

    Args:
        calibration, items: as `read_calibration`. vocab_keep: items whose tokens stay, all others go; with the
            calibration prompts' own.

    Raises:
        InputError: `out` exists, the target does not fit the model or leaves nothing to do, or the checkpoint or a file
            breaks a rule. Nothing is written then.
    """
    refuse_existing(out)
    manifest = load_manifest(model)
    check_target(manifest.ranker.model, settings)
    if vocab_keep is None and not removes_anything(manifest.ranker.model, settings):
        raise InputError(
            "nothing to prune: give --mlp-keep or --kv-groups-keep below what there is, --drop-layers or --vocab-keep"
        )
    if vocab_keep is not None and manifest.compressor is not None:
        raise InputError(
            "--vocab-keep: this checkpoint's compressor reads the whole vocabulary; cut it before training one"
        )
    dense = load_checkpoint(model, extra=[name for name in manifest.extra if name != MASKS])
    start = time.perf_counter()
    prompts = read_calibration(
        calibration, items, dense.prompt, max_tokens=settings.calibration_tokens, seed=settings.seed
    )
    pruned = prune_model(dense.config, dense.params, prompts, settings)
    order = None
    if settings.drop_layers:
        ranker = dense.config.model_copy(update={"model": pruned.config})
        order = order_kept(dense.config, dense.params, ranker, pruned.params, prompts)
    small, masks = _with_vocabulary(dense, pruned, vocab_keep, calibration, items)
    seconds = time.perf_counter() - start
    saved = save_checkpoint(
        out,
        small.config,
        small.params,
        small.tokenizer_files,
        source=_source(manifest.source, settings, prompts, calibration),
        parent=manifest.params_sha256,
        metrics={"prune_seconds": round(seconds, 2)},
        extra={**dense.extra, MASKS: masks.tree()},
        compressor=manifest.compressor,
    )
    result = describe(manifest, saved, pruned.layers, masks, prompts, settings, order)
    result |= {"checkpoint": str(out), "calibration_file": str(calibration), "seconds": round(seconds, 2)}
    print_result(result)
    return result


def _with_vocabulary(
    dense: Checkpoint, pruned: Pruned, vocab_keep: Path | None, calibration: Path, items: Path | None
) -> tuple[Checkpoint, Masks]:
    """Returns the pruned checkpoint in memory and its masks, the vocabulary cut if it is asked for."""
    ranker = dense.config.model_copy(update={"model": pruned.config})
    small = replace(dense, manifest=dense.manifest.model_copy(update={"ranker": ranker}), params=pruned.params)
    if vocab_keep is None:
        return small, pruned.masks
    texts = chain(_item_texts(vocab_keep), request_texts(calibration, items))
    small, keep_vocab_V = cut_vocabulary(small, texts)
    return small, replace(pruned.masks, keep_vocab=keep_vocab_V)


def _item_texts(path: Path) -> Iterator[str]:
    for item in read_records(path, Item):
        yield from (text for text in (item.title, item.text) if text)


def _source(parent: str, settings: PruneSettings, prompts: Calibration, file: Path) -> str:
    """What was done, in words."""
    asked = settings.model_dump(exclude_defaults=True) | {"criterion": settings.criterion}
    words = ", ".join(f"{name} {value}" for name, value in asked.items())
    return f"{parent}; pruned: {words}; calibrated on {file.name}, token ids sha256 {prompts.sha256[:16]}"
