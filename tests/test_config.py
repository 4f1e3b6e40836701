"""Settings: strict, frozen, from TOML with overrides; every error one line with file, field and rule."""

from pathlib import Path

import pytest

from jaxslm.config import ModelConfig, PromptConfig, RankerConfig, Settings, load_toml, validate
from jaxslm.errors import InputError
from tests.tiny import tiny_config

PROMPT = 'template = "yes-no"\ninstruction = "Find it"\nmax_tokens = 64\n'


class Nested(Settings):
    prompt: PromptConfig
    rate: float = 0.5
    names: tuple[str, ...] = ()


def write(folder: Path, text: str) -> Path:
    file = folder / "settings.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_toml(tmp_path: Path) -> None:
    assert load_toml(write(tmp_path, PROMPT), PromptConfig) == PromptConfig(
        template="yes-no", instruction="Find it", max_tokens=64
    )


def test_overrides(tmp_path: Path) -> None:
    """Values are read as TOML, else as strings; tables are made as needed."""
    file = write(tmp_path, "[prompt]\n" + PROMPT)
    overrides = ("prompt.max_tokens=128", "prompt.instruction=Find = all, now", "rate=1e-3", 'prompt.template="yes-no"')
    found = load_toml(file, Nested, overrides)
    assert (found.prompt.max_tokens, found.prompt.instruction, found.rate) == (128, "Find = all, now", 1e-3)
    made = load_toml(write(tmp_path, ""), Nested, ("prompt.template=yes-no",))
    assert made.prompt == PromptConfig(template="yes-no")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompt.max_tokens", "setting prompt.max_tokens: must be a.b=value"),
        ("=3", "setting =3: must be a.b=value"),
        ("prompt..max_tokens=3", "must be a.b=value"),
        ("rate.x=3", "setting rate.x=3: rate is a value, not a table"),
        ("prompt.colour=red", "prompt.colour: Extra inputs are not permitted"),
        ("prompt.max_tokens=many", "prompt.max_tokens: Input should be a valid integer"),
        ("prompt.max_tokens=8", "prompt.max_tokens: Input should be greater than or equal to 32"),
        ("prompt.max_tokens=64.0", "prompt.max_tokens: Input should be a valid integer"),
        ("prompt=3", "prompt: Input should be a valid dictionary"),
    ],
)
def test_overrides_against_the_rules(tmp_path: Path, override: str, message: str) -> None:
    file = write(tmp_path, "rate = 0.1\n[prompt]\n" + PROMPT)
    with pytest.raises(InputError, match=message) as caught:
        load_toml(file, Nested, (override,))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'template = "yes-no', "broken TOML"),
        (b'template = "\xff"', "invalid UTF-8 at byte 12"),
        (b'template = "other"', "template: Input should be"),
        (b"", "template: Field required"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"settings.toml: {message}") as caught:
        load_toml(file, PromptConfig)
    assert "\n" not in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            load_toml(path, PromptConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_width": (48, 48, 48)}, "ModelConfig: mlp_width lists 3 layers, num_layers is 2"),
        ({"num_kv_heads": (2,)}, "ModelConfig: num_kv_heads lists 1 layers, num_layers is 2"),
        ({"head_dim": 7}, "head_dim: Input should be a multiple of 2"),
        ({"mlp_width": (48, 0)}, "mlp_width"),
        ({"num_layers": 0}, "num_layers: Input should be greater than 0"),
        ({"family": "gemma"}, "family: Input should be"),
        ({"vocab_size": "384"}, "vocab_size: Input should be a valid integer"),
        ({"norm_eps": 0.0}, "norm_eps: Input should be greater than 0"),
    ],
)
def test_impossible_shapes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"here: {message}"):
        validate(ModelConfig, tiny_config().model_dump() | changes, "here")


@pytest.mark.parametrize("labels", [(3, 3), (-1, 2), (1, 384)])
def test_labels_are_two_rows_of_the_vocabulary(labels: tuple[int, int]) -> None:
    tree = {"model": tiny_config().model_dump(), "prompt": {"template": "yes-no"}, "label_token_ids": labels}
    with pytest.raises(InputError, match="must be two ids below 384"):
        validate(RankerConfig, tree, "here")


def test_settings_survive_json() -> None:
    """Also widths by layer, which are tuples here and lists there."""
    config = tiny_config(num_kv_heads=(2, 1), mlp_width=(48, 16))
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    assert ModelConfig.model_validate(config.model_dump(mode="json")) == config
