"""`jaxslm train compressor`: an item encoder and a ranker that reads both its vectors and full text."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxslm.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from jaxslm.compress.encoder import (
    COMPRESSOR,
    ENCODER_TOKENIZER,
    ItemTokenizer,
    VectorEncoder,
    encoder_tokenizer_json,
)
from jaxslm.compress.projector import init_projector, pass_through_projector
from jaxslm.compress.splice import MixedPrompt, text_of
from jaxslm.config import CompressorConfig
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.depth import first_layers
from jaxslm.prompt import Prompt
from jaxslm.score.buckets import few_buckets
from jaxslm.score.scorer import Ranker
from jaxslm.train.compressor_data import CompressorBatches, CompressorItems, MixedLists
from jaxslm.train.compressor_settings import CompressorSettings, CompressorTraining
from jaxslm.train.compressor_step import (
    Models,
    compressor_loss,
    compressor_optimiser,
    compressor_partition,
    compressor_rates,
    compressor_work,
)
from jaxslm.train.data import ranker_data
from jaxslm.train.heldout import HeldOut, Readable
from jaxslm.train.hosts import join_hosts
from jaxslm.train.loop import Task, TrainResult, dtype_of, run
from jaxslm.train.start import load_start
from jaxslm.train.step import make_mesh
from jaxslm.train.teacher import Teacher, load_teacher

SAMPLE = 256
"""Items whose states set a new projector's scale."""


@dataclass(frozen=True)
class StartingCompressor:
    """A compressor before the first update: `projector` is None if it is to be made."""

    config: CompressorConfig
    encoder: Params
    projector: Params | None
    tokenizer_json: str


def train_compressor(settings: CompressorTraining, out: Path) -> TrainResult:
    """Trains a compressor with its ranker, or goes on with it; see `jaxslm.train.loop.run`.

    The result is the ranker's checkpoint with the item "compressor": it scores text as before, and vectors.
    """
    join_hosts()
    mesh, dtype = make_mesh(), dtype_of(settings)
    start = load_start(settings, mesh)
    first = start_compressor(settings.compressor, settings.model, start, mesh)
    held_out = HeldOut(settings.evaluation, readable_as_vectors(first, start.prompt, max(settings.chosen_ks)))
    data = ranker_data(settings.data, start.prompt)
    items = CompressorItems.of(data, first.config, ItemTokenizer(first.tokenizer_json))
    encoder = Encoding(start, first, dtype)
    if not settings.optimiser.encoder_factor:
        items = replace(items, pooled=encoder.pooled(items.ids, data.judged_rows))
    projector = first.projector or encoder.new_projector(items, data.judged_rows, start.params["embedding"], settings)
    partition = compressor_partition(settings, start.config)
    ranker = Decoder(start.config.model, dtype, settings.remat)
    models = Models(start.config, first.config, ranker, Decoder(first.config.encoder, dtype, settings.remat))
    teacher = _teacher(settings, start, dtype, mesh)
    task = Task(
        kind="compressor",
        start=start,
        loss_fn=compressor_loss(models, settings.losses, partition, mesh, teacher),
        batches=CompressorBatches(
            settings,
            start.prompt,
            data,
            MixedLists(settings.data, first.config, start.prompt, items),
            parts=settings.optimiser.accumulate * len(mesh.local_devices),
            host=jax.process_index(),
            hosts=jax.process_count(),
        ),
        work=lambda batch: compressor_work(models, batch),
        evaluate=lambda params: encoder.evaluate(params, held_out, settings.chosen_ks),
        evaluation_sha256=held_out.sha256,
        partition=partition,
        optimiser=compressor_optimiser(settings),
        rates=compressor_rates(settings, "projector"),
        save=lambda path, params, metrics: _save(path, start, first, params, metrics),
        dtype=dtype,
        mesh=mesh,
        params={"ranker": start.params, "encoder": first.encoder, "projector": projector},
        teacher=teacher.params if teacher is not None else {},
    )
    return run(task, settings, out)


def start_compressor(settings: CompressorSettings, model: str, start: Checkpoint, mesh: Mesh) -> StartingCompressor:
    """Returns the compressor before the first update, its parameters in float32 and whole on every device.

    Raises:
        InputError: a checkpoint that does not exist or holds no compressor, vectors of another width than the ranker's,
            or fewer layers than are to be kept.
    """
    whole = NamedSharding(mesh, P())
    width = start.config.model.width
    names = ("ks", "max_item_tokens", "answer_tokens", "text_fields", "max_text_tokens")
    own: dict[str, Any] = {name: getattr(settings, name) for name in names}
    if settings.start is not None:
        source = load_checkpoint(Path(settings.start), whole, extra=[COMPRESSOR])
        config = source.manifest.compressor
        if config is None:
            raise InputError(f"{settings.start}: holds no compressor")
        if config.width != width:
            raise InputError(f"{settings.start}: its vectors have width {config.width}, the ranker {width}")
        tree = _float32(source.extra[COMPRESSOR])
        tokenizer_json = encoder_tokenizer_json(source.tokenizer_files, config)
        return StartingCompressor(config.model_copy(update=own), tree["encoder"], tree["projector"], tokenizer_json)
    source = load_checkpoint(Path(settings.encoder or model), whole)
    shape, params = source.config.model, _float32(source.params)
    if settings.layers is not None:
        shape, params = first_layers(shape, params, settings.layers)
    # An encoder has no vocabulary head.
    shape = shape.model_copy(update={"tie_embeddings": True})
    params = {name: leaf for name, leaf in params.items() if name != "head"}
    tokenizer = source.tokenizer_files["tokenizer.json"]
    config = CompressorConfig(
        encoder=shape,
        width=width,
        pooling=settings.pooling,
        prefix_ids=tuple(source.prompt.item_prefix_ids) if settings.behind_prompt else (),
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        **own,
    )
    return StartingCompressor(config, params, None, tokenizer.decode())


def readable_as_vectors(first: StartingCompressor, prompt: Prompt, k: int) -> Readable:
    """Returns what raises InputError for an item without text, or a query that leaves no room for k vectors."""
    config, tokenizer = first.config, ItemTokenizer(first.tokenizer_json)
    mixed = MixedPrompt(prompt, config)

    def readable(query: str, items: list[Item]) -> None:
        tokenizer(items)
        texts = [text_of(item, config.text_fields) for item in items] if config.text_fields else None
        mixed.encode(query, [k] * len(items), texts)

    return readable


class Encoding:
    """The item encoder of a run, outside the update: for what is computed once, and for evaluation."""

    def __init__(self, start: Checkpoint, first: StartingCompressor, dtype: jnp.dtype) -> None:
        self._start, self._first, self._config, self._dtype = start, first, first.config, dtype
        params = {"encoder": first.encoder, "projector": first.projector}
        self.items = VectorEncoder(first.config, params, first.tokenizer_json, dtype)

    def pooled(self, ids: Sequence[np.ndarray], rows: np.ndarray) -> dict[int, np.ndarray]:
        """Returns the pooled states of these rows of a catalogue, per k [items, k, E]; 0 for those of others.

        Lists hold judged items alone, and states of the rest would be computed for nothing.
        """
        of_all = {}
        for k, states in self.items.pooled([ids[row] for row in rows.tolist()]).items():
            of_all[k] = np.zeros((len(ids), *states.shape[1:]), states.dtype)
            of_all[k][rows] = states
        return of_all

    def new_projector(
        self, items: CompressorItems, rows: np.ndarray, embedding_VD: Any, settings: CompressorTraining
    ) -> Params:
        """Returns the projector before the first update, of the kind that the settings name; fitted to these rows."""
        seed = settings.data.seed
        chosen = np.random.default_rng(seed).permutation(rows)[:SAMPLE]
        if items.pooled is not None:
            pooled = {k: states[chosen] for k, states in items.pooled.items()}
        else:
            pooled = self.items.pooled([items.ids[row] for row in chosen.tolist()])
        states = np.concatenate([each.reshape(-1, each.shape[-1]) for each in pooled.values()])
        target = float(jnp.sqrt(jnp.mean(jnp.square(embedding_VD))))
        if settings.compressor.projector == "pass_through":
            scale_E = np.asarray(self._first.encoder["final_norm"]["scale"], np.float64)
            return pass_through_projector(self._config, states, scale_E, target)
        return init_projector(self._config, states, target, seed)

    def evaluate(self, params: Params, held_out: HeldOut, ks: tuple[int, ...]) -> dict[str, float]:
        """Returns `HeldOut.evaluate` on vectors: the mean over ks, and each alone as "ndcg_at_10_k8"."""
        self.items.load({name: params[name] for name in ("encoder", "projector")})
        manifest = self._start.manifest.model_copy(update={"compressor": self._config})
        checkpoint = Checkpoint(manifest, params["ranker"], self._start.tokenizer_files)
        buckets = few_buckets(jax.default_backend(), self._start.config, self._config)
        ranker, fields = Ranker(checkpoint, self._dtype, buckets=buckets), self._config.text_fields
        chosen = held_out.candidates
        vectors = self.items.encode_all(chosen)
        place = {item.id: number for number, item in enumerate(chosen)}
        reports = {}
        for k in ks:

            def score(query: str, items: list[Item], k: int = k) -> np.ndarray:
                texts = [text_of(item, fields) for item in items] if fields else None
                return ranker.score_vectors(query, vectors[k][[place[item.id] for item in items]], texts).log_odds

            reports[k] = held_out.evaluate(score)
        numbers = {name: float(np.mean([each[name] for each in reports.values()])) for name in reports[ks[0]]}
        return numbers | {f"ndcg_at_10_k{k}": report["ndcg_at_10"] for k, report in reports.items()}


def _teacher(settings: CompressorTraining, start: Checkpoint, dtype: jnp.dtype, mesh: Mesh) -> Teacher | None:
    if not settings.losses.uses_teacher or settings.data.teacher_scores is not None:
        return None
    if settings.teacher is not None:
        path = Path(settings.teacher.checkpoint)
        return load_teacher(path, start, dtype, mesh, hidden=settings.losses.hidden > 0)
    return Teacher(start.params, Decoder(start.config.model, dtype), start.config.label_token_ids, mesh)


def _float32(params: Params) -> Params:
    tree: Params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    return tree


def _save(
    path: Path, start: Checkpoint, first: StartingCompressor, params: Params, metrics: Mapping[str, float]
) -> None:
    files = {name: content for name, content in start.tokenizer_files.items() if name != ENCODER_TOKENIZER}
    if files["tokenizer.json"].decode() != first.tokenizer_json:
        files[ENCODER_TOKENIZER] = first.tokenizer_json.encode()
    save_checkpoint(
        path,
        start.config,
        params["ranker"],
        files,
        source=f"jaxslm train compressor from {start.manifest.source}",
        parent=start.manifest.params_sha256,
        metrics=metrics,
        extra={COMPRESSOR: {name: params[name] for name in ("encoder", "projector")}},
        compressor=first.config,
    )
