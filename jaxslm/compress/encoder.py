"""The item encoder: an item's text becomes k embedding tokens, once, whatever the query.

    text -> tokens -> causal decoder -> final states -> mean of k segments -> projector -> k vectors of width D

An encoder that was trained on items behind a prompt's words reads them behind these still: its states of a bare text
rank worse (docs/results/compression.md).

It was started from a text ranker and trained with the ranker that reads its vectors (`jaxslm train compressor`). Both
may differ in depth, widths and vocabulary; only the vectors' width D is shared.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxslm.checkpoint import Checkpoint, Manifest, Tree, load_checkpoint, load_manifest
from jaxslm.compress.pooling import pool, segments
from jaxslm.compress.projector import project
from jaxslm.config import CompressorConfig
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.items.record import RecordIdentity
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.layout import EveryToken
from jaxslm.prompt import text_tokenizer

COMPRESSOR = "compressor"
"""The checkpoint's item that holds `{"encoder": parameters of a decoder, "projector": ...}`."""
ENCODER_TOKENIZER = "encoder-tokenizer.json"
"""The file in a checkpoint's tokenizer folder that holds the encoder's tokenizer where it is not the ranker's."""
LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Row lengths that are compiled, up to the encoder's limit."""


Encode = Callable[[np.ndarray, np.ndarray, np.ndarray], Array]
"""(tokens [B, T], valid [B, T], segments [B, C, 2]) -> [B, C, ...]"""


class ItemTokenizer:
    """Items as the encoder reads them: the title, a new line and the text; what stands before is `prefix_ids`."""

    def __init__(self, tokenizer_json: str) -> None:
        """Raises InputError if `tokenizer_json` is broken."""
        self._tokenizer = text_tokenizer(tokenizer_json)

    def __call__(self, items: Sequence[str | Item]) -> list[list[int]]:
        """Returns the token ids of each item, uncut. Raises InputError for one without text."""
        texts = [_text(item) for item in items]
        if "" in texts:
            raise InputError(f"item {texts.index('')}: has no text")
        encodings = self._tokenizer.encode_batch_fast([" " + text for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _text(item: str | Item) -> str:
    title, body = ("", item) if isinstance(item, str) else (item.title or "", item.text)
    return f"{title.strip()}\n{body.strip()}".strip()


def pooled_states(
    decoder: Decoder,
    prefix_ids: Sequence[int],
    params: Params,
    tokens_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
    segments_BC2: Int[Array, "B C 2"],
) -> Float[Array, "B C E"]:
    """Returns the mean final state of each segment of each item behind the prefix, float32.

    The prefix is read once for all items.

    Args:
        params: the decoder's. valid_BT: real tokens, which come first. segments_BC2: places in the items' rows.
    """
    (B, T), P = tokens_BT.shape, len(prefix_ids)
    M = P + B * T
    tokens_M = jnp.concatenate([jnp.array(prefix_ids, tokens_BT.dtype), tokens_BT.reshape(-1)])
    prefix_1P = jnp.arange(P)[None] if P else jnp.full((1, 1), M)
    items_BT = jnp.where(valid_BT, P + jnp.arange(B * T).reshape(B, T), M)
    states_ME = jnp.asarray(decoder.apply({"params": params}, tokens_M, EveryToken(prefix_1P, items_BT[None], M)))
    return pool(states_ME[P:].reshape(B, T, -1), segments_BC2)


TokenRow = Sequence[int] | Int[np.ndarray, " _"]


class VectorEncoder:
    """Encodes items on the first local device. An item's vectors do not depend on what it is encoded with.

    Attributes:
        config: what the compressor is.
    """

    def __init__(
        self, config: CompressorConfig, params: Tree, tokenizer_json: str, dtype: DTypeLike | None = None
    ) -> None:
        """Args: params: `{"encoder", "projector"}`. dtype: compute dtype; float32 on CPU, else bfloat16, if None."""
        self.config = config
        on_cpu = jax.default_backend() == "cpu"
        self._dtype = jnp.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16))
        self._tokens_per_pass = 1024 if on_cpu else 32768
        self._tokenizer = ItemTokenizer(tokenizer_json)
        self._lengths = [*(length for length in LENGTHS if length < config.max_item_tokens), config.max_item_tokens]
        self._states = jax.jit(partial(pooled_states, Decoder(config.encoder, self._dtype), config.prefix_ids))
        self._project = jax.jit(partial(project, config))
        self.load(params)

    def load(self, params: Tree) -> None:
        """Encodes with these parameters from now on; nothing is compiled again."""
        self._params = jax.tree.map(lambda leaf: jnp.asarray(leaf, self._dtype), params["encoder"])
        self._projector = params["projector"]

    def warm_up(self) -> None:
        """Compiles every length, so that no later call does."""
        self._passes([[0] * length for length in self._lengths], self.config.width, self._vectors)

    def token_counts(self, items: Sequence[str | Item]) -> list[int]:
        """Returns the tokens of each item; of those beyond `config.max_item_tokens` the encoder reads nothing.

        Raises:
            InputError: an item without text ("item N: has no text").
        """
        return [len(ids) for ids in self._tokenizer(items)]

    @property
    def ks(self) -> tuple[int, ...]:
        """How many vectors an item may become."""
        return self.config.ks

    def pass_shape(self, tokens: int) -> tuple[int, int]:
        """Returns (rows, length) of the pass that encodes an item of so many tokens; the prefix is not counted."""
        length = self._lengths[int(np.searchsorted(self._lengths, min(tokens, self.config.max_item_tokens)))]
        return max(1, (self._tokens_per_pass - len(self.config.prefix_ids)) // length), length

    def encode(self, items: Sequence[str | Item], k: int) -> Float32[np.ndarray, "n k D"]:
        """Returns the k embedding tokens of each item.

        Items are computed in passes of one static shape per class of lengths, so that nothing depends on their number,
        order or company; sorted by length they make the fewest passes.

        Raises:
            InputError: an item without text, or a k that the compressor was not trained for.
        """
        if k not in self.config.ks:
            raise InputError(f"k = {k}: this compressor was trained for {', '.join(map(str, self.config.ks))}")
        return self.encode_all(items)[k]

    def encode_all(self, items: Sequence[str | Item]) -> dict[int, Float32[np.ndarray, "n k D"]]:
        """Returns the embedding tokens of each item for every k, in one pass over the text. Raises as `encode`."""
        return self._passes(self._tokenizer(items), self.config.width, self._vectors)

    def pooled(self, ids: Sequence[TokenRow]) -> dict[int, Float32[np.ndarray, "n k E"]]:
        """Returns the pooled states of items given as token ids, for every k: what the projector reads."""
        return self._passes(ids, self.config.encoder.width, self._pooled)

    def _vectors(self, tokens: np.ndarray, valid: np.ndarray, places: np.ndarray) -> Array:
        return self._project(self._projector, self._pooled(tokens, valid, places))

    def _pooled(self, tokens: np.ndarray, valid: np.ndarray, places: np.ndarray) -> Array:
        return self._states(self._params, tokens, valid, places)

    def _passes(self, ids: Sequence[TokenRow], width: int, encode: Encode) -> dict[int, np.ndarray]:
        """Returns per k what `encode` makes of the items' segments, [n, k, width].

        One program serves every k: an item's states cost so much more than its vectors that all are computed.
        """
        ks, limit = self.config.ks, self.config.max_item_tokens
        lengths = np.array([min(len(each), limit) for each in ids], np.int64)
        classes = np.searchsorted(self._lengths, lengths)
        vectors = np.empty((len(ids), sum(ks), width), np.float32)
        queued = []
        for number in np.unique(classes):
            rows, length = self.pass_shape(self._lengths[number])
            members = np.flatnonzero(classes == number)
            for start in range(0, len(members), rows):
                chosen = members[start : start + rows]
                batch = pad_items([ids[place][:limit] for place in chosen], rows, length)
                counts = np.ones(rows, np.int64)
                counts[: len(chosen)] = lengths[chosen]
                places = np.concatenate([segments(counts, k, self.config.pooling) for k in ks], axis=1)
                queued.append((chosen, encode(*batch, places)))
        for chosen, result in queued:
            vectors[chosen] = np.asarray(result)[: len(chosen)]
        return dict(zip(ks, np.split(vectors, np.cumsum(ks)[:-1], axis=1), strict=True))


class ItemEncoder(VectorEncoder):
    """The encoder of a checkpoint. identity: what its records are good for."""

    def __init__(self, checkpoint: Checkpoint, config: CompressorConfig, dtype: DTypeLike | None = None) -> None:
        """Args: checkpoint: with the item "compressor", which `config` describes. dtype: as for `VectorEncoder`."""
        tokenizer_json = encoder_tokenizer_json(checkpoint.tokenizer_files, config)
        super().__init__(config, checkpoint.extra[COMPRESSOR], tokenizer_json, dtype)
        self.identity = identity_of(checkpoint.manifest)


def pad_items(ids: Sequence[TokenRow], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens int32 and valid bool, both [rows, length], of items of at most `length` tokens."""
    tokens, valid = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row, each in enumerate(ids):
        tokens[row, : len(each)], valid[row, : len(each)] = each, True
    return tokens, valid


def encoder_tokenizer_json(tokenizer_files: Mapping[str, bytes], config: CompressorConfig) -> str:
    """Returns the encoder's `tokenizer.json` of a checkpoint; raises InputError if it is missing or damaged."""
    content = tokenizer_files.get(ENCODER_TOKENIZER, tokenizer_files["tokenizer.json"])
    if hashlib.sha256(content).hexdigest() != config.tokenizer_sha256:
        raise InputError("the encoder's tokenizer is missing or damaged (sha256 differs from the manifest's)")
    return content.decode()


def identity_of(manifest: Manifest) -> RecordIdentity:
    """Returns what records of a checkpoint's compressor are good for. Settings are part of the encoder's hash.

    Raises:
        InputError: the checkpoint holds no compressor.
    """
    if manifest.compressor is None or COMPRESSOR not in manifest.extra:
        raise InputError("the checkpoint holds no compressor: `jaxslm train compressor` makes one")
    # Left out where it is not set, so that records from before it stay good.
    unset = {"prefix_ids"} if not manifest.compressor.prefix_ids else set()
    parts = manifest.extra[COMPRESSOR].sha256 + manifest.compressor.model_dump_json(exclude=unset)
    return RecordIdentity(
        encoder_sha256=hashlib.sha256(parts.encode()).hexdigest(),
        ranker_sha256=manifest.params_sha256,
        template_sha256=manifest.template_sha256,
    )


def load_encoder(path: str | Path, dtype: DTypeLike | None = None) -> ItemEncoder:
    """Returns the item encoder of a checkpoint folder.

    Args:
        dtype: compute dtype; float32 on CPU and bfloat16 elsewhere if None.

    Raises:
        InputError: no checkpoint there, one without a compressor, or a damaged one.
    """
    path = Path(path)
    config = load_manifest(path).compressor
    if config is None:
        raise InputError(f"{path}: holds no compressor: `jaxslm train compressor` makes one")
    return ItemEncoder(load_checkpoint(path, extra=[COMPRESSOR]), config, dtype)
