"""The first or the last layers of a model, by themselves."""

from jaxslm.config import ModelConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params


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
