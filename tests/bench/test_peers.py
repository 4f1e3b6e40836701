"""The peer's process answers with the same logits, turn by turn; what cannot run is said, not raised."""

import sys
from importlib.util import find_spec

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


def test_torch_peers_give_the_same_logits() -> None:
    pytest.importorskip("torch")
    cross_encoder = find_spec("sentence_transformers") is not None
    result = bench_peers("small", "tiny", sys.executable, repeats=2, batches=(2, 7), torch_compile=False)
    assert [row["name"].split(",")[0] for row in result["rows"]] == [
        "jaxslm",
        *["transformers sdpa", "transformers eager"] * 2,
        *["sentence-transformers CrossEncoder (with tokenisation)"] * cross_encoder,
    ]
    assert all(row["max_abs_diff"] < 1e-5 and row["items_per_s"] > 0 for row in result["rows"])
    assert result["rows"][0]["ours_is_faster_by"] == 1
    reasons = result["not_measured"].values()
    assert not reasons or (not cross_encoder and all("sentence_transformers" in reason for reason in reasons))


@pytest.mark.parametrize(
    ("workload", "python", "message"),
    [("latent_8", sys.executable, "peers read text"), ("small", "false", "cannot import torch and transformers")],
)
def test_what_cannot_be_compared_is_refused(workload: str, python: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench_peers(workload, "tiny", python)
