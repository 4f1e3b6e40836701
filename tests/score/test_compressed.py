"""Scoring embedding tokens: alone or together, in any slot, of any number, beside texts; through the store and not."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.compress.encoder import load_encoder
from jaxslm.config import Bucket, BucketConfig, ModelConfig
from jaxslm.errors import InputError
from jaxslm.items.record import Record, pack_record, unpack_record
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.head import label_logits, label_rows
from jaxslm.model.layout import Rows
from jaxslm.score.scorer import Ranker, VectorRequest, load
from tests.compress.tiny_compressor import compressor_checkpoint
from tests.tiny import tiny_checkpoint, tiny_config

ITEMS = ["python developer", "nurse", "a job in the north", "welder and baker " * 9, "x", "pilot " * 7]
QUERIES = ("python", "night shift " * 20)
BUCKETS = BucketConfig(
    buckets=tuple(
        Bucket(tokens=640, rows=4, prefix_tokens=320, items_per_row=4, item_tokens=k + 1, vectors_per_item=k)
        for k in (1, 2, 4)
    )
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressor_checkpoint(tmp_path_factory.mktemp("compressed") / "ckpt")


@pytest.fixture(scope="module")
def ranker(checkpoint: Path) -> Ranker:
    return load(checkpoint, buckets=BUCKETS)


@pytest.fixture(scope="module")
def vectors(checkpoint: Path) -> dict[int, np.ndarray]:
    encoder = load_encoder(checkpoint)
    return {k: encoder.encode(ITEMS, k) for k in (1, 2, 4)}


def plain_logits(ranker: Ranker, query: str, vectors: np.ndarray) -> np.ndarray:
    """The logits of one item by a plain row: embeddings of the prefix, the vectors, the last word of the prompt."""
    params = ranker.params
    prefix, answer = ranker.prompt.encode_query(query), ranker.prompt.suffix_ids[-1:]
    embed = lambda ids: jnp.asarray(params["embedding"])[jnp.asarray(ids)]  # noqa: E731
    x = jnp.concatenate([embed(prefix), jnp.asarray(vectors), embed(answer)])
    x = jnp.pad(x, ((0, 320 - len(x)), (0, 0)))[None]
    hidden = _decode(ranker.config.model, params, x, len(prefix) + len(vectors) + 1)
    return np.asarray(label_logits(hidden, label_rows(params, ranker.label_token_ids)))[0]


@partial(jax.jit, static_argnums=0)
def _decode(config: ModelConfig, params: Params, x: jax.Array, length: int) -> jax.Array:
    layout = Rows(jnp.arange(x.shape[1])[None] < length)
    return jnp.asarray(Decoder(config).apply({"params": params}, x, layout, method=Decoder.decode))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_scores_are_those_of_a_plain_row_in_any_slot_and_company(
    ranker: Ranker, vectors: dict[int, np.ndarray], k: int
) -> None:
    for query in QUERIES:
        together = ranker.score_vectors(query, vectors[k]).logits
        for number in range(len(ITEMS)):
            np.testing.assert_allclose(
                together[number], plain_logits(ranker, query, vectors[k][number]), atol=1e-5, rtol=1e-5
            )
        backwards = ranker.score_vectors(query, vectors[k][::-1]).logits[::-1]
        np.testing.assert_allclose(backwards, together, atol=1e-5)
        alone = ranker.score_vectors(query, vectors[k][2:3]).logits
        np.testing.assert_allclose(alone, together[2:3], atol=1e-5)


def test_requests_and_numbers_of_vectors_mix(ranker: Ranker, vectors: dict[int, np.ndarray]) -> None:
    mixed = [vectors[1][0], vectors[4][1], vectors[1][2], vectors[2][3]]
    first, second = ranker.score_vectors_many(
        [VectorRequest(QUERIES[0], mixed), VectorRequest(QUERIES[1], list(vectors[4]))]
    )
    for number, each in enumerate(mixed):
        np.testing.assert_allclose(
            first.logits[number : number + 1], ranker.score_vectors(QUERIES[0], [each]).logits, atol=1e-5
        )
    np.testing.assert_allclose(second.logits, ranker.score_vectors(QUERIES[1], vectors[4]).logits, atol=1e-5)
    assert len(first.probabilities) == 4
    assert first.truncated == [False] * 4


def test_the_number_of_vectors_and_their_order_matter(ranker: Ranker, vectors: dict[int, np.ndarray]) -> None:
    item = vectors[4][3]
    scores = [ranker.score_vectors("python", [each]).log_odds[0] for each in (item, item[::-1], vectors[1][3])]
    assert len({round(float(score), 5) for score in scores}) == 3


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 0.02), ("int8", 0.02)])
def test_records_score_as_vectors_in_memory(
    checkpoint: Path, ranker: Ranker, vectors: dict[int, np.ndarray], dtype: str, tolerance: float
) -> None:
    identity = load_encoder(checkpoint).identity
    stored = [
        unpack_record(pack_record(Record(identity, each, "0" * 64), dtype), identity).vectors  # type: ignore[arg-type]
        for each in vectors[4]
    ]
    memory = ranker.score_vectors("python", vectors[4]).log_odds
    np.testing.assert_allclose(ranker.score_vectors("python", stored).log_odds, memory, atol=tolerance, rtol=0)


def test_texts_beside_vectors(tmp_path: Path) -> None:
    path = compressor_checkpoint(tmp_path / "ckpt", text_fields=("title",), max_text_tokens=4, answer_tokens=3)
    ranker, vectors = load(path), load_encoder(path).encode(ITEMS[:2], 2)
    scores = ranker.score_vectors("python", vectors, ["nurse", "nurse and so on and on"]).log_odds
    cut = ranker.score_vectors("python", vectors, ["nurse", "nurse and so on"]).log_odds
    np.testing.assert_allclose(scores, cut, atol=1e-6)  # four tokens of a text are read
    assert abs(ranker.score_vectors("python", vectors, ["", "x"]).log_odds[0] - scores[0]) > 1e-4
    with pytest.raises(InputError, match="texts: this compressor reads title beside the vectors"):
        ranker.score_vectors("python", vectors)


def test_bad_requests(ranker: Ranker, vectors: dict[int, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reads none beside the vectors"):
        ranker.score_vectors("python", vectors[1], ["x"] * len(ITEMS))
    with pytest.raises(InputError, match=r"item 1: vectors \[2, 48\], the ranker reads width 32"):
        ranker.score_vectors("python", [vectors[2][0], np.ones((2, 48), np.float32)])
    with pytest.raises(InputError, match="item 0: 3 vectors, the compressor was trained for 1, 2, 4"):
        ranker.score_vectors("python", [vectors[4][0][:3]])
    with pytest.raises(InputError, match="item 2: vectors must be finite"):
        ranker.score_vectors("python", [vectors[1][0], vectors[2][0], vectors[1][0] * np.nan])
    with pytest.raises(InputError, match="at least one"):
        ranker.score_vectors("python", [])
    with pytest.raises(InputError, match="query: must not be empty"):
        ranker.score_vectors(" ", vectors[1])
    with pytest.raises(InputError, match="leave no room"):
        ranker.score_vectors("word " * 3000, vectors[1])
    plain = load(tiny_checkpoint(tmp_path / "plain", tiny_config(num_layers=1)), devices=jax.devices()[:1])
    with pytest.raises(InputError, match="reads no embedding tokens"):
        plain.score_vectors("python", vectors[1])
