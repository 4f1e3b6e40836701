"""Exported folders: the same logits through plain `transformers`, the same parameters back, nothing half-written."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from tokenizers import Tokenizer

from jaxslm.checkpoint import copy_calibrated, load_checkpoint, save_checkpoint
from jaxslm.config import Calibration, ModelConfig, PromptConfig
from jaxslm.convert import convert, export
from jaxslm.convert.export import export_hf
from jaxslm.errors import InputError
from jaxslm.model.cost import count_parameters
from jaxslm.prompt import Prompt
from jaxslm.score.scorer import Ranker, load
from tests.tiny import TINY_CONFIGS, tiny_checkpoint, tiny_config, tiny_params, tiny_ranker_config, tiny_tokenizer_json

UNIFORM = {name: config for name, config in TINY_CONFIGS.items() if name != "qwen3-non-uniform"}
"""Round trips are exact for these; layers of other widths are filled up."""
TOKENIZER = Tokenizer.from_str(tiny_tokenizer_json())
FLOAT32 = jnp.dtype("float32")
ROWS = [[5, 17, 9], [3, 4], list(range(40, 70)), [7]]
TEXT = "Judge the <think> job.\n\nA python developer, é 12.\n"

READ = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
folders, rows, text = json.load(sys.stdin)
for folder, kind in folders:
    model = {"lm": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}[kind]
    model = model.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits[0].flatten()[-model.config.vocab_size:] for row in rows]
        together = []
        for side in ("left", "right"):
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
            if kind == "classifier":
                padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
                together.append(model(**padded).logits[:, 0])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    np.savez(folder + ".npz", *[x.numpy() for x in [*alone, *together]], ids=ids)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model, exported both ways and read by `transformers` in another interpreter."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed (the floor lane has it)")
    root = tmp_path_factory.mktemp("exported")
    made = []
    for name, config in TINY_CONFIGS.items():
        tiny_checkpoint(root / f"{name}-ckpt", config, seed=3)
        for kind in ("lm", "classifier"):
            export_hf(root / f"{name}-ckpt", root / f"{name}-{kind}", classifier=kind == "classifier")
            made.append((str(root / f"{name}-{kind}"), kind))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    given = json.dumps((made, ROWS, TEXT))
    done = subprocess.run(
        [sys.executable, "-c", READ], input=given, text=True, capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return root


def answers(folder: Path) -> tuple[list[np.ndarray], list[int]]:
    with np.load(f"{folder}.npz") as file:
        return [file[f"arr_{number}"] for number in range(len(file.files) - 1)], file["ids"].tolist()


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_transformers_gives_the_same_logits(folders: Path, name: str) -> None:
    ranker = Ranker(load_checkpoint(folders / f"{name}-ckpt"), FLOAT32)
    logits, ids = answers(folders / f"{name}-lm")
    found = np.stack([row[list(ranker.label_token_ids)] for row in logits])
    np.testing.assert_allclose(found, ranker.label_logits(ROWS), rtol=0, atol=1e-4)
    assert ids == TOKENIZER.encode(TEXT, add_special_tokens=False).ids


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_classifiers_logit_is_the_log_odds_alone_and_padded_on_either_side(folders: Path, name: str) -> None:
    logits = Ranker(load_checkpoint(folders / f"{name}-ckpt"), FLOAT32).label_logits(ROWS)
    found, _ = answers(folders / f"{name}-classifier")
    *alone, left, right = found
    for each in (np.concatenate(alone), left, right):
        np.testing.assert_allclose(each, logits[:, 1] - logits[:, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in UNIFORM), ("qwen3", "bfloat16"), ("llama-multi-head", "bfloat16")],
)
def test_convert_gives_the_parameters_back_bit_for_bit(tmp_path: Path, name: str, dtype: str) -> None:
    config = tiny_ranker_config(UNIFORM[name])
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny_params(config.model))
    files = {"tokenizer.json": tiny_tokenizer_json().encode(), "tokenizer_config.json": b'{"eos_token": "<|im_end|>"}'}
    made = save_checkpoint(tmp_path / "ckpt", config, params, files, source="random")
    export_hf(tmp_path / "ckpt", tmp_path / "hf")
    back = convert(str(tmp_path / "hf"), tmp_path / "back")
    assert back.params_sha256 == made.params_sha256
    assert back.ranker == made.ranker
    assert back.tokenizer_sha256 == made.tokenizer_sha256
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["torch_dtype"]) == (
        None,
        TOKENIZER.token_to_id("<|im_end|>"),
        dtype,
    )


PROMPT: dict[str, Any] = {
    "template": "yes-no",
    "instruction": "Given a search, find jobs",
    "max_tokens": 300,
    "max_item_tokens": 9,
    "labels": (" the", " job"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a calibrated checkpoint, "ckpt", whose prompt is nobody's default, and its export, "hf"."""
    root = tmp_path_factory.mktemp("own-prompt")
    plain = tiny_checkpoint(root / "plain", TINY_CONFIGS["qwen3-non-uniform"], **PROMPT)
    copy_calibrated(plain, root / "ckpt", Calibration(method="platt", scale=0.5, bias=0.25), {})
    export_hf(root / "ckpt", root / "hf")
    return root


def test_convert_gives_prompt_and_calibration_back(tmp_path: Path, exported: Path) -> None:
    back = convert(str(exported / "hf"), tmp_path / "back")
    assert back.ranker.prompt == PromptConfig(**PROMPT)
    texts = ["a python job", "developer " * 20]
    found, expected = (load(path).score_request("job?", texts) for path in (tmp_path / "back", exported / "ckpt"))
    np.testing.assert_allclose(found.log_odds, expected.log_odds, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.calibrated, expected.calibrated, rtol=0, atol=1e-5)
    assert found.truncated == expected.truncated == [False, True]


def test_options_win_over_an_exports_prompt_and_end_its_calibration(
    tmp_path: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back = convert(str(exported / "hf"), tmp_path / "back", max_item_tokens=7)
    assert back.ranker.prompt == PromptConfig(**PROMPT | {"max_item_tokens": 7})
    assert back.calibration is None
    assert "the calibration is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": PROMPT | {"max_tokens": 8}}, "jaxslm.json: prompt.max_tokens: Input should be greater than"),
        ({"more": 1}, "jaxslm.json: more: Extra inputs are not permitted"),
        ("{", "jaxslm.json: broken JSON"),
    ],
)
def test_what_an_export_says_is_checked(tmp_path: Path, exported: Path, change: Any, message: str) -> None:
    shutil.copytree(exported / "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "jaxslm.json"
    file.write_text(change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        convert(str(tmp_path / "hf"), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def made(path: Path, model: ModelConfig | None = None, **config: Any) -> Path:
    """A checkpoint whose tokenizer_config.json holds `config`."""
    ranker = tiny_ranker_config(model)
    files = {"tokenizer.json": tiny_tokenizer_json().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    save_checkpoint(path, ranker, tiny_params(ranker.model), files, source="random")
    return path


def padding(folder: Path) -> tuple[str, int]:
    """The padding token that the tokenizer uses, and its id in the model's config."""
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    return tokens["pad_token"], json.loads((folder / "config.json").read_text())["pad_token_id"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pad_token": "<|im_start|>", "eos_token": "<|im_end|>"}, "<|im_start|>"),
        ({"eos_token": {"content": "<|im_end|>", "lstrip": False}}, "<|im_end|>"),
        ({"pad_token": "not in the vocabulary"}, "<|endoftext|>"),
        ({}, "<|endoftext|>"),
    ],
    ids=["its-own", "end", "unknown", "any-special"],
)
def test_a_classifier_states_the_token_it_is_padded_with(tmp_path: Path, config: Any, expected: str) -> None:
    export_hf(made(tmp_path / "ckpt", **config), tmp_path / "hf", classifier=True)
    token, number = padding(tmp_path / "hf")
    assert (token, number) == (expected, TOKENIZER.token_to_id(expected))


def test_padding_is_never_what_a_row_ends_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = made(tmp_path / "ckpt", pad_token="<|im_end|>")
    monkeypatch.setattr(Prompt, "suffix_ids", [7, TOKENIZER.token_to_id("<|im_end|>")])
    export_hf(ckpt, tmp_path / "hf", classifier=True)
    assert padding(tmp_path / "hf")[0] == "<|endoftext|>"


def test_the_card_states_the_prompt_and_the_convention(tmp_path: Path) -> None:
    ckpt = tiny_checkpoint(tmp_path / "ckpt", instruction='Find "it"')
    export_hf(ckpt, tmp_path / "hf", classifier=True)
    card = (tmp_path / "hf" / "README.md").read_text()
    row = json.loads(card.split("```json\n")[1].split("\n```")[0])
    prompt = load_checkpoint(ckpt).prompt
    request = prompt.encode("query", ["item"])
    filled = row.format(query="query", item="item")
    found = TOKENIZER.encode(filled, add_special_tokens=False).ids
    assert found == request.prefix_ids + request.item_ids[0]
    assert "rows of different lengths must be padded" in card


def test_narrower_layers_are_filled_up_with_zeros(tmp_path: Path) -> None:
    """Layers of (48, 16, 40) neurons and (2, 1, 2) KV groups: what is added is zero, and scores stay."""
    ckpt = tiny_checkpoint(tmp_path / "ckpt", TINY_CONFIGS["qwen3-non-uniform"])
    written = export_hf(ckpt, tmp_path / "hf")
    back = convert(str(tmp_path / "hf"), tmp_path / "back")
    assert (back.ranker.model.mlp_width, back.ranker.model.num_kv_heads) == (48, 2)
    neurons, groups = 3 * 32 * (32 + 8), 2 * 32 * 8 * (2 + 1)  # gate, up, down; q and o of two heads, k and v of one
    assert written["zeros_added"] == neurons + groups
    assert written["parameters"] == count_parameters(back.ranker.model).total
    narrow, wide = (Ranker(load_checkpoint(path), FLOAT32).label_logits(ROWS) for path in (ckpt, tmp_path / "back"))
    np.testing.assert_allclose(wide, narrow, atol=1e-5)


def test_an_existing_output_is_kept_and_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = tiny_checkpoint(tmp_path / "ckpt", tiny_config())
    (tmp_path / "mine").write_text("old")
    with pytest.raises(InputError, match="mine exists"):
        export_hf(ckpt, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "old"

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(InputError, match=r"hf: cannot write it .*No space left on device"):
        export_hf(ckpt, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "mine"]
    with pytest.raises(InputError, match="not a checkpoint"):
        export_hf(tmp_path / "nowhere", tmp_path / "hf")
