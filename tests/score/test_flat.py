"""The arrays of a pass in one: what was put in comes out, and a scorer hands a pass over in one array."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.config import Bucket, BucketConfig
from jaxslm.score.compiled import CompiledScorer
from jaxslm.score.flat import APART_BYTES, FlatBatch
from jaxslm.score.forward import PackRequest
from jaxslm.score.warmup import compilations
from tests.tiny import tiny_config, tiny_params, tiny_ranker_config

CONFIG = tiny_ranker_config(tiny_config())
RNG = np.random.default_rng(0)


def arrays() -> dict[str, np.ndarray]:
    """Of every dtype that passes have, odd numbers of two bytes among them, and none at all."""
    return {
        "tokens": RNG.integers(-(2**31), 2**31, 5).astype(np.int32),
        "odd": RNG.normal(size=(3, 1, 5)).astype(jnp.bfloat16),
        "none": np.zeros((0, 4), np.float32),
        "vectors": RNG.normal(size=(2, 3)).astype(np.float32),
        "halves": RNG.normal(size=(4, 2)).astype(np.float16),
        "last": RNG.integers(0, 9, (2, 2)).astype(np.int32).T,
    }


@jax.jit
def cut(batch: FlatBatch) -> dict[str, jax.Array]:
    return {name: batch[name] for name in batch}


def test_fields_come_out_as_they_went_in() -> None:
    batch = arrays()
    flat = FlatBatch.of([batch])
    assert [leaf.ndim for leaf in jax.tree.leaves(flat)] == [1]
    assert (*flat,) == (*batch,)
    assert len(flat) == len(batch)
    assert "odd" in flat
    assert "valid" not in flat
    with pytest.raises(KeyError, match="valid"):
        flat["valid"]
    found = cut(flat)
    for name, array in batch.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_each_device_gets_its_own() -> None:
    batches = [arrays(), arrays(), arrays()]
    flat = FlatBatch.of(batches)
    for number, batch in enumerate(batches):
        for name, array in cut(jax.tree.map(lambda words, number=number: words[number], flat)).items():
            np.testing.assert_array_equal(array, batch[name])


def test_a_large_array_is_not_copied_together_with_the_others() -> None:
    batch = arrays() | {"large": RNG.integers(0, 9, APART_BYTES // 4).astype(np.int32)}
    flat = FlatBatch.of([batch])
    assert [leaf is batch["large"] for leaf in jax.tree.leaves(flat)] == [False, True]
    assert set(flat) == set(batch)
    assert len(flat) == len(batch)
    for name, array in cut(flat).items():
        np.testing.assert_array_equal(array, batch[name])
    of_second = jax.tree.map(lambda leaf: leaf[1], FlatBatch.of([batch, batch]))
    np.testing.assert_array_equal(cut(of_second)["large"], batch["large"])


def test_a_program_is_compiled_once_for_the_same_fields() -> None:
    cut(FlatBatch.of([arrays()]))
    before = compilations()
    cut(FlatBatch.of([arrays()]))
    assert compilations() == before
    cut(FlatBatch.of([{"tokens": np.zeros(6, np.int32)}]))
    assert compilations() == before + 1


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("vectors", [0, 2])
def test_a_pass_is_one_array_of_the_host(devices: int, vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so are the tokens whose log-probabilities it asks for."""
    bucket = Bucket(tokens=64, rows=4, prefix_tokens=8, items_per_row=4, item_tokens=8, vectors_per_item=vectors)
    scorer = CompiledScorer(
        CONFIG,
        tiny_params(CONFIG.model),
        dtype=jnp.float32,
        devices=jax.devices()[:devices],
        buckets=BucketConfig(buckets=(bucket,)),
    )
    handed: list[int] = []

    def counted(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            leaves = jax.tree.leaves(arguments)
            handed.append(sum(isinstance(leaf, np.ndarray) for leaf in leaves))
            return function(*arguments)

        return call

    for name in ("score_fn", "_log_prob_fn"):
        monkeypatch.setattr(scorer, name, counted(getattr(scorer, name)))
    items = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    given = RNG.normal(size=(3, vectors, CONFIG.model.width)).astype(np.float32) if vectors else None
    logits = scorer.logits([PackRequest([1, 2], items, given, label_ids=(5,))])
    assert np.isfinite(logits[:, :3]).all()
    assert handed == [1, 1]
