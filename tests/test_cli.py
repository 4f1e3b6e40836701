"""The command line: one JSON object last on stdout, exit 2 and one line for bad input, nothing lost or half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxslm
from jaxslm import cli
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokenizer_json, write_hf_folder

Run = Callable[..., tuple[int, dict[str, Any] | None, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "ranker", tiny_config(max_positions=512), max_tokens=512)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process: (exit code, last stdout line as JSON or None, stderr)."""

    def run(*arguments: object) -> tuple[int, dict[str, Any] | None, str]:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # tests leave the user's cache folder alone
        monkeypatch.setattr(sys, "argv", ["jaxslm", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        lines = printed.out.splitlines()
        code = exit_.value.code
        assert isinstance(code, int)
        return code, json.loads(lines[-1]) if lines and code == 0 else None, printed.err

    return run


def write_requests(path: Path, *requests: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")
    return path


def write_data(folder: Path) -> Path:
    """A folder of four items and three judged queries."""
    folder.mkdir()
    words = ("python", "truck", "nurse", "baker")
    items = [{"id": f"i{n}", "title": word, "text": f"Works as a {word} every day."} for n, word in enumerate(words)]
    queries = [
        {"query_id": f"q{n}", "query": f"{word} work", "items": [{"id": f"i{n}", "label": 1.0}]}
        for n, word in enumerate(words[:3])
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "dev.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    return folder


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_score_writes_what_the_library_returns(run: Run, model: Path, tmp_path: Path, dtype: str | None) -> None:
    texts = ["Writes python.", "Drives a truck.", "x" * 3000]
    requests = write_requests(
        tmp_path / "in.jsonl",
        {"query": "python developer", "items": [{"text": text} for text in texts]},
        {"query": "driver", "items": [{"id": "only", "text": "Drives."}]},
    )
    files = ("--model", model, "--input", requests, "--output", tmp_path / "out.jsonl")
    code, summary, stderr = run("score", *files, *(("--dtype", dtype) if dtype else ()))
    assert code == 0
    assert summary is not None
    assert (summary["requests"], summary["items"], summary["truncated"]) == (2, 4, 1)
    assert "1 of 4 items were cut to the room in rows of 512 tokens" in stderr
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    ranker = jaxslm.load(model, dtype)
    np.testing.assert_allclose(first["scores"], ranker.score("python developer", texts), atol=1e-6)
    assert first["truncated"] == [False, False, True]
    logits = np.array(second["logits"])
    np.testing.assert_allclose(second["scores"], 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_score_says_both_limits_of_an_item(run: Run, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "ranker", tiny_config(), max_item_tokens=9)
    requests = write_requests(tmp_path / "in.jsonl", {"query": "q", "items": [{"text": "x" * 40}, {"text": "x"}]})
    code, _, stderr = run("score", "--model", model, "--input", requests, "--output", tmp_path / "out.jsonl")
    assert code == 0
    assert "1 of 2 items were cut to 9 tokens or the room in rows of 2048 tokens" in stderr


GOOD = '{"query": "q", "items": [{"text": "t"}]}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no records"),
        (b'{"query": "q", "items": []}\n', "line 1: items"),
        (b'{"query": " ", "items": [{"text": "t"}]}\n', "line 1: query: must not be empty"),
        (GOOD.encode() + b'{"query": "q", "items": [{"text": "\xff"}]}\n', "line 2: invalid UTF-8"),
        (GOOD.encode() * 2 + b'{"query": "q", "items": \n', "line 3: broken JSON"),
        (b'{"query": "q", "items": [{"id": "a"}]}\n', "items.0.text: must not be empty"),
        (b'{"query": "q", "items": [{"text": ""}]}\n', "items.0.text: must not be empty"),
        (b'{"query": "q", "items": [{"text": "t", "grade": 1}]}\n', "line 1: items.0.grade"),
        (b'{"query": "q", "items": [{"text": 3}]}\n', "line 1: items.0.text"),
        (b"[" * 100_000 + b"\n", "line 1: broken JSON"),
        (json.dumps({"query": "q " * 500_000, "items": [{"text": "t"}]}).encode(), "leave no room"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value.replace(" ", "-"),
)
def test_a_bad_request_file_is_named_and_nothing_is_written(
    run: Run, model: Path, tmp_path: Path, content: bytes, said: str
) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_bytes(content)
    code, _, stderr = run("score", "--model", model, "--input", requests, "--output", tmp_path / "out.jsonl")
    assert code == 2
    assert said in stderr
    assert len(stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_text_of_a_million_characters_is_cut_and_reported(run: Run, model: Path, tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in.jsonl", {"query": "q", "items": [{"text": "word " * 200_000}]})
    code, summary, _ = run("score", "--model", model, "--input", requests, "--output", tmp_path / "out.jsonl")
    assert code == 0
    assert summary is not None
    assert summary["truncated"] == 1


def test_existing_outputs_are_kept(run: Run, model: Path, tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in.jsonl", {"query": "q", "items": [{"text": "t"}]})
    existing = tmp_path / "existing"
    existing.write_text("precious")
    source = write_hf_folder(tmp_path / "hf", tiny_config())
    data = write_data(tmp_path / "data")
    for arguments in (
        ("score", "--model", model, "--input", requests, "--output", existing),
        ("convert", "--from", source, "--out", existing),
        ("eval", "--model", model, "--data", data, "--run-out", existing),
        ("export", "--model", model, "--out", existing),
    ):
        code, _, stderr = run(*arguments)
        assert code == 2
        assert f"{existing} exists" in stderr
        assert existing.read_text() == "precious"


def test_convert_inspect_and_score_agree_on_the_model(run: Run, tmp_path: Path) -> None:
    source = write_hf_folder(tmp_path / "hf", tiny_config())
    options = ("--max-tokens", 128, "--labels", "the", " job")
    code, made, _ = run("convert", "--from", source, "--out", tmp_path / "ckpt", *options)
    assert code == 0
    code, card, stderr = run("inspect", tmp_path / "ckpt")
    assert code == 0
    assert made is not None
    assert card is not None
    assert card["params_sha256"] == made["params_sha256"]
    assert card["prompt"]["max_tokens"] == 128
    vocabulary = json.loads(tiny_tokenizer_json())["model"]["vocab"]
    assert card["label_token_ids"] == [vocabulary["the"], vocabulary["Ġjob"]]
    refused = run("convert", "--from", source, "--out", tmp_path / "other", "--labels", "maybe", "yes")
    assert refused[0] == 2
    assert "label 'maybe': must be one token" in refused[2]
    assert not (tmp_path / "other").exists()
    assert f"{card['parameters']:,}" in stderr


def test_export_and_convert_give_the_weights_back(run: Run, model: Path, tmp_path: Path) -> None:
    code, made, _ = run("export", "--model", model, "--format", "hf", "--out", tmp_path / "hf")
    assert code == 0
    code, back, _ = run("convert", "--from", tmp_path / "hf", "--out", tmp_path / "back")
    assert code == 0
    assert made is not None
    assert back is not None
    assert made["params_sha256"] == back["params_sha256"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "nonsense"),
        (["score", "--model", "x"], "--input"),
        (["inspect", "/nowhere"], "not a checkpoint"),
        (["convert", "--from", "/nowhere", "--out", "x"], "/nowhere"),
        (["convert", "--from", "/nowhere.gguf", "--out", "x"], "/nowhere.gguf"),
        (["convert", "--from", "x", "--out", "y", "--prompt", "z"], "qwen3-reranker"),
        (["eval", "--model", "/nowhere", "--data", "/nowhere"], "items.jsonl"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line_and_exit_2(run: Run, arguments: list[str], said: str) -> None:
    code, _, stderr = run(*arguments)
    assert code == 2
    assert said in stderr
    assert len(stderr.splitlines()) == 1


def test_eval_reports_both_rankers_and_writes_a_trec_run(run: Run, model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    code, result, stderr = run("eval", "--model", model, "--data", data, "--run-out", tmp_path / "run.txt")
    assert code == 0
    assert result is not None
    assert {"BM25", model.name} <= {row["name"] for row in result["rows"]}
    assert all(0 <= row["ndcg_at_10"] <= 1 for row in result["rows"])
    assert result["conditions"]["queries"] == 3
    assert "nDCG@10" in stderr
    lines = (tmp_path / "run.txt").read_text().splitlines()
    assert {line.split()[0] for line in lines} == {"q0", "q1", "q2"}


def test_help_answers_in_under_a_second_without_jax() -> None:
    code = (
        "import sys; from jaxslm import cli; sys.argv = ['jaxslm', '--help']\n"
        "try: cli.main()\nfinally: print('jax' in sys.modules)"
    )
    start = time.process_time()
    user = os.times().children_user
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = os.times().children_user - user + time.process_time() - start
    assert done.stdout.splitlines()[-1] == "False"
    assert seconds < 1.0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--drop-layers 1 --swaps 9", "--swaps 9: changes nothing without --mlp-keep or --kv-groups-keep"),
        ("--drop-layers 1 --no-refit", "--no-refit: changes nothing without --mlp-keep or --kv-groups-keep"),
        (
            "--drop-layers 1 --criterion flap",
            "--criterion flap: changes nothing without --mlp-keep or --kv-groups-keep",
        ),
        ("--kv-groups-keep 1 --width-multiple 7", "--width-multiple 7: changes nothing without --mlp-keep"),
        ("--mlp-keep 128 --depth-criterion greedy", "--depth-criterion greedy: changes nothing without --drop-layers"),
        ("--drop-layers 1 --depth-criterion greedy", "no: not a checkpoint"),
        ("--kv-groups-keep 1 --swaps 9 --no-refit --criterion osscar", "no: not a checkpoint"),
    ],
)
def test_options_of_pruning_that_change_nothing_are_refused(
    run: Run, tmp_path: Path, options: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = run("prune", "--model", "no", "--calibration", "no", "--out", "out", *options.split())
    assert code == 2
    assert error.startswith(f"jaxslm: error: {line}")
    assert not list(tmp_path.iterdir())


WAITING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from pathlib import Path
from jaxslm import cli
from jaxslm.atomic import new_file
@cli.app.command()
def wait(out: Path) -> None:
    with new_file(out):
        print("begun", flush=True)
        time.sleep(60)
sys.argv = ["jaxslm", "wait", sys.argv[1]]
cli.main()
"""


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_stopped_leaves_nothing(tmp_path: Path, sign: signal.Signals) -> None:
    command = [sys.executable, "-c", WAITING, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(sign)
        assert "Traceback" not in process.communicate()[1]
    assert process.returncode == 128 + sign
    assert list(tmp_path.iterdir()) == []
