"""Every kernel compiles for an H200, keeps its values in registers and fits shared memory; so does the scoring step."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxslm.bench.workloads import MODELS, WORKLOADS
from jaxslm.config import PromptConfig, RankerConfig
from jaxslm.model.decoder import abstract_params
from jaxslm.score.buckets import make_bucket
from jaxslm.score.compiled import make_score_fn
from jaxslm.score.warmup import abstract_batch
from pallas_kernels.dispatch import MOSAIC_GPU, XLA
from pallas_kernels.specs import OPS, Spec, specs
from tests.pallas_kernels.h200 import compile_for_h200, compiled_kernels, needs_compiler

pytestmark = needs_compiler

SHARED_MEMORY_BYTES = 227 * 1024


@pytest.mark.parametrize("spec", [spec for op in OPS for spec in specs(op)], ids=str)
def test_kernels_compile_without_spills(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    kernels = compiled_kernels(
        tmp_path, monkeypatch, lambda *arguments: spec.run(*arguments, implementation=MOSAIC_GPU), *spec.make(0)
    )
    record_property("kernels", list(map(asdict, kernels)))
    print(kernels)
    (kernel,) = kernels
    assert kernel.spilled_bytes == 0
    assert kernel.shared_memory_bytes <= SHARED_MEMORY_BYTES


def tiles_worth_timing() -> list[Any]:
    """The choices of one spec of each op, and of the last layer's attention, but for the defaults, compiled above."""
    found = []
    for op, number in (("gated_mlp", 3), ("prefix_item_attention", 5), ("prefix_item_attention", 6)):
        spec = specs(op)[number]
        for tiles in spec.tiles[1:]:
            sizes = " ".join(f"{name}={size}" for name, size in tiles.items())
            found.append(pytest.param(spec, tiles, id=f"{spec}, {sizes}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "tiles"), tiles_worth_timing())
def test_tiles_worth_timing_compile_without_spills(
    spec: Spec, tiles: Mapping[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = partial(spec.run_tiles, tiles=tiles)
    (kernel,) = compiled_kernels(tmp_path, monkeypatch, call, *spec.make(0))
    assert kernel.spilled_bytes == 0
    assert kernel.shared_memory_bytes <= SHARED_MEMORY_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [XLA, MOSAIC_GPU])
@pytest.mark.parametrize("workload", ["summary", "latent_8"])
def test_the_scoring_step_compiles(
    workload: str, implementation: str, record_property: Callable[[str, object], None]
) -> None:
    """Two layers of the pruned Qwen3 on a pass of 8192 tokens; a layer's temporary memory is used again by the next."""
    model = MODELS["qwen3-0.6b-pruned"].model_copy(update={"num_layers": 2})
    config = RankerConfig(model=model, prompt=PromptConfig(template="yes-no"), label_token_ids=(17, 42))
    shape = WORKLOADS[workload]
    bucket = make_bucket(8192, shape.prefix_tokens, shape.item_tokens, shape.item_tokens, shape.vectors_per_item)
    step = make_score_fn(config, jax.local_devices()[:1], jnp.bfloat16, implementation)
    batch = abstract_batch(bucket, model.width, jnp.bfloat16)
    memory = compile_for_h200(step, abstract_params(model, jnp.bfloat16), batch).memory_analysis()
    assert memory is not None
    record_property("temporary_bytes", memory.temp_size_in_bytes)
    print(workload, implementation, memory.temp_size_in_bytes)
    assert memory.temp_size_in_bytes < 2**30
