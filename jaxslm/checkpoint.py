"""The one bridge between training and serving: a folder with `manifest.json`, the tokenizer and Orbax items.

    CKPT/manifest.json       format version, ranker config, hashes, parent, metrics
    CKPT/tokenizer/          tokenizer.json and what else its source had
    CKPT/params/             Orbax; restores onto any number of devices
    CKPT/masks/, compressor/ further Orbax items, where the checkpoint has them

Nothing is guessed: hashes of parameters, tokenizer and prompt are checked at every load, and those of further items
whenever they are asked for.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import model_validator

from jaxslm.atomic import cannot_write, new_folder
from jaxslm.config import Calibration, CompressorConfig, RankerConfig, Settings, validate
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params, abstract_params
from jaxslm.prompt import Prompt

FORMAT_VERSION = 1
MAIN_PACKAGES = ("jax", "flax", "orbax-checkpoint", "numpy")
OWN_NAMES = ("params", "tokenizer", "train_state")

Tree = dict[str, Any]
"""A nested dict of arrays."""


class ExtraItem(Settings):
    """An Orbax item beside the parameters: `sha256` of names and values, and of each `files` that holds them."""

    sha256: str
    files: dict[str, str]


class Manifest(Settings):
    """Content of `manifest.json`.

    Attributes:
        params_sha256: hash of names and values, the identity of the weights.
        params_files: sha256 of each file that holds them, so that damage is found before anything reads it.
        source: what the weights came from, in words. parent: params_sha256 of the checkpoint they were made from.
        metrics: figures of this checkpoint by name, e.g. "dev_ndcg_at_10".
        versions: packages that wrote it. extra: further items, by the name of their folder.
        compressor: what the item "compressor" is, where there is one.
        calibration: of the probabilities, where one was fitted (`jaxslm calibrate`); for these weights alone.
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
    extra: dict[str, ExtraItem] = {}
    compressor: CompressorConfig | None = None
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _vectors_are_as_wide_as_the_ranker(self) -> "Manifest":
        if self.compressor is not None and self.compressor.width != self.ranker.model.width:
            raise ValueError(
                f"the compressor's vectors have width {self.compressor.width}, the ranker {self.ranker.model.width}"
            )
        return self


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        tokenizer_files: file names and their bytes, "tokenizer.json" among them.
        extra: the further items that were asked for, by name.
    """

    manifest: Manifest
    params: Params
    tokenizer_files: Mapping[str, bytes]
    extra: Mapping[str, Tree] = field(default_factory=dict)

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
    extra: Mapping[str, Tree] | None = None,
    compressor: CompressorConfig | None = None,
    calibration: Calibration | None = None,
) -> Manifest:
    """Writes a checkpoint aside and renames it to `path`; returns its manifest.

    Args:
        extra: further items by name, nested dicts of arrays of any shapes and dtypes, as "masks" or "compressor".
        compressor: what the item "compressor" is. calibration: fitted for these very parameters and this prompt.

    Raises:
        InputError: `path` exists or cannot be written, the parameters do not have the shapes that `config` asks for,
            or an item's name is no plain word or belongs to the checkpoint itself.
    """
    extra = extra or {}
    for name in extra:
        if not name.isidentifier() or name in OWN_NAMES:
            raise InputError(f"checkpoint item {name!r}: must be a plain word other than {', '.join(OWN_NAMES)}")
        if any(leaf.dtype.itemsize == 8 for leaf in jax.tree.leaves(extra[name])):
            raise InputError(f"checkpoint item {name!r}: 64-bit numbers would come back as 32-bit ones")
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
        items = {"params": params, **extra}
        _check_room(path, folder, items)
        for name, tree in items.items():
            with _disk_errors(path):
                _save_item(folder / name, tree)
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
            extra={
                name: ExtraItem(sha256=params_sha256(tree), files=_file_hashes(folder / name))
                for name, tree in extra.items()
            },
            compressor=compressor,
            calibration=calibration,
        )
        (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest


def copy_calibrated(path: Path, out: Path, calibration: Calibration, metrics: Mapping[str, float]) -> Manifest:
    """Writes a copy of a checkpoint that carries a calibration, with `metrics` beside its own; returns its manifest.

    Raises:
        InputError: no checkpoint at `path`, or `out` exists or cannot be written.
    """
    known = load_manifest(path)
    manifest = known.model_copy(update={"calibration": calibration, "metrics": known.metrics | dict(metrics)})
    with new_folder(out) as folder:
        try:
            shutil.copytree(path, folder, dirs_exist_ok=True)
            (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise cannot_write(out, error) from error
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


def load_checkpoint(
    path: Path, sharding: jax.sharding.Sharding | None = None, *, extra: Collection[str] = ()
) -> Checkpoint:
    """Returns the checkpoint of a folder, its parameters in their stored dtype.

    Args:
        sharding: where every parameter is put; the default device if None.
        extra: names of further items to load too; others are neither read nor checked.

    Raises:
        InputError: no such checkpoint, another format version, an item that it lacks, or anything missing, damaged or
            of another shape.
    """
    manifest = load_manifest(path)
    tokenizer_files = _load_tokenizer_files(path, manifest)
    params = _load_params(path, manifest, sharding)
    items = {name: _load_extra(path, manifest, name, sharding) for name in extra}
    checkpoint = Checkpoint(manifest, params, tokenizer_files, items)
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


def _check_room(path: Path, folder: Path, items: Mapping[str, Tree]) -> None:
    """Refuses what the disk has no room for before Orbax begins, whose writes end badly if they fail half-way."""
    if sum(leaf.nbytes for leaf in jax.tree.leaves(items)) > shutil.disk_usage(folder).free:
        raise cannot_write(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


WRITES_END_S = 0.5


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """A write by Orbax that fails is an InputError; what its threads and callbacks print meanwhile is not shown."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # of a full disk TensorStore makes any of these
        # Orbax returns at the first error and cannot wait for its other writes, which would make files anew in a folder
        # that is being removed. The error keeps what they still use: their threads call back into Python.
        time.sleep(WRITES_END_S)
        raise cannot_write(path, error) from error
    finally:
        sys.unraisablehook = hook
        logger.setLevel(level)


def _save_item(folder: Path, tree: Tree) -> None:
    import orbax.checkpoint as ocp

    hosts = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:
        # One host of a run writes for all. Orbax would wait for the others, and refuse arrays that no other host has.
        host = jax.process_index()
        hosts = ocp.options.MultiprocessingOptions(host, {host}, f"checkpoint_of_host_{host}")
        tree = jax.tree.map(np.asarray, tree)
    with ocp.StandardCheckpointer(multiprocessing_options=hosts) as checkpointer:
        checkpointer.save(folder.absolute(), tree)


def _load_params(path: Path, manifest: Manifest, sharding: jax.sharding.Sharding | None) -> Params:
    target = abstract_params(manifest.ranker.model, jnp.dtype(manifest.params_dtype))
    return _load_item(path / "params", manifest.params_files, manifest.params_sha256, target, sharding)


def _load_extra(path: Path, manifest: Manifest, name: str, sharding: jax.sharding.Sharding | None) -> Tree:
    if name not in manifest.extra:
        raise InputError(f"{path}: holds no {name}")
    item = manifest.extra[name]
    return _load_item(path / name, item.files, item.sha256, None, sharding)


def _load_item(
    folder: Path, files: Mapping[str, str], sha256: str, target: Tree | None, sharding: jax.sharding.Sharding | None
) -> Tree:
    """Returns an Orbax item after checking its files, its shapes against `target` (if given) and its values."""
    import orbax.checkpoint as ocp

    found = _file_hashes(folder)
    for name in sorted(found.keys() | files.keys()):
        if found.get(name) != files.get(name):
            problem = "is missing" if name not in found else "is unexpected" if name not in files else "is damaged"
            raise InputError(f"{folder}: {name} {problem} (sha256 differs from the manifest's)")
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder.absolute()).item_metadata.tree
        if target is not None:
            _check_shapes(stored, target, str(folder))
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), target or stored
        )
        tree: Tree = checkpointer.restore(folder.absolute(), target)
    if params_sha256(tree) != sha256:
        raise InputError(f"{folder}: values are not those of the manifest (sha256 differs)")
    return tree


def _check_shapes(params: Params, expected: Params, where: str) -> None:
    found, wanted = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (params, expected)
    )
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(f"{where}: {name} has shape {found.get(name)}, the config asks for {wanted.get(name)}")
