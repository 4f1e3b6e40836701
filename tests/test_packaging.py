"""What pyproject.toml and the constraints files promise."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LANES = ["floor", "main", "newest"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_names(requirements: list[str]) -> set[str]:
    names = {canonical(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in requirements}
    return names - {"jaxslm"}


def pins(lane: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / f"{lane}.txt").read_text().splitlines()
    return {
        canonical(name): version for name, version in (line.split("==") for line in lines if not line.startswith("#"))
    }


@pytest.mark.parametrize("lane", LANES)
def test_jax_and_its_plugin_are_pinned_together(lane: str) -> None:
    together = ["jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt"]
    assert len({pins(lane)[name] for name in together}) == 1


@pytest.mark.parametrize("lane", LANES)
def test_every_direct_dependency_is_pinned(lane: str) -> None:
    extras = PROJECT["optional-dependencies"]
    direct = [PROJECT["dependencies"], *(extras[name] for name in ["train", "serve", "aot", "dev"])]
    assert set().union(*map(requirement_names, direct)) <= set(pins(lane))


@pytest.mark.parametrize("lane", LANES)
def test_pins_are_plain_versions(lane: str) -> None:
    assert {name for name, version in pins(lane).items() if not re.fullmatch(r"\d+(\.\d+)*(b\d+)?", version)} == set()


def test_torch_belongs_to_the_floor_lane_and_to_no_extra() -> None:
    assert [lane for lane in LANES if "torch" in pins(lane)] == ["floor"]
    extras = PROJECT["optional-dependencies"].values()
    assert "torch" not in requirement_names(PROJECT["dependencies"]).union(*map(requirement_names, extras))


def test_installed_versions_are_those_of_the_lane() -> None:
    lane = {(3, 11): "floor", (3, 12): "main"}.get(sys.version_info[:2], "newest")
    installed = {name: importlib.metadata.version(name) for name in ["jax", "jaxlib", "flax", "orbax-checkpoint"]}
    assert installed == {name: pins(lane)[name] for name in installed}


def test_eight_cpu_devices() -> None:
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


@pytest.mark.parametrize(
    ("module", "not_imported"),
    [
        ("jaxslm", ["jax", "transformers"]),
        ("jaxslm.config", ["jax", "transformers"]),
        ("jaxslm.cli", ["jax", "transformers", "datasets"]),
        ("jaxslm.score", ["optax", "datasets", "grain", "jaxslm.train"]),
    ],
)
def test_import_is_light(module: str, not_imported: list[str]) -> None:
    code = f"import sys, {module}; print(*(set(sys.modules) & {set(not_imported)}))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.split() == []


def test_kernels_import_without_jaxslm() -> None:
    code = "import sys, pallas_kernels; print('jaxslm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "False"
