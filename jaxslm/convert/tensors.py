"""From named foreign tensors to a parameter tree: every tensor is asked for once, checked, and none is left over."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxslm.config import ModelConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params, abstract_params


@dataclass(frozen=True)
class Names:
    """The names one foreign format gives to the parameters; `{i}` is the layer's index. One table per format."""

    embedding: str
    head: str
    final_norm: str
    attention_norm: str
    mlp_norm: str
    q: str
    k: str
    v: str
    o: str
    q_norm: str
    k_norm: str
    gate: str
    up: str
    down: str

    def of(self, path: tuple[str, ...]) -> str:
        """Returns the foreign name of the parameter at `path` of our tree."""
        if path[0].startswith("layers_"):
            role = path[-2] if path[-1] == "scale" else path[-1]
            return str(getattr(self, role)).format(i=path[0].removeprefix("layers_"))
        return str(getattr(self, path[0]))


def is_matrix(path: tuple[str, ...]) -> bool:
    """Whether foreign formats store this parameter transposed: linear maps as (out, in), ours as (in, out)."""
    return path[0].startswith("layers_") and path[-1] != "scale"


def assemble(
    config: ModelConfig,
    names: Names,
    available: Iterable[str],
    read: Callable[[str], np.ndarray],
    dtype: Any,
    where: str,
) -> Params:
    """Returns the parameter tree of `config` from foreign tensors.

    Args:
        available: all foreign names there are. read: returns one of them, linear maps as (out, in).
        dtype: of the parameters. where: the file or folder, for messages.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, or holds NaN or infinity; the message names it.
    """
    abstract = jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]
    leaves = {tuple(key.key for key in path): leaf.shape for path, leaf in abstract}
    wanted = {names.of(path): path for path in leaves}
    available = set(available)
    if config.tie_embeddings and names.head in available:
        _check_tied(names, read, where)
        available.remove(names.head)
    for name in sorted(wanted.keys() - available):
        raise InputError(f"{where}: tensor {name} is missing")
    for name in sorted(available - wanted.keys()):
        raise InputError(f"{where}: tensor {name} is unexpected in a {config.family} model of this config")
    params: Params = {}
    for name, path in wanted.items():
        array = read(name)
        array = array.T if is_matrix(path) else array
        if array.shape != leaves[path]:
            shape, expected = (tuple(reversed(s)) if is_matrix(path) else s for s in (array.shape, leaves[path]))
            raise InputError(f"{where}: tensor {name} has shape {shape}, the config asks for {expected}")
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputError(f"{where}: tensor {name} holds NaN or infinity")
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jnp.asarray(array, dtype)
    return params


def _check_tied(names: Names, read: Callable[[str], np.ndarray], where: str) -> None:
    if not np.array_equal(read(names.head), read(names.embedding)):
        raise InputError(f"{where}: tensor {names.head} differs from {names.embedding}, but the config ties them")
