"""Whole runs on toy data: they learn, stop and go on without a trace."""

import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm import cli
from jaxslm.checkpoint import load_checkpoint
from jaxslm.errors import InputError
from jaxslm.score.scorer import load
from jaxslm.train import loop, step
from jaxslm.train.data import ranker_batches
from jaxslm.train.loop import TrainResult, training_folder
from jaxslm.train.ranker import train_ranker
from jaxslm.train.settings import RankerTraining
from jaxslm.train.speed import ranker_work
from jaxslm.train.start import load_start
from tests.tiny import tiny_checkpoint, tiny_config
from tests.train.toy import CONFIG, SHORT, one_device, toy_folder, toy_ranker


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data and model of all tests here."""
    return toy_folder(tmp_path_factory.mktemp("toy"))


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, sign: int = signal.SIGINT) -> None:
    """Sends this process a signal while update number `steps` of the next run is being made."""
    make_step = step.make_step
    count = 0

    def counted(*args: Any) -> Any:
        update = make_step(*args)

        def call(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == steps:
                os.kill(os.getpid(), sign)
            return update(*args)

        return call

    monkeypatch.setattr(loop, "make_step", counted)


def log_of(out: Path) -> list[dict[str, Any]]:
    lines = (training_folder(out) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses_of(out: Path) -> list[float]:
    return [line["loss"] for line in log_of(out) if "loss" in line]


def evaluations_of(out: Path) -> list[dict[str, Any]]:
    return [line for line in log_of(out) if "ndcg_at_10" in line]


def same_parameters(left: Path, right: Path) -> bool:
    return load_checkpoint(left).manifest.params_sha256 == load_checkpoint(right).manifest.params_sha256


def test_a_tiny_ranker_learns_the_rule_of_the_toy_data(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    one_device(monkeypatch)
    out = tmp_path / "ranker"
    result = train_ranker(toy_ranker(toy, "evaluation.every=20"), out)
    assert result.finished
    assert result.metrics["ndcg_at_10"] > 0.95
    assert result.metrics["bm25_ndcg_at_10"] < 0.85
    losses = losses_of(out)
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3
    manifest = load_checkpoint(out).manifest
    assert manifest.parent == load_checkpoint(toy / "tiny").manifest.params_sha256
    assert manifest.metrics == result.metrics
    scores = load(out).score("red blue", ["red blue amber python", "green green black job"])
    assert scores[1] > scores[0]
    assert sorted(path.name for path in training_folder(out).iterdir()) == ["log.jsonl", "settings.json", "tensorboard"]


def test_the_result_is_of_the_best_evaluation(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    one_device(monkeypatch)
    evaluated: list[Any] = []

    def worse_each_time(task: loop.Task, *args: Any) -> TrainResult:
        def evaluate(params: Any) -> dict[str, float]:
            evaluated.append(jax.tree.map(np.array, params))
            return {"ndcg_at_10": 1 / len(evaluated)}

        return loop.run(replace(task, evaluate=evaluate), *args)

    monkeypatch.setattr("jaxslm.train.ranker.run", worse_each_time)
    result = train_ranker(toy_ranker(toy, *SHORT), tmp_path / "out")
    assert result.metrics == {"ndcg_at_10": 1.0, "step": 3.0}
    best, last = evaluated
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path / "out").params, best)
    assert not np.array_equal(best["final_norm"]["scale"], last["final_norm"]["scale"])


def test_an_evaluation_that_fails_loses_no_update(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    one_device(monkeypatch)
    settings = toy_ranker(toy, *SHORT, "save_every=100")
    assert train_ranker(settings, tmp_path / "whole").finished
    with monkeypatch.context() as patched:
        patched.setattr("jaxslm.train.ranker.Ranker.log_odds", lambda *arguments: np.full(1, np.nan))
        with pytest.raises(InputError, match="query 'dev-"):
            train_ranker(settings, tmp_path / "parts")
    assert train_ranker(settings, tmp_path / "parts").finished
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    assert [line["step"] for line in log_of(tmp_path / "parts") if "loss" in line] == [*range(1, 7)]
    assert evaluations_of(tmp_path / "whole") == evaluations_of(tmp_path / "parts")


def test_a_prompts_rows_are_no_longer_than_the_model_was_trained_for(toy: Path) -> None:
    settings = toy_ranker(toy, 'prompt={template="yes-no", max_tokens=5000}')
    with pytest.raises(InputError, match=r"settings: .*max_tokens 5000: the model was trained for rows of at most"):
        load_start(settings, step.make_mesh(jax.devices()[:1]))


def assert_padding_and_speed_are_told(settings: RankerTraining, out: Path) -> None:
    start = load_start(settings, step.make_mesh(jax.devices()[:1]))
    batches = ranker_batches(settings.data, start.prompt)
    lines = [line for line in log_of(out) if "loss" in line]
    assert [line["step"] for line in lines] == [*range(1, settings.steps + 1)]
    for line in lines:
        parts = [next(batches) for _ in range(settings.optimiser.accumulate)]
        places = sum(len(part["tokens"]) for part in parts)
        real = sum(np.sum(part[name] < len(part["tokens"])) for part in parts for name in ("prefix", "items"))
        flops = sum(ranker_work(start.config.model, part).flops for part in parts)
        assert 0 <= line["padding_fraction"] < 1
        assert line["padding_fraction"] == pytest.approx(1 - real / places)
        assert line["tokens_per_s"] == pytest.approx(real / line["seconds"])
        assert line["mfu"] == pytest.approx(flops / line["seconds"] / loop._ceiling_of(jnp.dtype("float32")))
        assert line["mfu"] > 0


@pytest.mark.parametrize("sign", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(toy: Path, tmp_path: Path, monkeypatch: Any, sign: int) -> None:
    one_device(monkeypatch)
    settings = toy_ranker(toy, *SHORT)
    assert train_ranker(settings, tmp_path / "whole").finished
    with monkeypatch.context() as patched:
        stop_after(patched, 3, sign)
        handler = signal.getsignal(sign)
        stopped = train_ranker(settings, tmp_path / "parts")
        assert signal.getsignal(sign) is handler
    assert stopped == TrainResult(False, 3, 6, tmp_path / "parts", {}, interrupted=True)
    assert not (tmp_path / "parts").exists()
    assert train_ranker(settings, tmp_path / "parts").finished
    assert same_parameters(tmp_path / "whole", tmp_path / "parts")
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    assert_padding_and_speed_are_told(settings, tmp_path / "parts")
    # The evaluation that was due at update 3 is made up for.
    assert evaluations_of(tmp_path / "whole") == evaluations_of(tmp_path / "parts")


def test_a_stop_during_the_last_update_lets_the_run_finish(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The last update is evaluated all the same; one that an earlier release left without is evaluated on resuming."""
    one_device(monkeypatch)
    settings = toy_ranker(toy, *SHORT, "evaluation.every=100")
    whole = train_ranker(settings, tmp_path / "whole")
    assert (whole.finished, whole.interrupted) == (True, False)
    with monkeypatch.context() as patched:
        stop_after(patched, 6)
        stopped = train_ranker(settings, tmp_path / "stopped")
    assert (stopped.finished, stopped.interrupted) == (True, True)
    assert same_parameters(tmp_path / "whole", tmp_path / "stopped")
    with monkeypatch.context() as patched:
        patched.setattr(loop._Loop, "_evaluate", lambda self, bar: None)
        with pytest.raises(InputError, match=r"best/None"):
            train_ranker(settings, tmp_path / "left")
    assert train_ranker(settings, tmp_path / "left").finished
    assert same_parameters(tmp_path / "whole", tmp_path / "left")
    assert evaluations_of(tmp_path / "whole") == evaluations_of(tmp_path / "left")


@pytest.mark.slow
def test_a_run_of_one_device_goes_on_with_eight(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    on_one, on_eight = (toy_ranker(toy, *SHORT, f"optimiser.accumulate={count}") for count in (8, 1))
    with monkeypatch.context() as patched:
        one_device(patched)
        train_ranker(on_one, tmp_path / "one")
        stop_after(patched, 3)
        train_ranker(on_one, tmp_path / "both")
    recorded = training_folder(tmp_path / "both") / "settings.json"
    recorded.write_text(recorded.read_text().replace('"accumulate": 8', '"accumulate": 1'))
    train_ranker(on_eight, tmp_path / "both")
    np.testing.assert_allclose(losses_of(tmp_path / "both"), losses_of(tmp_path / "one"), rtol=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_queries(
    toy: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    one_device(monkeypatch)
    put_batch, count = step.put_batch, 0

    def poisoned(parts: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count >= 4:
            parts[0]["labels"][:] = np.inf
        return put_batch(parts, *args)

    monkeypatch.setattr(loop, "put_batch", poisoned)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"update 4: loss nan|update 4: loss inf"):
        train_ranker(toy_ranker(toy, *SHORT), out)
    told_in = training_folder(out) / "not-finite.json"
    content = told_in.read_text()
    told = json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["step"] == 4
    assert told["loss"] in ("nan", "inf")
    assert all(name.startswith("train-") for name in told["query_ids"])
    assert len(log_of(out)) == 4  # three updates and an evaluation
    told_in.unlink()
    told_in.mkdir()
    with pytest.raises(InputError, match=r"update 4: loss .*not-finite.json: cannot write it \(Is a directory\)"):
        train_ranker(toy_ranker(toy, *SHORT), out)
    monkeypatch.setattr(loop, "put_batch", put_batch)
    assert train_ranker(toy_ranker(toy, *SHORT), out).finished


def test_another_run_in_the_same_place_is_refused(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    one_device(monkeypatch)
    copy, out = shutil.copytree(toy, tmp_path / "toy"), tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        train_ranker(toy_ranker(copy, *SHORT), out)
    with pytest.raises(InputError, match=r"out.training: was begun with another steps \(6, now 7\)"):
        train_ranker(toy_ranker(copy, *SHORT, "steps=7"), out)
    with pytest.raises(InputError, match=r"another optimiser.learning_rate \(0.003, now 0.5\): go on with"):
        train_ranker(toy_ranker(copy, *SHORT, "optimiser.learning_rate=0.5"), out)
    held_out = (copy / "dev.jsonl").read_text()
    (copy / "dev.jsonl").write_text(held_out.replace("red", "blue", 1))
    with pytest.raises(InputError, match=r"another evaluation_sha256 \('"):
        train_ranker(toy_ranker(copy, *SHORT), out)
    out.mkdir()
    with pytest.raises(InputError, match="exists"):
        train_ranker(toy_ranker(copy, *SHORT), out)


def test_a_run_goes_on_with_the_teacher_that_it_began_with(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Another one at the same path is refused; a run that an earlier release began does not know its own."""
    one_device(monkeypatch)
    prompt = {"template": "yes-no", "instruction": "Match", "max_tokens": 192}
    teacher, other = (
        tiny_checkpoint(tmp_path / name, tiny_config("llama", num_layers=1), seed=seed, **prompt)
        for seed, name in enumerate(("teacher", "other"), start=1)
    )
    out = tmp_path / "out"
    settings = toy_ranker(toy, *SHORT, f"teacher.checkpoint={teacher}", "losses.distillation=1.0")
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        train_ranker(settings, out)
    shutil.rmtree(teacher)
    other.rename(teacher)
    with pytest.raises(InputError, match=r"out.training: was begun with another teacher.checkpoint_sha256 \('"):
        train_ranker(settings, out)
    recorded = training_folder(out) / "settings.json"
    known = json.loads(recorded.read_text())
    del known["teacher.checkpoint_sha256"]
    recorded.write_text(json.dumps(known))
    assert train_ranker(settings, out).finished


def test_what_does_not_decide_the_batches_may_change(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """How often it saves, and where the data lies; the data itself may not."""
    one_device(monkeypatch)
    settings = toy_ranker(toy, *SHORT)
    train_ranker(settings, tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        train_ranker(settings, tmp_path / "parts")
    moved = shutil.copytree(toy, tmp_path / "moved")
    paths = (f"data.items={moved}/items.jsonl", f"data.queries={moved}/train.jsonl")
    elsewhere = toy_ranker(toy, *SHORT, *paths, "save_every=5", "tensorboard=true", "data.epochs=9")
    content = (moved / "train.jsonl").read_text()
    (moved / "train.jsonl").write_text(content.replace("red", "blue", 1))
    with pytest.raises(InputError, match=r"training data: items, queries, .* differ from the saved run's"):
        train_ranker(elsewhere, tmp_path / "parts")
    (moved / "train.jsonl").write_text(content)
    assert train_ranker(elsewhere, tmp_path / "parts").finished
    assert same_parameters(tmp_path / "whole", tmp_path / "parts")


def test_data_that_ends_early_is_told(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    one_device(monkeypatch)
    shape = ("steps=20", "evaluation.every=20", "layers=1", "remat=false")
    with pytest.raises(InputError, match=r"data: ended after 15 of 20 updates: raise data.epochs"):
        train_ranker(toy_ranker(toy, "data.epochs=1", *shape), tmp_path / "out")
    assert [line["step"] for line in log_of(tmp_path / "out")] == [*range(1, 16)]
    assert train_ranker(toy_ranker(toy, "data.epochs=2", *shape), tmp_path / "out").finished


def test_data_that_ends_within_an_update_is_all_used(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """15 updates of 8 lists are two epochs of 60, so none may be lost to the eighth update, which the end cut short."""
    one_device(monkeypatch)
    shape = ("steps=15", "evaluation.every=15", "layers=1", "remat=false", "optimiser.accumulate=4")
    with pytest.raises(InputError, match=r"data: ended after 7 of 15 updates"):
        train_ranker(toy_ranker(toy, "data.epochs=1", *shape), tmp_path / "out")
    assert train_ranker(toy_ranker(toy, "data.epochs=2", *shape), tmp_path / "out").finished


@pytest.mark.slow
def test_teacher_on_the_fly(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A student that only sees a teacher comes nearer to it; a teacher with another prompt is refused."""
    one_device(monkeypatch)
    prompt = {"template": "yes-no", "instruction": "Match", "max_tokens": 192}
    teacher = tiny_checkpoint(tmp_path / "teacher", tiny_config("llama"), seed=1, **prompt)
    only = ("losses.binary_cross_entropy=0.0", "losses.list_softmax=0.0", "losses.hidden=1.0", "remat=false")
    terms = ("losses.distillation=1.0", "losses.list_distillation=0.5", "losses.distillation_temperature=2.0")
    shape = ("steps=20", "save_every=20", "evaluation.every=20")
    settings = toy_ranker(toy, f"teacher.checkpoint={teacher}", *only, *terms, *shape)
    train_ranker(settings, tmp_path / "student")
    losses = losses_of(tmp_path / "student")
    assert losses[-1] < 0.7 * losses[0]
    other = tiny_checkpoint(tmp_path / "other", tiny_config("llama"), seed=1, template="yes-no")
    with pytest.raises(InputError, match="has another tokenizer or prompt than the student"):
        train_ranker(toy_ranker(toy, f"teacher.checkpoint={other}", *only, *terms), tmp_path / "refused")


def test_a_teacher_of_another_shape_teaches_by_its_log_odds(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    one_device(monkeypatch)
    prompt = {"template": "yes-no", "instruction": "Match", "max_tokens": 192}
    teacher = tiny_checkpoint(tmp_path / "teacher", tiny_config("llama", width=48, num_layers=3), seed=1, **prompt)
    only = ("losses.binary_cross_entropy=0.0", "losses.list_softmax=0.0", "losses.distillation=1.0")
    taught = (*SHORT, *only, f"teacher.checkpoint={teacher}")
    with pytest.raises(InputError, match="states of the student's width 32, the teacher's have 48"):
        train_ranker(toy_ranker(toy, *taught, "losses.hidden=1.0"), tmp_path / "refused")
    assert train_ranker(toy_ranker(toy, *taught), tmp_path / "student").finished
    losses = losses_of(tmp_path / "student")
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("finished", [True, False])
def test_the_command_ends_with_130_when_the_run_was_stopped(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    def ended(settings: RankerTraining, out: Path) -> TrainResult:
        return TrainResult(finished, 3, settings.steps, out, {}, interrupted=not finished)

    monkeypatch.setattr("jaxslm.train.ranker.train_ranker", ended)
    arguments = ["train", "ranker", "--config", str(CONFIG), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["jaxslm", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == (0 if finished else 130)
    assert json.loads(capsys.readouterr().out)["finished"] is finished


def test_signals_outside_the_main_thread_are_left_alone(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    one_device(monkeypatch)
    results: list[TrainResult] = []
    settings = toy_ranker(toy, *SHORT, "steps=2", "save_every=2", "evaluation.every=2")
    thread = threading.Thread(target=lambda: results.append(train_ranker(settings, tmp_path / "out")))
    thread.start()
    thread.join()
    assert results[0].finished
