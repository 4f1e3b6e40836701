"""The benchmark measures what it says: the same scores with and without each short cut, and all promised figures."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.bench import workloads
from jaxslm.bench.buckets import fit_buckets_to_file
from jaxslm.bench.device import Ceilings, floor
from jaxslm.bench.score import Cuts, Options, PaddedRunner, Runner, bench_score
from jaxslm.bench.workloads import MODELS, WORKLOADS, Workload, model_named, random_requests
from jaxslm.config import BucketConfig, load_toml
from jaxslm.errors import InputError
from jaxslm.model.cost import count_parameters, linear_flops_per_token
from tests.tiny import tiny_checkpoint, tiny_config

SMALL = Workload("small", 6, 5, 7)
LATENT = Workload("latent", 6, 3, 7, vectors_per_item=2)


@pytest.fixture(autouse=True)
def tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads.MODELS, "tiny", tiny_config())
    monkeypatch.setitem(workloads.WORKLOADS, "small", SMALL)
    monkeypatch.setitem(workloads.WORKLOADS, "latent", LATENT)


def test_named_models_are_what_they_are_called() -> None:
    assert count_parameters(MODELS["qwen3-0.6b"]).total == 596_049_920
    assert round(count_parameters(MODELS["smollm2-135m"]).total / 1e6, 1) == 134.5
    for name in ("qwen3-0.6b", "smollm2-135m"):
        assert linear_flops_per_token(MODELS[f"{name}-pruned"]) * 2 == linear_flops_per_token(MODELS[name])
    assert WORKLOADS["latent_8"].tokens == 510


@pytest.mark.parametrize("shape", [SMALL, LATENT])
def test_short_cuts_change_no_score(shape: Workload) -> None:
    config, params = model_named("tiny")
    requests = random_requests(shape, config.model, 2)
    expected = Runner(config, params, requests, Options(max_tokens=64))()
    assert expected.shape == (14, 2)
    cuts: tuple[Cuts, ...] = ("head", "none")
    runners = [Runner(config, params, requests, Options(max_tokens=64, cuts=each)) for each in cuts]
    runners.append(Runner(config, params, requests, Options(max_tokens=64, sharing=False)))
    found = [runner() for runner in runners]
    if not shape.vectors_per_item:
        found.append(PaddedRunner(config, params, requests, 64)())
    for logits in found:
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_the_report_has_its_figures() -> None:
    result = bench_score("small", "tiny", repeats=2, options=Options(max_tokens=64))
    assert result["items_per_s_p5"] <= result["items_per_s"] <= result["items_per_s_p95"]
    assert result["max_abs_diff"] < 1e-5
    assert result["compilations_while_measuring"] == 0
    assert (result["forwards"], result["tokens_per_forward"]) == (1, SMALL.tokens)
    assert 0 <= result["padding_fraction"] < 0.2
    assert {"workload", "model", "dtype", "device", "gflop_per_item", "mfu", "ceiling_tflops"} <= result.keys()


def test_the_floor_is_the_cost_card_over_the_ceilings() -> None:
    least = floor(WORKLOADS["latent_1"], MODELS["qwen3-0.6b"], Ceilings("H200", "bfloat16", 790e12, 4.3e12))
    assert least.flops / 50 == pytest.approx(880.8e6 * (2 + 60 / 50), rel=0.05)
    assert least.compute_s == least.flops / 790e12
    assert least.traffic_s == pytest.approx(881e6 / 4.3e12, rel=0.02)


@pytest.mark.parametrize(
    ("workload", "model", "message"),
    [("none", "tiny", "--workload none: must be one of"), ("small", "none", "--model none: neither a checkpoint")],
)
def test_unknown_names_are_refused(workload: str, model: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench_score(workload, model)


def test_fitted_buckets_load_again(tmp_path: Path) -> None:
    traffic = tmp_path / "traffic.jsonl"
    traffic.write_text('{"query": "python", "items": [{"text": "a job"}, {"text": "another job in a place"}]}\n' * 3)
    checkpoint = tiny_checkpoint(tmp_path / "ckpt", tiny_config())
    result = fit_buckets_to_file(checkpoint, traffic, tmp_path / "buckets.toml", count=3, max_tokens=512)
    config = load_toml(tmp_path / "buckets.toml", BucketConfig)
    assert 1 <= len(config.buckets) == result["buckets"] <= 3
    assert result["cost_against_defaults"] < 1
    with pytest.raises(InputError, match="exists"):
        fit_buckets_to_file(checkpoint, traffic, tmp_path / "buckets.toml")


def test_vectors_are_random_and_of_the_tables_spread() -> None:
    (request,) = random_requests(LATENT, tiny_config(), 1)
    assert request.vectors is not None
    assert request.vectors.dtype == jnp.float32
    assert request.vectors.std() == pytest.approx(0.02, rel=0.2)
