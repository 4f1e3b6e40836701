"""The peer's process answers with the same logits, turn by turn; what cannot run is said, not raised."""

import sys

import pytest

from jaxslm.bench import workloads
from jaxslm.bench.peers import bench_peers
from jaxslm.bench.workloads import Workload
from jaxslm.errors import InputError
from tests.tiny import tiny_config


@pytest.fixture(autouse=True)
def tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workloads.MODELS, "tiny", tiny_config("llama"))
    monkeypatch.setitem(workloads.WORKLOADS, "small", Workload("small", 6, 5, 7))


def test_transformers_gives_the_same_logits() -> None:
    pytest.importorskip("torch")
    result = bench_peers("small", "tiny", sys.executable, repeats=2, batches=(2, 7), torch_compile=False)
    assert [row["name"].split(",")[0] for row in result["rows"]] == [
        "jaxslm",
        *["transformers sdpa", "transformers eager"] * 2,
    ]
    assert all(row["max_abs_diff"] < 1e-5 and row["items_per_s"] > 0 for row in result["rows"])
    assert result["rows"][0]["ours_is_faster_by"] == 1
    assert result["not_measured"] == {}


@pytest.mark.parametrize(
    ("workload", "python", "message"),
    [("latent_8", sys.executable, "peers read text"), ("small", "false", "cannot import torch and transformers")],
)
def test_what_cannot_be_compared_is_refused(workload: str, python: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench_peers(workload, "tiny", python)
