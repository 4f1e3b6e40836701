"""The benchmark measures what it says: the same scores with and without each short cut, and all promised figures."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.bench import score, workloads
from jaxslm.bench.ablations import Cuts, PaddedRunner
from jaxslm.bench.buckets import fit_buckets_to_file
from jaxslm.bench.device import Ceilings, floor
from jaxslm.bench.score import Options, Runner, bench_score
from jaxslm.bench.workloads import MODELS, WORKLOADS, Workload, model_named, random_requests
from jaxslm.config import BucketConfig, load_toml
from jaxslm.errors import InputError
from jaxslm.model.cost import count_parameters, linear_flops_per_token, scoring_bytes
from jaxslm.score.scorer import load
from tests.tiny import tiny_checkpoint, tiny_config

SMALL = Workload("small", 6, 5, 7)
LATENT = Workload("latent", 6, 3, 7, vectors_per_item=2)


@pytest.fixture
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings take seconds to measure."""
    monkeypatch.setattr(score, "measure_ceilings", lambda dtype: Ceilings("a CPU", jnp.dtype(dtype).name, 1e11, 1e10))


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


@pytest.mark.parametrize("shape", [SMALL, pytest.param(LATENT, marks=pytest.mark.slow)])
def test_short_cuts_change_no_score(shape: Workload) -> None:
    config, params = model_named("tiny")
    requests = random_requests(shape, config.model, 2)
    expected = Runner(config, params, requests, Options(max_tokens=64))()
    assert expected.shape == (14, 2)
    cuts: tuple[Cuts, ...] = ("head", "none")
    runners = [Runner(config, params, requests, Options(max_tokens=64, cuts=each)) for each in cuts]
    runners.append(Runner(config, params, requests, Options(max_tokens=64, sharing=False)))
    found = [runner() for runner in runners]
    found += [PaddedRunner(config, params, requests, 64, cuts=each)() for each in (cuts[0], "all")]
    for logits in found:
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_the_report_has_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_score("small", "tiny", repeats=2, options=Options(max_tokens=64))
    assert result["items_per_s_p5"] <= result["items_per_s"] <= result["items_per_s_p95"]
    assert result["max_abs_diff"] < 1e-5
    assert result["compilations_while_measuring"] == 0
    assert (result["forwards"], result["tokens_per_forward"]) == (1, SMALL.tokens)
    assert 0 <= result["padding_fraction"] < 0.2
    assert {"workload", "model", "dtype", "device", "gflop_per_item", "mfu", "ceiling_tflops"} <= result.keys()
    assert result["implementation"] is None
    assert result["floor_bytes_per_request"] == scoring_bytes(tiny_config(), SMALL.tokens, 4)
    assert "MB of traffic a request" in capsys.readouterr().err


@pytest.mark.usefixtures("known_ceilings")
def test_the_report_says_which_short_cuts_were_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "warm_up", lambda scorer: 7.5)
    options = Options(max_tokens=64, implementation="xla", cuts="head")
    result = bench_score("latent", "tiny", repeats=1, options=options)
    assert (result["implementation"], result["cuts"], result["padded"]) == ("xla", "head", False)
    assert result["compile_s"] == 7.5
    result = bench_score("latent", "tiny", repeats=1, options=replace(options, padded=True, cuts="none"))
    assert (result["cuts"], result["padded"], result["fitted_buckets"]) == ("none", True, False)
    assert result["max_abs_diff"] < 1e-5
    assert result["compile_s"] > 0


@pytest.mark.usefixtures("known_ceilings")
def test_a_request_needs_no_prefix() -> None:
    result = bench_score("latent", "tiny", prefix=0, repeats=1, options=Options(max_tokens=64))
    assert result["max_abs_diff"] < 1e-5
    assert result["prefix_tokens"] == 0


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


@pytest.mark.usefixtures("known_ceilings")
def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="--item-tokens 2: an item of latent is 2 vectors and at least one token"):
        bench_score("latent", "tiny", item_tokens=2)
    with pytest.raises(
        InputError, match=r"--implementation mosaic_gpu: prefix_item_attention .* takes bfloat16, not float32"
    ):
        bench_score("small", "tiny", options=Options(max_tokens=64, implementation="mosaic_gpu"))


@pytest.mark.slow
def test_fitted_buckets_load_again(tmp_path: Path) -> None:
    traffic = tmp_path / "traffic.jsonl"
    traffic.write_text('{"query": "python", "items": [{"text": "a job"}, {"text": "another job in a place"}]}\n' * 3)
    checkpoint = tiny_checkpoint(tmp_path / "ckpt", tiny_config())
    result = fit_buckets_to_file(checkpoint, traffic, tmp_path / "buckets.toml", count=3, max_tokens=512)
    config = load_toml(tmp_path / "buckets.toml", BucketConfig)
    assert 1 <= result["fitted_to_sample"] <= 3
    assert result["fitted_to_sample"] < len(config.buckets) == result["buckets"]
    assert result["cost_against_defaults"] < 1
    with pytest.raises(InputError, match="exists"):
        fit_buckets_to_file(checkpoint, traffic, tmp_path / "buckets.toml")
    ranker = load(checkpoint, buckets=config)
    query, texts = "python " * 300, ["a job", "another job in a place " * 400]
    assert ranker.score_request(query, texts).truncated == [False, True]
    np.testing.assert_allclose(ranker.score(query, texts), load(checkpoint).score(query, texts), rtol=0, atol=1e-5)


def test_buckets_are_fitted_to_requests_from_the_whole_file(tmp_path: Path) -> None:
    traffic, checkpoint = tmp_path / "traffic.jsonl", tiny_checkpoint(tmp_path / "ckpt", tiny_config())
    lines = ['{"query": "python", "items": [{"text": "a job"}]}'] * 60
    traffic.write_text("\n".join(lines))
    assert fit_buckets_to_file(checkpoint, traffic, tmp_path / "buckets.toml", count=1)["requests"] == 50
    lines[59] = '{"query": "python", "items": [{"text": "x"}, {"id": "only-an-id"}]}'
    traffic.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"traffic\.jsonl: request 60: item 1: has no text"):
        fit_buckets_to_file(checkpoint, traffic, tmp_path / "other.toml")
    assert not (tmp_path / "other.toml").exists()


def test_vectors_are_random_and_of_the_tables_spread() -> None:
    (request,) = random_requests(LATENT, tiny_config(), 1)
    assert isinstance(request.vectors, np.ndarray)
    assert request.vectors.dtype == jnp.float32
    assert request.vectors.std() == pytest.approx(0.02, rel=0.2)
