"""The contrastive stage: that it learns, and that a ranker starts from its result."""

import json
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxslm.checkpoint import load_checkpoint
from jaxslm.train.encoder import train_encoder
from jaxslm.train.event_file import EventFile, crc32c
from jaxslm.train.loop import training_folder
from jaxslm.train.step import make_mesh
from tests.train.toy import toy_encoder, toy_folder


def test_contrastive_training_learns_and_makes_a_start(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("jaxslm.train.encoder.make_mesh", lambda: make_mesh(jax.devices()[:1]))
    folder, out = toy_folder(tmp_path), tmp_path / "encoder"
    settings = toy_encoder(folder, "steps=12", "save_every=12", "evaluation.every=12", "layers=1")
    result = train_encoder(settings, out)
    assert result.finished
    lines = [json.loads(line) for line in (training_folder(out) / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    trained = load_checkpoint(out)
    assert trained.config.model.num_layers == 1
    assert trained.manifest.metrics["ndcg_at_10"] == result.metrics["ndcg_at_10"]
    before = load_checkpoint(folder / "tiny").params["embedding"]
    np.testing.assert_array_equal(trained.params["embedding"], before)  # no gradient reaches the label rows


def test_event_files_are_tfrecords_of_scalars(tmp_path: Path) -> None:
    assert crc32c(b"123456789") == 0xE3069283
    EventFile(tmp_path).write(300, {"loss": 0.5})
    (path,) = tmp_path.iterdir()
    data, records = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        records.append(data[12 : 12 + length])
        (stored,) = struct.unpack("<I", data[12 + length : 16 + length])
        crc = crc32c(records[-1])
        assert stored == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        data = data[16 + length :]
    assert records[0].endswith(b"brain.Event:2")
    assert records[1][9:] == b"\x10\xac\x02*\x0d\x0a\x0b\x0a\x04loss\x15" + struct.pack("<f", 0.5)
