"""The cost card of a config: parameters, FLOPs, bytes. Pure arithmetic; a multiply-add is two FLOPs."""

from dataclasses import dataclass

from jaxslm.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. `linear` is the part of `non_embedding` that lies in the layers' matrices."""

    total: int
    embedding: int
    non_embedding: int
    linear: int


def _attention_weights(config: ModelConfig, layer: int) -> int:
    K = config.kv_heads_by_layer[layer]
    return 2 * config.width * K * config.head_dim * (config.queries_per_kv + 1)


def _layer_weights(config: ModelConfig, layer: int) -> int:
    return _attention_weights(config, layer) + 3 * config.width * config.mlp_width_by_layer[layer]


def count_parameters(config: ModelConfig) -> Parameters:
    """Returns the parameter counts; an untied head counts as embedding."""
    linear = sum(_layer_weights(config, layer) for layer in range(config.num_layers))
    norms_per_layer = 2 * config.width + (2 * config.head_dim if config.qk_norm else 0)
    norms = config.num_layers * norms_per_layer + config.width
    embedding = config.vocab_size * config.width * (1 if config.tie_embeddings else 2)
    return Parameters(embedding + linear + norms, embedding, linear + norms, linear)


def linear_flops_per_token(config: ModelConfig) -> int:
    """Returns the FLOPs of the layers' matrices for one token: twice their weights."""
    return 2 * count_parameters(config).linear


def attention_flops_per_pair(config: ModelConfig) -> int:
    """Returns the FLOPs of q k and of weights v for one (query, key) pair, all layers: 4 N H per layer."""
    return 4 * config.queries_per_kv * config.head_dim * sum(config.kv_heads_by_layer)


def last_layer_savings(config: ModelConfig, tokens: int, read: int) -> int:
    """Returns the linear FLOPs saved in the last layer (q, o, MLP) when `read` of `tokens` tokens are read."""
    last = config.num_layers - 1
    K = config.kv_heads_by_layer[last]
    q_and_o = 2 * config.width * K * config.queries_per_kv * config.head_dim
    weights = q_and_o + 3 * config.width * config.mlp_width_by_layer[last]
    return 2 * weights * (tokens - read)


def scoring_flops(config: ModelConfig, prefix_tokens: int, item_tokens: int, items: int, *, shared: bool) -> int:
    """Returns the FLOPs to score `items` items of `item_tokens` tokens after a prefix, as `jaxslm.score` computes them.

    Linear maps on every token, attention on every causal pair, the last layer's q, o and MLP on the answer tokens
    only, one row of the head per item. `shared`: the prefix is computed once for all items, else once per item.
    """
    P, T, J = prefix_tokens, item_tokens, items
    prefixes = 1 if shared else J
    tokens = prefixes * P + J * T
    pairs = prefixes * P * (P + 1) // 2 + J * (T * P + T * (T + 1) // 2)
    last_pair = 4 * config.queries_per_kv * config.head_dim * config.kv_heads_by_layer[-1]
    pairs_saved = pairs - J * (P + T)
    return (
        linear_flops_per_token(config) * tokens
        + attention_flops_per_pair(config) * pairs
        - last_layer_savings(config, tokens, J)
        - last_pair * pairs_saved
        + 2 * config.width * J
    )


def scoring_bytes(config: ModelConfig, tokens: int, bytes_per_number: int) -> int:
    """Returns the least bytes a forward pass of `tokens` tokens moves: each layer weight once, a row per token."""
    return bytes_per_number * (count_parameters(config).non_embedding + tokens * config.width)
