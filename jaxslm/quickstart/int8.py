"""A checkpoint in a quarter of its size, to be carried: int8 with a scale per row, one safetensors file."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxslm.atomic import new_file, refuse_existing
from jaxslm.checkpoint import load_checkpoint, save_checkpoint
from jaxslm.config import RankerConfig, validate
from jaxslm.errors import InputError

SCALE = "#scale"
TOKENIZER = "tokenizer/"


def write_int8(checkpoint: Path, out: Path) -> None:
    """Writes a ranker's weights, config and tokenizer. Matrices become int8: value = scale of the row * integer.

    A rounded weight is off by at most half a step, 1/254 of the largest in its row. Vectors stay float32. What a
    checkpoint holds beside a ranker, such as a compressor, stays behind.

    Raises:
        InputError: `out` exists, or the checkpoint cannot be loaded.
    """
    refuse_existing(out)
    loaded = load_checkpoint(checkpoint)
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in flatten_dict(jax.device_get(loaded.params), sep="/").items():
        values = np.asarray(leaf, np.float32)
        if values.ndim < 2:
            tensors[name] = values
            continue
        largest = np.abs(values).max(axis=-1, keepdims=True)
        scale = np.where(largest > 0, largest, 1) / np.float32(127)
        tensors[name], tensors[name + SCALE] = np.rint(values / scale).astype(np.int8), scale
    for name, content in loaded.tokenizer_files.items():
        tensors[TOKENIZER + name] = np.frombuffer(content, np.uint8)
    manifest = loaded.manifest
    about = {
        "ranker": loaded.config.model_dump_json(),
        "source": manifest.source,
        "parent": json.dumps(manifest.params_sha256),
        "metrics": json.dumps(manifest.metrics),
    }
    with new_file(out) as staging:
        save_file(tensors, staging, metadata=about)


def read_int8(file: Path, out: Path) -> None:
    """Makes a checkpoint of a file of `write_int8`; its parent is the one that was written.

    Raises:
        InputError: `out` exists, or the file is missing, damaged or another one.
    """
    refuse_existing(out)
    try:
        with safe_open(file, "numpy") as opened:
            about = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
        config = validate(RankerConfig, json.loads(about["ranker"]), str(file))
        parent, metrics = json.loads(about["parent"]), json.loads(about["metrics"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{file}: no weights of a full-size run ({' '.join(str(error).split())})") from None
    files = {name.removeprefix(TOKENIZER): tensors.pop(name).tobytes() for name in list(tensors) if TOKENIZER in name}
    scales = {name.removesuffix(SCALE): tensors.pop(name) for name in list(tensors) if SCALE in name}
    params = {name: jnp.asarray(values * scales.get(name, np.float32(1))) for name, values in tensors.items()}
    source = f"{about['source']}; int8"
    tree = unflatten_dict(params, sep="/")
    save_checkpoint(out, config, tree, files, source=source, parent=parent, metrics=metrics)
