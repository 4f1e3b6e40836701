"""Models of other layers: the shape that given widths make, the first or the last layers by themselves."""

from jaxslm.config import ModelConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params


def config_of_layers(config: ModelConfig, kv_heads: list[int], mlp_widths: list[int]) -> ModelConfig:
    """Returns `config` with other layers; raises ValueError as ModelConfig."""
    return ModelConfig(
        **config.model_dump(exclude={"num_layers", "num_kv_heads", "mlp_width", "rope_scaling"}),
        rope_scaling=config.rope_scaling,
        num_layers=len(mlp_widths),
        num_kv_heads=_one_or_all(kv_heads),
        mlp_width=_one_or_all(mlp_widths),
    )


def first_layers(config: ModelConfig, params: Params, count: int) -> tuple[ModelConfig, Params]:
    """Returns the model without the layers from `count` on; raises InputError if it has fewer."""
    if count > config.num_layers:
        raise InputError(f"layers: {count} are to be kept, the model has {config.num_layers}")
    dropped = {f"layers_{index}" for index in range(count, config.num_layers)}
    kv_heads, mlp_widths = config.kv_heads_by_layer[:count], config.mlp_width_by_layer[:count]
    shorter = config_of_layers(config, list(kv_heads), list(mlp_widths))
    return shorter, {name: leaf for name, leaf in params.items() if name not in dropped}


def last_layers(config: ModelConfig, count: int | None) -> ModelConfig:
    """Returns the shape of the last `count` layers by themselves; all if None or more than there are."""
    if count is None or count >= config.num_layers:
        return config
    widths = {"num_kv_heads": config.kv_heads_by_layer[-count:], "mlp_width": config.mlp_width_by_layer[-count:]}
    return config.model_copy(update={"num_layers": count, **widths})


def _one_or_all(values: list[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)
