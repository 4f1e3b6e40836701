"""A ranker with a compressor for two vectors an item, which tests only read."""

from pathlib import Path

import pytest

from jaxslm.score.scorer import Ranker, load
from tests.compress.tiny_compressor import compressor_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressor_checkpoint(tmp_path_factory.mktemp("compressor") / "ckpt", ks=(2,))


@pytest.fixture(scope="session")
def ranker(checkpoint: Path) -> Ranker:
    return load(checkpoint)
