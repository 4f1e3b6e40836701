"""What a run starts from: a checkpoint, its first layers, the prompt of the run."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxslm.checkpoint import Checkpoint, load_checkpoint
from jaxslm.config import RankerConfig, validate
from jaxslm.model.depth import first_layers
from jaxslm.prompt import Prompt
from jaxslm.train.settings import TrainingSettings


def load_start(settings: TrainingSettings, mesh: Mesh) -> Checkpoint:
    """Returns the run's model before the first update, its parameters in float32 and whole on every device.

    The manifest is the parent's but for the ranker's configuration (layers, prompt).

    Raises:
        InputError: no such checkpoint, it has fewer layers than are to be kept, or the prompt's rows are longer than it
            was trained for.
    """
    parent = load_checkpoint(Path(settings.model), NamedSharding(mesh, P()))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), parent.params)
    config = parent.config
    if settings.layers is not None:
        model, params = first_layers(config.model, params, settings.layers)
        config = config.model_copy(update={"model": model})
    if settings.prompt is not None:
        labels = Prompt(parent.tokenizer_files["tokenizer.json"].decode(), settings.prompt).label_token_ids
        tree = {"model": config.model, "prompt": settings.prompt, "label_token_ids": labels}
        config = validate(RankerConfig, tree, "settings")
    manifest = parent.manifest.model_copy(update={"ranker": config, "params_dtype": "float32"})
    return Checkpoint(manifest, params, parent.tokenizer_files)
