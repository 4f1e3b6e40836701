"""The one bridge between training and serving: a folder with `manifest.json`, the tokenizer and Orbax items.

    CKPT/manifest.json       format version, ranker config, hashes, parent, metrics
    CKPT/tokenizer/          tokenizer.json and what else its source had
    CKPT/params/             Orbax; restores onto any number of devices

Nothing is guessed: hashes of parameters, tokenizer and prompt are checked at every load.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxslm.atomic import new_folder
from jaxslm.config import RankerConfig, Settings, validate
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params, abstract_params
from jaxslm.prompt import Prompt

FORMAT_VERSION = 1
MAIN_PACKAGES = ("jax", "flax", "orbax-checkpoint", "numpy")


class Manifest(Settings):
    """Content of `manifest.json`.

    Attributes:
        params_sha256: hash of names and values, the identity of the weights.
        params_files: sha256 of each file that holds them, so that damage is found before anything reads it.
        source: what the weights came from, in words. parent: params_sha256 of the checkpoint they were made from.
        metrics: figures of this checkpoint by name, e.g. "dev_ndcg_at_10".
        versions: packages that wrote it.
    """

    format_version: int
    ranker: RankerConfig
    params_dtype: Literal["float32", "bfloat16"]
    params_sha256: str
    params_files: dict[str, str]
    tokenizer_sha256: str
    template_sha256: str
    source: str
    parent: str | None = None
    metrics: dict[str, float] = {}
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: `tokenizer_files` maps file names to their bytes, "tokenizer.json" among them."""

    manifest: Manifest
    params: Params
    tokenizer_files: Mapping[str, bytes]

    @property
    def config(self) -> RankerConfig:
        """The ranker's configuration."""
        return self.manifest.ranker

    @cached_property
    def prompt(self) -> Prompt:
        """The prompt that this checkpoint was made for. Building it takes about a second for a real tokenizer."""
        return Prompt(self.tokenizer_files["tokenizer.json"].decode(), self.config.prompt)


def params_sha256(params: Params) -> str:
    """Returns the hash of names, shapes, dtypes and values of a parameter tree, whatever devices hold it."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def save_checkpoint(
    path: Path,
    config: RankerConfig,
    params: Params,
    tokenizer_files: Mapping[str, bytes],
    *,
    source: str,
    parent: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Manifest:
    """Writes a checkpoint aside and renames it to `path`; returns its manifest.

    Raises:
        InputError: `path` exists, or the parameters do not have the shapes that `config` asks for.
    """
    import orbax.checkpoint as ocp

    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
    if dtypes not in ({"float32"}, {"bfloat16"}):
        raise InputError(f"parameters: must all be float32 or all be bfloat16, are {', '.join(sorted(dtypes))}")
    dtype: Any = dtypes.pop()
    _check_shapes(params, abstract_params(config.model, jnp.dtype(dtype)), "parameters")
    tokenizer_json = tokenizer_files["tokenizer.json"]
    template_sha256 = Prompt(tokenizer_json.decode(), config.prompt).sha256
    with new_folder(path) as folder:
        (folder / "tokenizer").mkdir()
        for name, content in tokenizer_files.items():
            (folder / "tokenizer" / name).write_bytes(content)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute() / "params", params)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            ranker=config,
            params_dtype=dtype,
            params_sha256=params_sha256(params),
            params_files=_file_hashes(folder / "params"),
            tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(),
            template_sha256=template_sha256,
            source=source,
            parent=parent,
            metrics=dict(metrics or {}),
            versions={name: version(name) for name in MAIN_PACKAGES},
        )
        (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest


def load_manifest(path: Path) -> Manifest:
    """Returns the manifest of a checkpoint folder; raises InputError if there is none or its version is unknown."""
    file = path / "manifest.json"
    try:
        tree = json.loads(file.read_bytes())
    except OSError:
        raise InputError(f"{path}: not a checkpoint (no manifest.json); `jaxslm convert` makes one") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: broken JSON ({error})") from None
    found = tree.get("format_version") if isinstance(tree, dict) else None
    if found != FORMAT_VERSION:
        raise InputError(
            f"{file}: format version {found!r}, this release reads {FORMAT_VERSION}:"
            " make it again from its source with `jaxslm convert`"
        )
    return validate(Manifest, tree, str(file))


def load_checkpoint(path: Path, sharding: jax.sharding.Sharding | None = None) -> Checkpoint:
    """Returns the checkpoint of a folder, its parameters in their stored dtype.

    Args:
        sharding: where every parameter is put; the default device if None.

    Raises:
        InputError: no such checkpoint, another format version, or anything missing, damaged or of another shape.
    """
    manifest = load_manifest(path)
    tokenizer_files = _load_tokenizer_files(path, manifest)
    params = _load_params(path, manifest, sharding)
    checkpoint = Checkpoint(manifest, params, tokenizer_files)
    prompt = checkpoint.prompt
    if prompt.label_token_ids != checkpoint.config.label_token_ids:
        raise InputError(
            f"{path}: label_token_ids {checkpoint.config.label_token_ids} of the manifest are not the tokenizer's"
            f" {prompt.label_token_ids}"
        )
    if prompt.sha256 != manifest.template_sha256:
        raise InputError(
            f"{path}: made for another version of prompt {manifest.ranker.prompt.template!r}: convert it again"
        )
    return checkpoint


def _load_tokenizer_files(path: Path, manifest: Manifest) -> dict[str, bytes]:
    folder = path / "tokenizer"
    files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())} if folder.is_dir() else {}
    found = hashlib.sha256(files.get("tokenizer.json", b"")).hexdigest()
    if found != manifest.tokenizer_sha256:
        raise InputError(f"{folder}/tokenizer.json: missing or damaged (sha256 differs from the manifest's)")
    return files


def _file_hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            hashes[file.relative_to(folder).as_posix()] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashes


def _load_params(path: Path, manifest: Manifest, sharding: jax.sharding.Sharding | None) -> Params:
    import orbax.checkpoint as ocp

    folder = path.absolute() / "params"
    found, expected = _file_hashes(folder), manifest.params_files
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            problem = "is missing" if name not in found else "is unexpected" if name not in expected else "is damaged"
            raise InputError(f"{path}/params: {name} {problem} (sha256 differs from the manifest's)")
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(manifest.ranker.model, jnp.dtype(manifest.params_dtype)),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        _check_shapes(checkpointer.metadata(folder).item_metadata.tree, target, f"{path}/params")
        params: Params = checkpointer.restore(folder, target)
    if params_sha256(params) != manifest.params_sha256:
        raise InputError(f"{path}/params: values are not those of the manifest (sha256 differs)")
    return params


def _check_shapes(params: Params, expected: Params, where: str) -> None:
    found, wanted = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (params, expected)
    )
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(f"{where}: {name} has shape {found.get(name)}, the config asks for {wanted.get(name)}")
