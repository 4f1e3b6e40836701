"""Parity with Hugging Face `transformers`: golden files everywhere, live where torch is installed."""

import importlib.util
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.checkpoint import params_sha256
from jaxslm.config import ModelConfig
from jaxslm.model.decoder import Decoder
from jaxslm.model.head import vocab_logits
from jaxslm.model.layers import Attention, GatedMLP, Layer, RMSNorm, rope_frequencies, rotate
from jaxslm.model.layout import Rows
from jaxslm.score.scorer import Ranker
from scripts.make_golden import GOLDEN, PARITY_CONFIGS, POSITIONS, TOLERANCES, inputs, reference
from tests.demo_data import smollm2
from tests.tiny import tiny_params


@cache
def read_golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("facts")))


@partial(jax.jit, static_argnums=(0, 1))
def ours(part: str, config: ModelConfig, given: dict[str, np.ndarray]) -> Any:
    """Returns one part of the first layer, or the logits of all tokens, from the same inputs as `reference`."""
    params = tiny_params(config)
    layer = params["layers_0"]
    tokens, x, q = (jnp.asarray(given[name]) for name in ("tokens", "x", "q"))
    rows = Rows(jnp.ones(tokens.shape, bool), last_only=False)
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = rows.positions[..., None] * frequencies[None, None]
    dtype = jnp.dtype(jnp.float32)
    match part:
        case "norm":
            return RMSNorm(config.norm_eps).apply({"params": layer["attention_norm"]}, x)
        case "rope":
            far = jnp.broadcast_to(POSITIONS[None, :, None] * frequencies[None, None], angles.shape)
            return rotate(q, far)
        case "attention":
            attention = Attention(config, config.kv_heads_by_layer[0], dtype)
            return attention.apply({"params": layer["attention"]}, x, x, angles, angles, rows.attend)
        case "mlp":
            return GatedMLP(config.width, config.mlp_width_by_layer[0], dtype).apply({"params": layer["mlp"]}, x)
        case "layer":
            return Layer(config, 0, dtype).apply({"params": layer}, x, rows.positions, rows.attend)
        case _:
            states: Any = Decoder(config).apply({"params": params}, tokens, rows)
            return vocab_logits(states, params)


@pytest.mark.parametrize("part", TOLERANCES)
@pytest.mark.parametrize("name", PARITY_CONFIGS)
def test_golden(name: str, part: str) -> None:
    config = PARITY_CONFIGS[name]
    arrays, facts = read_golden(name)
    assert facts["config"] == config.model_dump(mode="json"), "tests.tiny changed: run scripts/make_golden.py"
    assert facts["params_sha256"] == params_sha256(tiny_params(config)), (
        "numpy draws other weights than the golden ones"
    )
    np.testing.assert_allclose(ours(part, config, arrays), arrays[part], rtol=0, atol=facts["tolerances"][part])


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed (the floor lane has it)")
@pytest.mark.parametrize("name", PARITY_CONFIGS)
def test_live(name: str) -> None:
    config = PARITY_CONFIGS[name]
    given = inputs(config)
    expected = reference(config, given)
    for part, tolerance in TOLERANCES.items():
        np.testing.assert_allclose(ours(part, config, given), expected[part], rtol=0, atol=tolerance, err_msg=part)


@pytest.mark.demo
def test_smollm2_logits() -> None:
    arrays, facts = read_golden("smollm2-135m")
    ranker = Ranker(smollm2(), jnp.dtype(jnp.float32))
    assert ranker.label_token_ids == tuple(arrays["label_token_ids"])
    rows = [row.tolist() for row in np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])]
    np.testing.assert_allclose(
        ranker.label_logits(rows), arrays["label_logits"], rtol=0, atol=facts["tolerances"]["label_logits"]
    )


def test_golden_files_are_small() -> None:
    sizes = {file.name: file.stat().st_size for file in Path(GOLDEN).iterdir()}
    assert sizes.keys() == {f"{name}.npz" for name in (*PARITY_CONFIGS, "smollm2-135m")}
    assert max(sizes.values()) <= 200_000
