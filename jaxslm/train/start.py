"""What a run starts from: a checkpoint, its first layers, the prompt of the run."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxslm.checkpoint import Checkpoint, load_checkpoint
from jaxslm.config import ModelConfig, RankerConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from jaxslm.prompt import Prompt
from jaxslm.train.settings import TrainingSettings


def load_start(settings: TrainingSettings, mesh: Mesh) -> Checkpoint:
    """Returns the run's model before the first update, its parameters in float32 and whole on every device.

    The manifest is the parent's but for the ranker's configuration (layers, prompt).

    Raises:
        InputError: no such checkpoint, or it has fewer layers than are to be kept.
    """
    parent = load_checkpoint(Path(settings.model), NamedSharding(mesh, P()))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), parent.params)
    config = parent.config
    if settings.layers is not None:
        model, params = first_layers(config.model, params, settings.layers)
        config = config.model_copy(update={"model": model})
    if settings.prompt is not None:
        labels = Prompt(parent.tokenizer_files["tokenizer.json"].decode(), settings.prompt).label_token_ids
        config = RankerConfig(model=config.model, prompt=settings.prompt, label_token_ids=labels)
    manifest = parent.manifest.model_copy(update={"ranker": config, "params_dtype": "float32"})
    return Checkpoint(manifest, params, parent.tokenizer_files)


def first_layers(config: ModelConfig, params: Params, count: int) -> tuple[ModelConfig, Params]:
    """Returns the model without the layers from `count` on; raises InputError if it has fewer."""
    if count > config.num_layers:
        raise InputError(f"layers: {count} are to be kept, the model has {config.num_layers}")
    tree = config.model_dump() | {
        "num_layers": count,
        "num_kv_heads": config.kv_heads_by_layer[:count],
        "mlp_width": config.mlp_width_by_layer[:count],
    }
    for name in ("num_kv_heads", "mlp_width"):
        if len(set(tree[name])) == 1:
            tree[name] = tree[name][0]
    dropped = {f"layers_{index}" for index in range(count, config.num_layers)}
    return ModelConfig(**tree), {name: leaf for name, leaf in params.items() if name not in dropped}


def last_layers(config: ModelConfig, count: int | None) -> ModelConfig:
    """Returns the shape of the last `count` layers by themselves; all if None or more than there are."""
    if count is None or count >= config.num_layers:
        return config
    widths = {"num_kv_heads": config.kv_heads_by_layer[-count:], "mlp_width": config.mlp_width_by_layer[-count:]}
    return config.model_copy(update={"num_layers": count, **widths})
