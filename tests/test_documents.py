"""Documents tell the truth: configs load, every command in a header, in the README and in --help is one, code runs."""

import argparse
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from jaxslm import cli
from jaxslm.bench.workloads import MODELS
from jaxslm.config import Settings, load_toml
from jaxslm.serve.settings import ServeSettings
from tests.compress.tiny_compressor import compressor_checkpoint
from tests.serve.tiny_server import BUCKETS, running
from tests.tiny import tiny_checkpoint, tiny_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs" / "results").glob("*.md"))]
SPANNED = [ROOT / "README.md", ROOT / "docs" / "results" / "frontier.md"]
"""Documents whose code spans are whole commands."""
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def all_commands(group: Any) -> list[Any]:
    """The verbs of a group and of the groups in it."""
    nested = [all_commands(each) if hasattr(each, "commands") else [each] for each in group.commands.values()]
    return [command for commands in nested for command in commands]


COMMANDS = all_commands(typer.main.get_command(cli.app))


def indented(text: str, program: str) -> list[str]:
    """Indented lines that start a program: continued ones in one, without comments or `&`, a number for a variable."""
    lines = re.findall(rf"^(?:# {{4,}}|    )({program}.*)$", text.replace("\\\n", ""), re.MULTILINE)
    return [re.sub(r"\$[A-Z]+", "1", re.sub(r"\s+[#&].*", "", line)) for line in lines]


def commands_in(text: str) -> list[str]:
    """Indented lines that start with `jaxslm VERB`."""
    return indented(text, "jaxslm [a-z]")


def spans_in(text: str) -> list[str]:
    """Code spans that start with `jaxslm VERB`."""
    return [span for span in re.findall(r"`(jaxslm [a-z][^`]*)`", text) if "COMMAND" not in span]


def check_command(command: str) -> None:
    """Fails unless the verb exists and takes these arguments."""
    _, *arguments = shlex.split(command)
    found = typer.main.get_command(cli.app)
    while hasattr(found, "commands"):
        verb, *arguments = arguments
        assert verb in found.commands, command
        found = found.commands[verb]
    found.make_context(verb, arguments)


def fenced(text: str) -> list[str]:
    """Lines of blocks that are marked as bash."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [re.sub(r"\s+# .*", "", line) for block in blocks for line in block.splitlines() if line]


def script_lines(text: str) -> list[str]:
    """Indented lines that start a script, but for the one that imports a package which only it needs (qwix)."""
    return [line for line in indented(text, "(?:bash|python3?) scripts/") if "scripts/int8_study.py" not in line]


def check_script(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless bash can read the script, or the Python script takes these arguments."""
    program, name, *arguments = shlex.split(command)
    if program == "bash":
        assert not arguments or name == "scripts/test", command  # whose arguments are pytest's
        subprocess.run(["bash", "-n", ROOT / name], check=True)
        return
    accepted: list[argparse.Namespace] = []

    class AcceptedError(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *given: Any) -> None:
        accepted.append(parse(self, *given))
        raise AcceptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with pytest.raises(AcceptedError):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    assert accepted


@pytest.mark.parametrize(
    "command",
    [each for path in DOCUMENTS for each in commands_in(path.read_text(encoding="utf-8"))]
    + [each for path in SPANNED for each in spans_in(path.read_text(encoding="utf-8"))],
)
def test_commands_in_documents(command: str) -> None:
    check_command(command)


@pytest.mark.parametrize(
    "command",
    [each for path in DOCUMENTS for each in script_lines(path.read_text(encoding="utf-8"))]
    + [line for line in fenced(README) if "scripts/" in line],
)
def test_scripts_in_documents(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_script(command, monkeypatch)


def test_every_line_of_the_readme_is_of_a_kind_that_is_tested() -> None:
    assert {line.split()[0] for line in fenced(README)} == {"bash", "jaxslm", "curl"}


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
    [kind] = {shlex.split(command)[2] for command in commands if f"configs/{path.name}" in command}
    kinds: dict[str, type[Settings]] = {
        "encoder": EncoderTraining,
        "ranker": RankerTraining,
        "compressor": CompressorTraining,
    }
    load_toml(path, kinds[kind])


def test_the_gradual_schedule_of_a_header_is_that_of_the_study() -> None:
    """Each stage prunes what the last one recovered, with the target and the share of updates of `stages`."""
    from jaxslm.prune.model import PruneSettings
    from jaxslm.prune.study import stages
    from jaxslm.train.settings import RankerTraining

    path = ROOT / "configs" / "cpu-recover.toml"
    commands = [shlex.split(command) for command in commands_in(path.read_text(encoding="utf-8"))][2:]
    model = MODELS["smollm2-135m"].model_copy(update={"num_layers": 7})
    expected = stages(model, PruneSettings(mlp_keep=768, drop_layers=2))
    steps, current = load_toml(path, RankerTraining).steps, "ranker"
    for prune, train, (target, share) in zip(commands[::2], commands[1::2], expected, strict=True):
        asked = dict(zip(prune[2::2], prune[3::2], strict=True))
        assert (asked["--model"], prune[1], train[1:3]) == (current, "prune", ["train", "ranker"])
        assert asked.get("--mlp-keep") == (target.mlp_keep and str(target.mlp_keep))
        assert int(asked.get("--drop-layers", 0)) == target.drop_layers
        pruned, current = f"model={asked['--out']}", train[-1]
        assert [train[place + 1] for place, each in enumerate(train) if each == "--set"] == [
            pruned,
            f"steps={round(share * steps)}",
        ]


def test_there_are_at_most_eight_configs() -> None:
    assert 0 < len(CONFIGS) <= 8


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's commands find what the quickstart leaves: tiny models, two postings."""
    folder = tmp_path_factory.mktemp("readme")
    tiny_checkpoint(folder / "quickstart" / "ranker", tiny_config())
    tiny_checkpoint(folder / "quickstart" / "recovered", tiny_config("llama"), template="yes-no")
    compressor_checkpoint(folder / "quickstart" / "compressed", ks=(8,))
    jobs = folder / "quickstart" / "demo" / "jobs"
    jobs.mkdir(parents=True)
    items = [{"id": "15-1252.00", "text": "Writes software."}, {"id": "53-3032.00", "text": "Drives a truck."}]
    (jobs / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def jaxslm(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # tests leave the user's cache folder alone
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0, command


def test_python_of_the_readme_runs(quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart)
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert len(names["scores"]) == 2
    assert names["scores"][names["best"]] == max(names["scores"])


def test_commands_of_the_readme_run(quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them that end by themselves, in order, then its requests to a server that its command describes."""
    monkeypatch.chdir(quickstart)
    lines = [line for line in fenced(README) if "scripts/" not in line]
    [serve] = [line for line in lines if line.startswith("jaxslm serve")]
    requests = [shlex.split(line) for line in lines if line.startswith("curl")]
    for line in lines:
        if line.startswith("jaxslm") and line != serve:
            jaxslm(line, monkeypatch)
    arguments = shlex.split(serve)[2:]
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given.keys() == {"--model", "--store", "--items", "--port"}
    (quickstart / "buckets.toml").write_text(
        BUCKETS.replace("item_tokens = 8, vectors_per_item = 2", "item_tokens = 16, vectors_per_item = 8")
    )
    model, store, items = (given[f"--{name}"] for name in ("model", "store", "items"))
    settings = ServeSettings(model=model, store=store, items=items, buckets="buckets.toml", port=0)
    with running(settings) as server:
        shown = httpx.get(f"{server.url}/demo/items", timeout=60).json()["items"]
        assert [item["id"] for item in shown] == ["15-1252.00", "53-3032.00"]
        for _, silent, url, *options in requests:
            assert silent == "-s"
            body = options[options.index("--json") + 1]
            address = url.replace(f"localhost:{given['--port']}", server.url)
            answer = httpx.post(address, content=body, headers={"content-type": "application/json"}, timeout=60)
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["logits"]) == 1


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_files_that_documents_name_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"(?:bash |python3 |`)((?:scripts|docs|tests|configs|jaxslm|constraints)/[\w./-]*)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (path.parent / name).exists(), name
