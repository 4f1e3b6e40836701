"""The cost card: known values, parameter trees of random configs, loops over layers and tokens, XLA's own count."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslm.bench.workloads import MODELS
from jaxslm.config import ModelConfig
from jaxslm.model.cost import (
    attention_flops_per_pair,
    count_parameters,
    last_layer_savings,
    linear_flops_per_token,
    scoring_bytes,
    scoring_flops,
)
from jaxslm.model.decoder import Decoder, abstract_params
from jaxslm.model.layout import Rows
from tests.tiny import tiny_config

QWEN3_06B, PRUNED = MODELS["qwen3-0.6b"], MODELS["qwen3-0.6b-pruned"]

configs = st.builds(
    lambda family, layers, kv_heads, mlp_widths, group, head_dim, tied: tiny_config(
        family,
        num_layers=layers,
        num_kv_heads=tuple(kv_heads[:layers]),
        mlp_width=tuple(mlp_widths[:layers]),
        queries_per_kv=group,
        head_dim=2 * head_dim,
        tie_embeddings=tied,
    ),
    st.sampled_from(["llama", "qwen3"]),
    st.integers(1, 3),
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
    st.lists(st.integers(1, 50), min_size=3, max_size=3),
    st.integers(1, 3),
    st.integers(1, 8),
    st.booleans(),
)


def test_qwen3_06b() -> None:
    parameters = count_parameters(QWEN3_06B)
    assert parameters.total == 596_049_920
    assert parameters.embedding == 155_582_464
    assert parameters.non_embedding == 440_467_456
    assert parameters.linear == 440_401_920
    assert linear_flops_per_token(QWEN3_06B) == 880_803_840
    assert attention_flops_per_pair(QWEN3_06B) == 28 * 4 * 16 * 128


def test_qwen3_06b_pruned_to_20_layers_of_half_the_neurons() -> None:
    assert count_parameters(PRUNED).total == 375_830_528
    assert linear_flops_per_token(PRUNED) == 880_803_840 // 2


@settings(max_examples=12, deadline=None)
@given(config=configs)
def test_parameters_are_those_of_the_tree(config: ModelConfig) -> None:
    tree = abstract_params(config)
    sizes = {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    parameters = count_parameters(config)
    tables = sum(size for name, size in sizes.items() if name in ("['embedding']", "['head']"))
    norms = sum(size for name, size in sizes.items() if name.endswith("['scale']"))
    assert parameters.total == sum(sizes.values())
    assert parameters.embedding == tables
    assert parameters.non_embedding == sum(sizes.values()) - tables
    assert parameters.linear == sum(sizes.values()) - tables - norms


@settings(max_examples=25, deadline=None)
@given(
    config=configs,
    prefix=st.integers(0, 5),
    lengths=st.integers(1, 5),
    items=st.integers(1, 4),
    shared=st.booleans(),
)
def test_scoring_flops_count_every_token_and_pair(
    config: ModelConfig, prefix: int, lengths: int, items: int, shared: bool
) -> None:
    """Multiply-adds by loops over layers, tokens and keys; the answer is read at each item's last token."""
    multiply_adds = 0
    for layer in range(config.num_layers):
        last = layer == config.num_layers - 1
        D, H, F = config.width, config.head_dim, config.mlp_width_by_layer[layer]
        K = config.kv_heads_by_layer[layer]
        N = K * config.queries_per_kv
        for item in range(items):
            for position in range(prefix + lengths):
                if shared and item > 0 and position < prefix:
                    continue
                multiply_adds += 2 * D * K * H
                if last and position < prefix + lengths - 1:
                    continue
                multiply_adds += 2 * D * N * H + 3 * D * F
                multiply_adds += 2 * N * H * (position + 1)
    multiply_adds += items * config.width
    assert scoring_flops(config, prefix, lengths, items, shared=shared) == 2 * multiply_adds


def test_sharing_a_prefix_saves_its_tokens() -> None:
    apart, together = (scoring_flops(QWEN3_06B, 100, 50, 20, shared=shared) for shared in (False, True))
    assert 0.3 < together / apart < 0.4
    assert scoring_flops(QWEN3_06B, 100, 50, 1, shared=True) == scoring_flops(QWEN3_06B, 100, 50, 1, shared=False)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_flops_agree_with_xla(family: str) -> None:
    """XLA also counts norms, RoPE and softmax, and masked pairs: its count lies a little above ours."""
    config = tiny_config(family, width=256, head_dim=64, mlp_width=512, num_kv_heads=2, queries_per_kv=2)
    B, T = 4, 64

    def states(params: dict[str, object], tokens: jax.Array) -> jax.Array:
        rows = Rows(jnp.ones(tokens.shape, bool))
        return Decoder(config).apply({"params": params}, tokens, rows)  # type: ignore[return-value]

    lowered = jax.jit(states).lower(abstract_params(config), jax.ShapeDtypeStruct((B, T), jnp.int32))
    cost: Any = lowered.compile().cost_analysis()
    ours = scoring_flops(config, 0, T, B, shared=False)
    masked_pairs = (config.num_layers - 1) * B * T * (T - 1) // 2
    ours += attention_flops_per_pair(config) // config.num_layers * masked_pairs
    assert ours < cost["flops"] < 1.05 * ours


def test_last_layer_savings_are_a_part_of_the_layer() -> None:
    saved = last_layer_savings(QWEN3_06B, tokens=100, read=1)
    assert saved == 2 * 99 * (2 * 1024 * 2048 + 3 * 1024 * 3072)
    assert saved < 100 * linear_flops_per_token(QWEN3_06B) / QWEN3_06B.num_layers


def test_bytes_are_the_weights_and_the_rows_read() -> None:
    assert scoring_bytes(QWEN3_06B, 7, 2) == 2 * (440_467_456 + 7 * 1024)
    assert scoring_bytes(QWEN3_06B, 0, 4) == np.float32().itemsize * 440_467_456
