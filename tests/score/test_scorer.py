"""The ranker, its warm-up and its portable artefacts."""

import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.compilation_cache import compilation_cache

from jaxslm.bench.workloads import MODELS
from jaxslm.config import Bucket, BucketConfig, PromptConfig, RankerConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import abstract_params
from jaxslm.model.layout import LONG_PREFIX
from jaxslm.score.compiled import CompiledScorer, make_score_fn
from jaxslm.score.forward import PackRequest
from jaxslm.score.packing import Packer
from jaxslm.score.scorer import Ranker, Scores, load
from jaxslm.score.warmup import (
    abstract_batch,
    compilations,
    compile_ahead,
    export_score_fn,
    use_compilation_cache,
    warm_up,
)
from pallas_kernels import dispatch
from tests.tiny import tiny_checkpoint, tiny_config, tiny_params, tiny_ranker_config

BUCKETS = BucketConfig(
    buckets=(
        Bucket(tokens=512, rows=4, prefix_tokens=320, items_per_row=1, item_tokens=128),
        Bucket(tokens=640, rows=8, prefix_tokens=320, items_per_row=1, item_tokens=256),
    )
)
CONFIG = tiny_ranker_config(tiny_config())
SMALL = Bucket(tokens=32, rows=2, prefix_tokens=8, items_per_row=2, item_tokens=8)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    return load(tiny_checkpoint(tmp_path_factory.mktemp("scorer") / "ckpt", CONFIG.model), buckets=BUCKETS)


def test_nothing_compiles_after_warm_up_and_the_garbage_collector_is_frozen(ranker: Ranker) -> None:
    steps: list[tuple[int, int]] = []
    frozen = gc.get_freeze_count()
    assert ranker.warm_up(lambda done, total: steps.append((done, total))) > 0
    assert steps == [(1, 2), (2, 2)]
    assert gc.get_freeze_count() > frozen
    gc.unfreeze()
    before = compilations()
    for texts in (["a job"], ["a job"] * 30, ["developer " * 10, "x"], ["nurse"] * 3):
        ranker.score("python developer", texts)
    ranker.label_logits([[1, 2, 3], [4] * 100])
    assert compilations() == before


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_vectors_of_any_dtype_are_warm(stored: type) -> None:
    bucket = SMALL.model_copy(update={"vectors_per_item": 2})
    buckets, params = BucketConfig(buckets=(bucket,)), tiny_params(CONFIG.model)
    scorer = CompiledScorer(CONFIG, params, dtype=jnp.bfloat16, devices=jax.devices()[:1], buckets=buckets)
    warm_up(scorer)
    gc.unfreeze()
    before = compilations()
    vectors: np.ndarray = np.full((3, 2, CONFIG.model.width), 0.25, stored)
    logits = scorer.logits([PackRequest([1, 2, 3], [[0, 0, 5], [0, 0, 6], [0, 0, 7, 8]], vectors)])
    assert np.isfinite(logits).all()
    assert compilations() == before


def test_requests_scored_together_equal_those_scored_alone(ranker: Ranker) -> None:
    encoded = [ranker.prompt.encode(query, ["a job", "another " * 5]) for query in ("python", "nurse in a ward", "x")]
    together = ranker.score_many(encoded)
    for request, scores in zip(encoded, together, strict=True):
        np.testing.assert_allclose(scores.logits, ranker.score_encoded(request).logits, rtol=0, atol=1e-5)


def test_no_requests_have_no_scores(ranker: Ranker) -> None:
    assert ranker.score_many([]) == []


def test_there_is_a_device(ranker: Ranker, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "ckpt", CONFIG.model)
    with pytest.raises(InputError, match="devices: at least one is needed"):
        load(path, devices=[])
    with pytest.raises(InputError, match="devices: at least one is needed"):
        make_score_fn(CONFIG, devices=[])


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn", "bool", "floating"])
def test_scores_are_computed_in_floats_that_hold_them(tmp_path: Path, dtype: str) -> None:
    path = tiny_checkpoint(tmp_path / "ckpt", CONFIG.model)
    with pytest.raises(InputError, match=f"dtype {dtype}: scores are computed in float32, bfloat16, float16"):
        load(path, dtype=dtype)


def small_batch() -> dict[str, np.ndarray]:
    ((forward,),) = Packer(BucketConfig(buckets=(SMALL,))).pack([PackRequest([1, 2, 3], [[4, 5], [6], [7, 8, 9]])])
    return forward.batch


def test_exported_and_ahead_compiled_functions_give_the_same_logits() -> None:
    params, batch = tiny_params(CONFIG.model), small_batch()
    expected = np.asarray(make_score_fn(CONFIG, dtype=jnp.float32)(params, batch))
    ahead = compile_ahead(CONFIG, SMALL, jnp.float32)
    np.testing.assert_array_equal(ahead(params, batch), expected)
    artefact = export_score_fn(CONFIG, SMALL, jnp.float32, ("cpu", "cuda", "tpu"))
    loaded = export.deserialize(bytearray(artefact))
    assert set(loaded.platforms) == {"cpu", "cuda", "tpu"}
    np.testing.assert_allclose(loaded.call(params, batch), expected, rtol=0, atol=1e-6)


def test_a_gpu_beside_it_does_not_choose_what_a_cpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and bfloat16 are the default device's; scoring on a CPU device and exporting for others take neither."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "target_device", lambda: ("gpu", "NVIDIA H200", 132))
    model = MODELS["qwen3-0.6b"].model_copy(update={"num_layers": 2})
    config = RankerConfig(model=model, prompt=PromptConfig(template="yes-no"), label_token_ids=(17, 42))
    bucket = Bucket(tokens=8192, rows=56, prefix_tokens=64, items_per_row=1, item_tokens=160)
    score_fn = make_score_fn(config, jax.devices("cpu")[:1], jnp.bfloat16)
    score_fn.lower(abstract_params(model, jnp.dtype(jnp.bfloat16)), abstract_batch(bucket, model.width, jnp.bfloat16))
    for platforms in (("cpu",), ("cpu", "cuda")):
        artefact = export.deserialize(bytearray(export_score_fn(config, bucket, jnp.bfloat16, platforms)))
        assert set(artefact.platforms) == set(platforms)
    on_cpu = CompiledScorer(CONFIG, tiny_params(CONFIG.model), devices=jax.devices("cpu")[:1], buckets=BUCKETS)
    assert on_cpu.dtype == jnp.float32


def test_probabilities_far_below_one_half_are_exact() -> None:
    odds = np.array([-80, -20, -17, -1, 0, 17], np.float32)
    scores = Scores(np.stack([np.zeros_like(odds), odds], axis=1), [False] * len(odds))
    np.testing.assert_allclose(scores.probabilities, 1 / (1 + np.exp(-odds.astype(np.float64))), rtol=1e-6)


def test_exported_programs_hold_the_attention_of_their_own_platform() -> None:
    """Behind a long prefix rows attend one by one on a CPU; other devices would wait for the host to decide it."""
    bucket = Bucket(tokens=300, rows=3, prefix_tokens=LONG_PREFIX, items_per_row=2, item_tokens=8)

    def loops(*platforms: str) -> int:
        artefact = export_score_fn(CONFIG, bucket, jnp.float32, platforms)
        return export.deserialize(bytearray(artefact)).mlir_module().count("stablehlo.while")

    assert loops("cuda") == 0
    assert loops("cpu") == loops("cpu", "cuda") == 2 * (CONFIG.model.num_layers - 1)


def test_the_compilation_cache_keeps_programs(tmp_path: Path) -> None:
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()  # of the tests; a process keeps to the first folder it has used
    use_compilation_cache(tmp_path / "cache")
    try:
        jax.jit(lambda x: jnp.sin(x) * 3 + 1)(np.ones(7, np.float32)).block_until_ready()
        assert list((tmp_path / "cache").iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
