"""A made catalogue of a few occupations, as the demo's wheels hold it, and downloaders without a network."""

import dataclasses
import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from jaxslm.demo import packages
from jaxslm.demo.download import Downloader
from jaxslm.demo.fetch import Part, default_parts
from jaxslm.demo.packages import Package
from jaxslm.demo.queries import minor_group
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
