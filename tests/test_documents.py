"""Documents tell the truth: configs load, every command in a header, in the README and in --help is one, code runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from jaxslm import cli
from jaxslm.config import Settings, load_toml
from tests.tiny import tiny_checkpoint, tiny_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def all_commands(group: Any) -> list[Any]:
    """The verbs of a group and of the groups in it."""
    nested = [all_commands(each) if hasattr(each, "commands") else [each] for each in group.commands.values()]
    return [command for commands in nested for command in commands]


COMMANDS = all_commands(typer.main.get_command(cli.app))


def commands_in(text: str) -> list[str]:
    """Indented lines and code spans that start with `jaxslm VERB`."""
    lines = re.findall(r"^(?:# {4,}|    )(jaxslm [a-z].*)$", text, re.MULTILINE)
    spans = re.findall(r"`(jaxslm [a-z][^`]*)`", text)
    return [re.sub(r"\s+#.*", "", command) for command in lines + spans if "COMMAND" not in command]


def check_command(command: str) -> None:
    """Fails unless the verb exists and takes these arguments."""
    _, *arguments = shlex.split(command)
    found = typer.main.get_command(cli.app)
    while hasattr(found, "commands"):
        verb, *arguments = arguments
        assert verb in found.commands, command
        found = found.commands[verb]
    found.make_context(verb, arguments)


@pytest.mark.parametrize("command", commands_in(README))
def test_commands_of_the_readme(command: str) -> None:
    check_command(command)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_examples_of_help(command: Any) -> None:
    [example] = re.findall(r"Example: (jaxslm .*)", command.help)
    check_command(example)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_its_header_commands_exist(path: Path) -> None:
    from jaxslm.train.compressor_settings import CompressorTraining
    from jaxslm.train.settings import EncoderTraining, RankerTraining

    text = path.read_text(encoding="utf-8")
    header = text[: re.search(r"^[^#]", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    commands = commands_in(header)
    for command in commands:
        check_command(command)
    [own] = [command for command in commands if f"configs/{path.name}" in command]
    kinds: dict[str, type[Settings]] = {
        "encoder": EncoderTraining,
        "ranker": RankerTraining,
        "compressor": CompressorTraining,
    }
    load_toml(path, kinds[shlex.split(own)[2]])


def test_there_are_at_most_eight_configs() -> None:
    assert 0 < len(CONFIGS) <= 8


def test_python_of_the_readme_runs(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "ckpt", tiny_config())
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(block.replace("quickstart/ranker", str(checkpoint)), names)
    assert len(names["scores"]) == 2  # type: ignore[arg-type]


def test_files_named_in_the_readme_exist() -> None:
    for name in re.findall(r"(?:bash |`)((?:scripts|docs|tests|configs|jaxslm|constraints)/[\w./-]*)", README):
        assert (ROOT / name).exists(), name
