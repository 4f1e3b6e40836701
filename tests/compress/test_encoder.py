"""The item encoder: what an item's vectors depend on, and what they do not."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.checkpoint import load_checkpoint, load_manifest
from jaxslm.compress.encoder import COMPRESSOR, ItemEncoder, identity_of, load_encoder
from jaxslm.compress.pooling import pool, segments
from jaxslm.compress.projector import init_projector, pass_through_projector, project
from jaxslm.config import Pooling
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.items.record import RecordIdentity
from jaxslm.model.decoder import Decoder
from jaxslm.score.warmup import compilations
from tests.compress.tiny_compressor import compressor_checkpoint, compressor_config
from tests.tiny import every_state, tiny_checkpoint, tiny_config

TEXTS = ["python developer", "nurse", "a job in the north, é " * 3, "welder and baker " * 9, "x"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressor_checkpoint(tmp_path_factory.mktemp("encoder") / "ckpt")


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> ItemEncoder:
    return load_encoder(checkpoint)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 40])
@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
def test_segments_are_contiguous_equal_and_cover_the_item(length: int, k: int) -> None:
    [pairs] = segments(np.array([length]), k, "mean").tolist()
    assert all(0 <= first < end <= length for first, end in pairs)
    if length >= k:
        assert [0, *(end for _, end in pairs)] == [*(first for first, _ in pairs), length]
        assert {end - first for first, end in pairs} <= {length // k, length // k + 1}
    else:
        assert pairs == [[i * length // k, i * length // k + 1] for i in range(k)]
        assert {first for first, _ in pairs} == set(range(length))
    [last] = segments(np.array([length]), k, "last").tolist()
    assert [first for first, _ in last] == [max(0, length - k + i) for i in range(k)]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooling_is_the_mean_of_each_segment(pooling: Pooling) -> None:
    states = np.random.default_rng(0).standard_normal((2, 9, 3)).astype(np.float32)
    places = segments(np.array([9, 2]), 4, pooling)
    pooled = np.asarray(pool(jnp.asarray(states), jnp.asarray(places)))
    for row in range(2):
        for vector, (first, end) in zip(pooled[row], places[row], strict=True):
            np.testing.assert_allclose(vector, states[row, first:end].mean(axis=0), atol=1e-6)


def test_a_new_projector_has_the_scale_of_token_embeddings_and_tells_items_apart() -> None:
    generator = np.random.default_rng(0)
    common = 30 * generator.standard_normal(32)
    pooled = (common + generator.standard_normal((200, 32))).astype(np.float32)  # nearly parallel, and large
    config = compressor_config()
    vectors = np.asarray(project(config, init_projector(config, pooled, 0.13), jnp.asarray(pooled)))
    assert np.sqrt(np.mean(vectors**2)) == pytest.approx(0.13, rel=1e-3)
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=1e-4)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.abs((unit @ unit.T)[np.triu_indices(200, 1)]).mean() < 0.5


def test_a_projector_that_passes_through_keeps_the_direction_of_the_stream() -> None:
    generator = np.random.default_rng(0)
    common, scale = 3 * generator.standard_normal(32), generator.uniform(0.5, 2, 32)
    pooled = (common + generator.standard_normal((200, 32))).astype(np.float32)
    config = compressor_config()
    projector = pass_through_projector(config, pooled[:100], scale, 0.1)
    vectors, stream = np.asarray(project(config, projector, jnp.asarray(pooled))), pooled / scale
    cosines = np.sum(vectors * stream, axis=1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(stream, axis=1)
    assert cosines.min() > 0.999  # items outside the sample too
    assert np.sqrt(np.mean(vectors**2)) == pytest.approx(15, rel=0.05)
    wider = config.model_copy(update={"width": 64})
    with pytest.raises(InputError, match="encoder width 32 is not the ranker's 64"):
        pass_through_projector(wider, pooled, scale, 0.1)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_an_item_has_the_same_vectors_in_any_company(encoder: ItemEncoder, k: int) -> None:
    together = encoder.encode(TEXTS, k)
    assert together.shape == (len(TEXTS), k, 32)
    assert together.dtype == np.float32
    for number, text in enumerate(TEXTS):
        np.testing.assert_allclose(encoder.encode([text], k)[0], together[number], atol=1e-5)
    many = encoder.encode([*TEXTS[::-1], *(f"cook {n}" for n in range(70))], k)
    np.testing.assert_allclose(many[: len(TEXTS)][::-1], together, atol=1e-5)


def test_items_of_all_lengths(encoder: ItemEncoder) -> None:
    assert encoder.token_counts(["x"]) == [2]
    short = encoder.encode(["x"], 4)[0]  # two tokens, four vectors: each token twice
    np.testing.assert_allclose(short[0], short[1], atol=1e-6)
    np.testing.assert_allclose(short[2], short[3], atol=1e-6)
    assert not np.allclose(short[0], short[2])
    long, longer = "welder " * 50, "welder " * 50 + "pilot"
    assert min(encoder.token_counts([long])) > encoder.config.max_item_tokens
    np.testing.assert_array_equal(encoder.encode([long], 2), encoder.encode([longer], 2))
    with pytest.raises(InputError, match="item 1: has no text"):
        encoder.encode(["x", " \n"], 1)
    with pytest.raises(InputError, match="item 0: has no text"):
        encoder.token_counts([Item(id="a", text="", title=" ")])


def test_title_and_text_are_read(encoder: ItemEncoder) -> None:
    title, text = encoder.encode([Item(id="a", text="text", title="title"), Item(id="b", text="title\ntext")], 2)
    np.testing.assert_array_equal(title, text)


def test_control_tokens_in_texts_stay_text(encoder: ItemEncoder) -> None:
    assert encoder.token_counts(["<|im_end|>"])[0] > 5


def test_a_k_that_was_not_trained_is_refused(encoder: ItemEncoder) -> None:
    with pytest.raises(InputError, match="k = 3: this compressor was trained for 1, 2, 4"):
        encoder.encode(["x"], 3)


def test_an_item_is_read_behind_the_prefix_and_pooled_without_it(tmp_path: Path) -> None:
    """With one vector an item's pooled state is the mean of its own states in the row prefix + item."""
    prompt = load_checkpoint(compressor_checkpoint(tmp_path / "bare")).prompt
    before = tuple(prompt.item_prefix_ids)
    loaded = load_checkpoint(compressor_checkpoint(tmp_path / "ckpt", prefix_ids=before), extra=[COMPRESSOR])
    encoder, decoder = load_encoder(tmp_path / "ckpt"), Decoder(compressor_config().encoder)
    ids = [[5, 9, 17], [4], [20] * 45]
    pooled, cut = encoder.pooled(ids), [each[:40] for each in ids]
    for number, each in enumerate(cut):
        row = jnp.array([[*before, *each]])
        states = every_state(decoder, loaded.extra[COMPRESSOR]["encoder"], row)
        np.testing.assert_allclose(pooled[1][number, 0], states[0, len(before) :].mean(axis=0), atol=1e-5)
    bare = load_encoder(tmp_path / "bare").pooled(ids)
    assert not np.allclose(bare[1], pooled[1], atol=1e-3)
    together = encoder.encode(TEXTS, 2)
    for number, text in enumerate(TEXTS):
        np.testing.assert_allclose(encoder.encode([text], 2)[0], together[number], atol=1e-5)


def test_few_programs_serve_every_k_and_number_of_items(encoder: ItemEncoder) -> None:
    encoder.encode(TEXTS, 4)
    before = compilations()
    encoder.encode(TEXTS * 20, 1)
    encoder.encode(TEXTS[:1], 2)
    assert compilations() == before


def test_what_a_record_is_good_for(checkpoint: Path, tmp_path: Path) -> None:
    base = identity_of(load_manifest(checkpoint))
    assert base == load_encoder(checkpoint).identity

    def identity(name: str, seed: int = 0, **changes: Any) -> RecordIdentity:
        return identity_of(load_manifest(compressor_checkpoint(tmp_path / name, seed=seed, **changes)))

    same, other = identity("same"), identity("other", seed=1)
    settings, prefixed = identity("settings", pooling="last"), identity("prefixed", prefix_ids=(7,))
    assert same == base
    assert other.encoder_sha256 != base.encoder_sha256
    assert other.ranker_sha256 != base.ranker_sha256
    assert len({base.encoder_sha256, settings.encoder_sha256, prefixed.encoder_sha256}) == 3
    assert settings.ranker_sha256 == base.ranker_sha256
    # As it was before there was a prefix: records from then stay good.
    manifest = load_manifest(checkpoint)
    assert manifest.compressor is not None
    settings_then = manifest.compressor.model_dump_json().replace('"prefix_ids":[],', "")
    assert "prefix_ids" not in settings_then
    text = manifest.extra[COMPRESSOR].sha256 + settings_then
    assert base.encoder_sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_checkpoints_without_a_fitting_compressor(tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", tiny_config("llama", num_layers=1))
    with pytest.raises(InputError, match="holds no compressor: `jaxslm train compressor`"):
        load_encoder(plain)
    path = compressor_checkpoint(tmp_path / "other")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["compressor"]["width"] = 48
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="vectors have width 48, the ranker 32"):
        load_encoder(path)


def test_another_tokenizer_than_the_manifests(tmp_path: Path) -> None:
    path = compressor_checkpoint(tmp_path / "ckpt", tokenizer_sha256="0" * 64)
    with pytest.raises(InputError, match="encoder's tokenizer is missing or damaged"):
        load_encoder(path)
    assert COMPRESSOR in load_manifest(path).extra
