"""The demo data of `jaxslm fetch-demo`, for tests marked `demo`: in the folder JAXSLM_DEMO, else in `demo/`."""

import os
import tempfile
from functools import cache
from pathlib import Path

import pytest

from jaxslm.checkpoint import Checkpoint, load_checkpoint
from jaxslm.convert import convert

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_folder() -> Path:
    """Returns the folder of the demo data; skips the test where there is none."""
    folder = Path(os.environ.get("JAXSLM_DEMO") or Path(__file__).parents[1] / "demo")
    if not (folder / "model" / GGUF_NAME).is_file():
        pytest.skip(f"no demo data in {folder}: run `jaxslm fetch-demo --out demo` or set JAXSLM_DEMO")
    return folder


@cache
def smollm2() -> Checkpoint:
    """Returns SmolLM2-135M-Instruct through `convert` and `load_checkpoint`, once per run."""
    source = demo_folder() / "model" / GGUF_NAME
    with tempfile.TemporaryDirectory() as folder:
        convert(str(source), Path(folder) / "smollm2")
        return load_checkpoint(Path(folder) / "smollm2")
