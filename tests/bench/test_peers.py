"""The peer's process answers with the same logits, turn by turn; what cannot run is said, not raised."""

import json
import sys
from collections import Counter
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxslm.bench import peers, workloads
from jaxslm.bench.device import Ceilings
from jaxslm.bench.peers import Setting, bench_peers
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


class FakePeer(peers.Peer):
    """Answers at once, with logits of zero."""

    def __init__(self, python: str, setup: dict[str, Any]) -> None:
        self.about = {"versions": {"torch": "2"}, "device": "cpu", "setup": setup}
        self.rows = len(np.load(setup["rows"]))
        asked.append(setup["dtype"])

    def run(self, setting: Setting, save: Path | None = None) -> float | str:
        if save is not None:
            np.save(save, np.zeros(self.rows if setting.cross_encoder else (self.rows, 2)))
        return 0.5

    def close(self) -> None:
        """Nothing to end."""


asked: list[str] = []
"""The dtype that each peer was told."""


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_report_has_the_keys_of_all_benchmarks_after_the_floor(
    dtype: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "Peer", FakePeer)
    monkeypatch.setattr(peers, "check_python", lambda python: None)
    name = dtype or "float32"
    ceilings = Ceilings("a CPU", name, 1e11, 1e10)
    result = bench_peers("small", "tiny", "python", dtype=dtype, repeats=2, batches=(7,), ceilings=ceilings)
    assert (result["workload"], result["model"], result["dtype"], result["device"]) == ("small", "tiny", name, "a CPU")
    assert result["ceiling_tflops"] == 0.1
    assert result["tokens_per_forward"] == 6 + 7 * 5
    assert 0 <= result["padding_fraction"] < 0.2
    assert 0 < result["mfu"] == pytest.approx(result["items_per_s"] * result["gflop_per_item"] / 100)
    assert result["max_abs_diff"] < (1e-5 if dtype is None else 0.05)
    assert asked[-1] == name
    json.dumps(result)
    assert capsys.readouterr().err.startswith("small: 7 items of 5 tokens after 6 shared ones")


class FailingPeer(FakePeer):
    """Runs a setting in half of our time; fails with "eager" whenever it is timed, and with "sdpa" in the first round.

    A setting runs twice before the rounds.
    """

    def __init__(self, python: str, setup: dict[str, Any]) -> None:
        super().__init__(python, setup)
        self.runs: Counter[Setting] = Counter()

    def run(self, setting: Setting, save: Path | None = None) -> float | str:
        self.runs[setting] += 1
        round_number = self.runs[setting] - 2
        if round_number == 1 or (round_number > 1 and setting.attention == "eager"):
            return "out of memory"
        super().run(setting, save)
        return 0.5 * max(round_number, 1)


def test_rounds_that_fail_are_left_out_and_the_others_stay_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours takes a second more in each round, and the peer half of that."""
    rounds = count(1)
    monkeypatch.setattr(peers, "Peer", FailingPeer)
    monkeypatch.setattr(peers, "check_python", lambda python: None)
    monkeypatch.setattr(peers, "timed", lambda ours: float(next(rounds)))
    ceilings = Ceilings("a CPU", "float32", 1e11, 1e10)
    result = bench_peers("small", "tiny", "python", repeats=4, batches=(7,), torch_compile=False, ceilings=ceilings)
    named = {row["name"]: row for row in result["rows"]}
    assert not [name for name in named if "eager" in name]
    assert {why for name, why in result["not_measured"].items() if "eager" in name} == {"out of memory"}
    assert len(result["not_measured"]) == 2
    assert {row["ours_is_faster_by"] for name, row in named.items() if name != "jaxslm"} == {0.5}
    assert named[str(Setting("sdpa", 1, 7))]["items_per_s"] == pytest.approx(7 / 1.5)
    assert "left out, as it failed in every round: transformers eager" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workload", "python", "message"),
    [
        ("latent_8", sys.executable, "peers read text"),
        ("small", "false", "cannot import torch and transformers"),
        ("small", "/no/such/python", "--peer-python /no/such/python: no program that can be run"),
        ("small", __file__, "no program that can be run"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    workload: str, python: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is made."""
    monkeypatch.setattr(peers, "model_named", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(InputError, match=message):
        bench_peers(workload, "tiny", python)
