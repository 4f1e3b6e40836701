"""Checkpoints: bit-equal through save and load on any number of devices; damage is refused with one line."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxslm.checkpoint import load_checkpoint, load_manifest, params_sha256, save_checkpoint
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from tests.tiny import TINY_CONFIGS, tiny_checkpoint, tiny_config, tiny_params, tiny_ranker_config, tiny_tokenizer_json

TOKENIZER = {"tokenizer.json": tiny_tokenizer_json().encode()}


def assert_equal(found: Params, expected: Params) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, expected)


def assert_refused(path: Path, message: str = "") -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "saved", tiny_config(num_layers=1))


@pytest.fixture
def damaged(tmp_path: Path, saved: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "damaged")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_gives_what_was_saved(tmp_path: Path, dtype: str) -> None:
    config = tiny_ranker_config(TINY_CONFIGS["qwen3-non-uniform"], instruction="Find – it", max_tokens=777)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny_params(config.model))
    files = TOKENIZER | {"tokenizer_config.json": b"{}"}
    metrics = {"dev_ndcg_at_10": 0.5}
    manifest = save_checkpoint(
        tmp_path / "ckpt", config, params, files, source="made in a test", parent="ab" * 32, metrics=metrics
    )
    found = load_checkpoint(tmp_path / "ckpt")
    assert_equal(found.params, params)
    assert found.manifest == manifest == load_manifest(tmp_path / "ckpt")
    assert (found.config, found.tokenizer_files) == (config, files)
    assert (manifest.params_dtype, manifest.params_sha256) == (dtype, params_sha256(params))
    assert (manifest.source, manifest.parent, manifest.metrics) == ("made in a test", "ab" * 32, metrics)
    assert found.prompt.config == config.prompt
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_one_device_and_eight(tmp_path: Path) -> None:
    """Saved on one and restored on eight, replicated or sharded, and the other way round."""
    devices = jax.devices()
    assert len(devices) == 8
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    config = tiny_ranker_config()
    params = tiny_params(config.model)

    def split(leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("data" if leaf.shape[0] % 8 == 0 else None)))

    copies = {"one": params, "eight": jax.device_put(params, everywhere), "split": jax.tree.map(split, params)}
    for name, placed in copies.items():
        save_checkpoint(tmp_path / name, config, placed, TOKENIZER, source="random")
        on_one = load_checkpoint(tmp_path / name).params
        on_eight = load_checkpoint(tmp_path / name, everywhere).params
        assert all(leaf.devices() == {devices[0]} for leaf in jax.tree.leaves(on_one))
        assert all(leaf.devices() == set(devices) for leaf in jax.tree.leaves(on_eight))
        assert_equal(on_one, params)
        assert_equal(on_eight, params)


EXTRA: dict[str, dict[str, Any]] = {
    "masks": {"keep": np.array([[True, False, True]])},
    "compressor": {"inner": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": jnp.ones(4, jnp.bfloat16)},
}


@pytest.fixture(scope="module")
def with_extra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("extra") / "saved"
    config = tiny_ranker_config(tiny_config(num_layers=1))
    save_checkpoint(path, config, tiny_params(config.model), TOKENIZER, source="random", extra=EXTRA)
    return path


def test_further_items_come_back_when_asked_for(with_extra: Path) -> None:
    found = load_checkpoint(with_extra, extra=("masks", "compressor"))
    assert_equal(dict(found.extra), EXTRA)
    assert load_checkpoint(with_extra).extra == {}
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    everywhere = load_checkpoint(with_extra, NamedSharding(mesh, PartitionSpec()), extra=["masks"]).extra
    assert everywhere.keys() == {"masks"}
    assert len(everywhere["masks"]["keep"].devices()) == 8


def test_further_items_that_are_absent_or_damaged(tmp_path: Path, with_extra: Path) -> None:
    with pytest.raises(InputError, match="saved: holds no encoder"):
        load_checkpoint(with_extra, extra=["encoder"])
    damaged = shutil.copytree(with_extra, tmp_path / "damaged")
    file = next(path for path in sorted((damaged / "masks").rglob("*")) if path.is_file() and path.stat().st_size)
    flip(file)
    load_checkpoint(damaged, extra=["compressor"])
    with pytest.raises(InputError, match=r"damaged/masks: .* is damaged"):
        load_checkpoint(damaged, extra=["masks"])
    shutil.rmtree(damaged / "compressor")
    shutil.copytree(with_extra / "masks", damaged / "compressor")
    with pytest.raises(InputError, match="damaged/compressor: "):
        load_checkpoint(damaged, extra=["compressor"])


@pytest.mark.parametrize("name", ["params", "tokenizer", "../masks", "a/b", "", "manifest.json"])
def test_names_of_further_items(tmp_path: Path, name: str) -> None:
    config = tiny_ranker_config(tiny_config(num_layers=1))
    with pytest.raises(InputError, match="must be a plain word"):
        save_checkpoint(
            tmp_path / "ckpt", config, tiny_params(config.model), TOKENIZER, source="x", extra={name: EXTRA["masks"]}
        )
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_would_not_come_back(tmp_path: Path) -> None:
    config = tiny_ranker_config(tiny_config(num_layers=1))
    extra = {"masks": {"index": np.arange(3, dtype=np.int64)}}
    with pytest.raises(InputError, match="'masks': 64-bit numbers"):
        save_checkpoint(tmp_path / "ckpt", config, tiny_params(config.model), TOKENIZER, source="x", extra=extra)
    assert list(tmp_path.iterdir()) == []


def test_hash_sees_names_shapes_dtypes_and_values() -> None:
    leaf = jnp.arange(6, dtype=jnp.float32)
    trees = [
        {"a": leaf},
        {"b": leaf},
        {"a": leaf.reshape(2, 3)},
        {"a": leaf.astype(jnp.bfloat16)},
        {"a": leaf.at[0].set(-0.0)},
        {"a": leaf, "b": leaf},
    ]
    assert len({params_sha256(tree) for tree in trees}) == len(trees)
    assert params_sha256({"a": leaf, "b": leaf + 1}) == params_sha256({"b": leaf + 1, "a": leaf})


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_file_of_the_parameters(damaged: Path, damage: str) -> None:
    files = sorted(path for path in (damaged / "params").rglob("*") if path.is_file())
    assert len(files) >= 3
    for file in files:
        whole = file.read_bytes()
        DAMAGES[damage](file)
        problem = "missing" if damage == "deleted" else "damaged"
        assert_refused(damaged, rf"damaged/params: {file.relative_to(damaged / 'params')} is {problem}")
        file.write_bytes(whole)
    assert_equal(load_checkpoint(damaged).params, tiny_params(tiny_config(num_layers=1)))


def test_other_files_among_the_parameters(damaged: Path) -> None:
    (damaged / "params" / "more").write_text("x")
    assert_refused(damaged, "damaged/params: more is unexpected")
    shutil.rmtree(damaged / "params")
    assert_refused(damaged, "damaged/params: .* is missing")
    (damaged / "params").write_text("not a folder")
    assert_refused(damaged, "damaged/params: .* is missing")


@pytest.mark.parametrize("claimed", [True, False])
def test_parameters_of_another_checkpoint(tmp_path: Path, damaged: Path, claimed: bool) -> None:
    """Of the same shape with other values, of another shape, with a layer more; their files listed or not."""
    file = damaged / "manifest.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    for number, model in enumerate((tiny_config(num_layers=1), tiny_config(num_layers=1, width=16), tiny_config())):
        other = tiny_checkpoint(tmp_path / str(number), model, seed=7)
        shutil.rmtree(damaged / "params")
        shutil.copytree(other / "params", damaged / "params")
        if claimed:
            file.write_text(json.dumps(tree | {"params_files": load_manifest(other).params_files}))
        message = ("values are not those", "the config asks for", "the config asks for")[number] if claimed else " is "
        assert_refused(damaged, f"damaged/params: .*{message}")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_the_tokenizer(damaged: Path, damage: str) -> None:
    DAMAGES[damage](damaged / "tokenizer" / "tokenizer.json")
    assert_refused(damaged, "tokenizer.json: missing or damaged")


def test_a_missing_tokenizer_folder(damaged: Path) -> None:
    shutil.rmtree(damaged / "tokenizer")
    assert_refused(damaged, "tokenizer.json: missing or damaged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, this release reads 1: make it again .* `jaxslm convert`"),
        ({"format_version": "1"}, "format version '1'"),
        ({"format_version": True}, "format_version: Input should be a valid integer"),
        ({"format_version": ...}, "format version None"),
        ({"colour": "red"}, "manifest.json: colour: Extra inputs are not permitted"),
        ({"params_sha256": ...}, "manifest.json: params_sha256: Field required"),
        ({"params_sha256": "00"}, "params: values are not those of the manifest"),
        ({"tokenizer_sha256": "00"}, "tokenizer.json: missing or damaged"),
        ({"template_sha256": "00"}, "made for another version of prompt 'qwen3-reranker': convert it again"),
        ({"params_dtype": "float16"}, "params_dtype: Input should be 'float32' or 'bfloat16'"),
        ({"params_dtype": "bfloat16"}, "params: values are not those of the manifest"),
        ({"metrics": {"ndcg": "high"}}, "metrics.ndcg: Input should be a valid number"),
        ({"ranker": {}}, "ranker.model: Field required"),
    ],
    ids=str,
)
def test_wrong_manifest(damaged: Path, changes: dict[str, Any], message: str) -> None:
    file = damaged / "manifest.json"
    tree = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))
    assert_refused(damaged, message)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("model", "vocab_size"), 385, r"params: .'embedding'. has shape .384, 32., the config asks for .385, 32."),
        (("model", "mlp_width"), 40, "params: .*mlp.* has shape"),
        (("model", "num_layers"), 2, "params: .*layers_1.* has shape None"),
        (("model", "tie_embeddings"), False, "params: .*head.* has shape None"),
        (("model", "gating"), "relu", "ranker.model.gating: Extra inputs are not permitted"),
        (("prompt", "max_tokens"), 64, "made for another version of prompt"),
        (("prompt", "max_tokens"), 4097, "ranker: prompt.max_tokens 4097: the model was trained for rows of at most"),
        (("prompt", "template"), "poem", "ranker.prompt.template: Input should be"),
        (("label_token_ids",), [3, 3], "ranker: label_token_ids"),
        (("label_token_ids",), [3, 4], "label_token_ids .3, 4. of the manifest are not the tokenizer's"),
    ],
)
def test_wrong_ranker_in_the_manifest(damaged: Path, where: tuple[str, ...], value: Any, message: str) -> None:
    file = damaged / "manifest.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    node = tree["ranker"]
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    file.write_text(json.dumps(tree))
    assert_refused(damaged, message)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_broken_manifest(damaged: Path, content: bytes) -> None:
    (damaged / "manifest.json").write_bytes(content)
    assert_refused(damaged, "manifest.json: (broken JSON|format version None)")


def test_no_checkpoint(tmp_path: Path, damaged: Path) -> None:
    (damaged / "manifest.json").unlink()
    (tmp_path / "file").write_text("x")
    for path in (damaged, tmp_path / "absent", tmp_path / "file"):
        assert_refused(path, "not a checkpoint .no manifest.json.; `jaxslm convert` makes one")


def test_saving_never_overwrites(tmp_path: Path) -> None:
    config = tiny_ranker_config(tiny_config(num_layers=1))
    (tmp_path / "ckpt").mkdir()
    with pytest.raises(InputError, match="ckpt exists"):
        save_checkpoint(tmp_path / "ckpt", config, tiny_params(config.model), TOKENIZER, source="random")
    assert list((tmp_path / "ckpt").iterdir()) == []


def test_parameters_that_do_not_fit_are_not_saved(tmp_path: Path) -> None:
    config = tiny_ranker_config(tiny_config(num_layers=1))
    good = tiny_params(config.model)
    for params, message in (
        (tiny_params(tiny_config()), "layers_1.* has shape .*, the config asks for None"),
        (
            good | {"embedding": good["embedding"][:-1]},
            r"'embedding'\] has shape \(383, 32\), the config asks for \(384, 32\)",
        ),
        (
            good | {"embedding": good["embedding"].astype(jnp.bfloat16)},
            "must all be float32 or all be bfloat16, are bfloat16, float32",
        ),
    ):
        with pytest.raises(InputError, match=message):
            save_checkpoint(tmp_path / "ckpt", config, params, TOKENIZER, source="random")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_ranker_config(tiny_config(num_layers=1))
    params = tiny_params(config.model)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(size, 1, size - 1))
    with pytest.raises(InputError, match=r"ckpt: cannot write it \(No space left on device\)$"):
        save_checkpoint(tmp_path / "ckpt", config, params, TOKENIZER, source="random")
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
from pathlib import Path
from jaxslm.checkpoint import copy_calibrated, load_checkpoint, save_checkpoint
from jaxslm.config import Calibration
from jaxslm.errors import InputError
source, out = map(Path, sys.argv[1:])
saved = load_checkpoint(source)
files = {"tokenizer.json": (source / "tokenizer" / "tokenizer.json").read_bytes()}
resource.setrlimit(resource.RLIMIT_FSIZE, (20_480, 20_480))  # less than the parameters, more than the tokenizer
more = files | {"more.txt": b"x" * 30_000}
for save in (
    lambda: save_checkpoint(out / "ckpt", saved.config, saved.params, more, source="random"),
    lambda: save_checkpoint(out / "ckpt", saved.config, saved.params, files, source="random"),
    lambda: copy_calibrated(source, out / "copy", Calibration(), {}),
):
    try:
        save()
    except InputError as error:
        print(error)
"""


def test_a_write_that_fails_is_told_by_its_path(tmp_path: Path, saved: Path) -> None:
    """Of a tokenizer's file, by Orbax, and of a copy. In a process of its own, whose files may not be large."""
    ran = subprocess.run([sys.executable, "-c", LIMITED, saved, tmp_path], capture_output=True, text=True, check=True)
    said = [f"{tmp_path / name}: cannot write it (File too large)" for name in ("ckpt", "ckpt", "copy")]
    assert ran.stdout.splitlines() == said
    assert list(tmp_path.iterdir()) == []


def test_a_failing_save_leaves_nothing(tmp_path: Path) -> None:
    """The second file of the tokenizer cannot be written: its folder is not there."""
    config = tiny_ranker_config(tiny_config(num_layers=1))
    files = TOKENIZER | {"sub/folder.json": b"{}"}
    with pytest.raises(OSError, match=r"folder\.json"):
        save_checkpoint(tmp_path / "ckpt", config, tiny_params(config.model), files, source="random")
    assert list(tmp_path.iterdir()) == []
