"""Named workloads and named model shapes, so that every number says what it was measured on."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxslm.checkpoint import load_checkpoint
from jaxslm.config import ModelConfig, PromptConfig, RankerConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params, init_params
from jaxslm.score.forward import PackRequest


@dataclass(frozen=True)
class Workload:
    """One request, all of whose items have the same length.

    Attributes:
        prefix_tokens: P, instruction and query. item_tokens: T, vectors and the tokens after them included.
        items: J. vectors_per_item: C, how many of an item's tokens are embedding vectors.
    """

    name: str
    prefix_tokens: int
    item_tokens: int
    items: int
    vectors_per_item: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a request whose prefix is computed once."""
        return self.prefix_tokens + self.items * self.item_tokens


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("full_text", 64, 901, 50),
        Workload("text_300", 120, 180, 10),
        Workload("summary", 50, 150, 50),
        Workload("latent_8", 60, 9, 50, vectors_per_item=8),
        Workload("latent_1", 60, 2, 50, vectors_per_item=1),
    )
}

_QWEN3 = ModelConfig(
    family="qwen3",
    vocab_size=151936,
    width=1024,
    num_layers=28,
    num_kv_heads=8,
    queries_per_kv=2,
    head_dim=128,
    mlp_width=3072,
    max_positions=40960,
    tie_embeddings=True,
    rope_theta=1e6,
    norm_eps=1e-6,
)
_SMOLLM2 = ModelConfig(
    family="llama",
    vocab_size=49152,
    width=576,
    num_layers=30,
    num_kv_heads=3,
    queries_per_kv=3,
    head_dim=64,
    mlp_width=1536,
    max_positions=8192,
    tie_embeddings=True,
    rope_theta=1e5,
    norm_eps=1e-5,
)
MODELS = {
    "qwen3-0.6b": _QWEN3,
    "qwen3-0.6b-pruned": _QWEN3.model_copy(update={"num_layers": 20, "mlp_width": 1536}),
    "smollm2-135m": _SMOLLM2,
    # Like the pruned Qwen3: two thirds of the layers and a narrower MLP, half the FLOPs of a token.
    "smollm2-135m-pruned": _SMOLLM2.model_copy(update={"num_layers": 20, "mlp_width": 1024}),
}


def workload_named(name: str) -> Workload:
    """Returns a workload; raises InputError that lists the names there are."""
    if name not in WORKLOADS:
        raise InputError(f"--workload {name}: must be one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def model_named(name: str, dtype: DTypeLike = jnp.float32) -> tuple[RankerConfig, Params]:
    """Returns a named shape with random weights, or the checkpoint of a folder, its parameters in `dtype`.

    Raises:
        InputError: neither a name nor a checkpoint.
    """
    if name in MODELS:
        config = RankerConfig(model=MODELS[name], prompt=PromptConfig(template="yes-no"), label_token_ids=(17, 42))
        return config, init_params(config.model, jax.random.key(0), dtype)
    if not Path(name).exists():
        raise InputError(f"--model {name}: neither a checkpoint folder nor one of {', '.join(MODELS)}")
    checkpoint = load_checkpoint(Path(name))
    return checkpoint.config, jax.tree.map(lambda leaf: leaf.astype(dtype), checkpoint.params)


def random_requests(
    workload: Workload, config: ModelConfig, count: int, seed: int = 0, dtype: DTypeLike = np.float32
) -> list[PackRequest]:
    """Returns requests of random tokens, and of vectors with the spread of an embedding table; never zeros.

    Args:
        dtype: of the vectors, as a store of items may hold them.
    """
    generator = np.random.default_rng(seed)
    C, V = workload.vectors_per_item, config.vocab_size
    requests = []
    for _ in range(count):
        prefix = generator.integers(1, V, workload.prefix_tokens).tolist()
        items = generator.integers(1, V, (workload.items, workload.item_tokens)).tolist()
        vectors = None
        if C:
            vectors = 0.02 * generator.standard_normal((workload.items, C, config.width), np.float32)
            vectors = vectors.astype(dtype, copy=False)
        requests.append(PackRequest(prefix, items, vectors))
    return requests
