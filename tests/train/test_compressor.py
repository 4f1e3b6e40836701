"""Training a compressor: it learns, goes on bit for bit, works with pruned rankers, and says what does not fit."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.checkpoint import load_checkpoint
from jaxslm.compress.encoder import load_encoder
from jaxslm.config import load_toml
from jaxslm.data_files import Item, Query, Request, RequestItem, read_records
from jaxslm.errors import InputError
from jaxslm.items.record import Record, RecordIdentity, pack_record, unpack_record
from jaxslm.model.cost import attention_flops_per_pair, linear_flops_per_token
from jaxslm.model.decoder import Decoder
from jaxslm.score.files import score_file
from jaxslm.score.scorer import load
from jaxslm.train import step
from jaxslm.train.compressor import train_compressor
from jaxslm.train.compressor_data import Plan, plan_of
from jaxslm.train.compressor_settings import CompressorTraining
from jaxslm.train.compressor_step import Models, compressor_work, rounded_to_int8, trained_if
from jaxslm.train.loop import training_folder
from tests.compress.tiny_compressor import ENCODER, RANKER, compressor_checkpoint, compressor_config
from tests.tiny import tiny_checkpoint, tiny_config, tiny_ranker_config
from tests.train.test_loop import stop_after
from tests.train.toy import toy_folder

TEXTS = ["red blue amber python", "green green black job"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data and a random ranker of one layer."""
    return toy_folder(tmp_path_factory.mktemp("toy"), num_layers=1)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxslm.train.compressor.make_mesh", lambda: step.make_mesh(jax.devices()[:1]))


def settings_of(folder: Path, *overrides: str) -> CompressorTraining:
    """Returns settings of a short run on the toy data."""
    tree = (
        f"model={folder}/tiny", f"data.items={folder}/items.jsonl", f"data.queries={folder}/train.jsonl",
        "steps=4", "save_every=2", "freeze_embeddings=true", "optimiser.learning_rate=3e-3",
        'prompt={template="yes-no", instruction="Match", max_tokens=192}',
        "compressor.ks=[2]", "compressor.max_item_tokens=16", "curriculum.text_share=0.0",
        "data.items_per_list=8", "data.hard_negative_pool=0", "data.lists_per_batch=2", "data.tokens_per_batch=1600",
        "data.max_prefix_tokens=40", "data.max_item_tokens=90",
    )  # fmt: skip
    empty = folder / "empty.toml"
    empty.touch()
    return load_toml(empty, CompressorTraining, (*tree, *overrides))


EVALUATED = (
    "evaluation.items={0}/items.jsonl", "evaluation.queries={0}/dev.jsonl", "evaluation.limit=10", "evaluation.k=0",
    "evaluation_ks=[1, 2]",
)  # fmt: skip
EVERY_TERM = ("losses.alignment=1.0", "losses.hidden_alignment=0.5", "losses.distillation=0.5", "losses.hidden=0.1")


def losses_of(out: Path) -> list[dict[str, float]]:
    lines = (training_folder(out) / "log.jsonl").read_text().splitlines()
    return [numbers for line in lines if "loss" in (numbers := json.loads(line))]


def hashes(path: Path) -> tuple[str, str]:
    manifest = load_checkpoint(path).manifest
    return manifest.params_sha256, manifest.extra["compressor"].sha256


def test_a_compressor_learns_the_rule_of_the_toy_data(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated = tuple(each.format(toy) for each in EVALUATED)
    result = train_compressor(
        settings_of(
            toy, "steps=100", "save_every=100", "evaluation.every=50", "compressor.ks=[1, 2]",
            "curriculum.text_share=0.25", "losses.list_softmax=1.0", *evaluated,
        ),
        out,
    )  # fmt: skip
    assert result.finished
    assert result.metrics["ndcg_at_10"] > 0.95
    assert result.metrics["bm25_ndcg_at_10"] < 0.85
    both = [result.metrics[f"ndcg_at_10_k{k}"] for k in (1, 2)]
    assert result.metrics["ndcg_at_10"] == pytest.approx(np.mean(both))
    on_vectors = [each["loss"] for each in losses_of(out) if each["k"]]
    assert np.mean(on_vectors[-10:]) < np.mean(on_vectors[:10]) - 0.3
    encoder, ranker = load_encoder(out), load(out)
    for k in (1, 2):
        bad, good = ranker.score_vectors("red blue", encoder.encode(TEXTS, k)).log_odds
        assert good > bad
    bad, good = ranker.score_request("red blue", TEXTS).log_odds
    assert good > bad, "the same ranker still reads text"
    with pytest.raises(InputError, match="k = 4"):
        encoder.encode(TEXTS, 4)


@pytest.mark.slow
def test_an_item_that_no_query_judges_changes_nothing(toy: Path, tmp_path: Path) -> None:
    more = tmp_path / "items.jsonl"
    unjudged = Item(id="unjudged", text="amber amber red").model_dump_json(exclude_none=True)
    more.write_text(unjudged + "\n" + (toy / "items.jsonl").read_text())
    for name, items in (("as-it-is", toy / "items.jsonl"), ("more", more)):
        train_compressor(settings_of(toy, f"data.items={items}"), tmp_path / name)
    assert hashes(tmp_path / "more") == hashes(tmp_path / "as-it-is")


def test_the_log_tells_the_projector_s_rate(toy: Path, tmp_path: Path) -> None:
    shape = ("curriculum.projector_steps=2", "curriculum.projector_rate=1e-3", "optimiser.final_fraction=1.0")
    train_compressor(settings_of(toy, *shape), tmp_path / "out")
    told = [each["learning_rate"] for each in losses_of(tmp_path / "out")]
    assert told == pytest.approx([1e-3, 1e-3, 3e-3, 3e-3])


@pytest.mark.slow
def test_stored_scores_teach_as_a_teacher_that_runs_along(toy: Path, tmp_path: Path) -> None:
    requests, scores = tmp_path / "requests.jsonl", tmp_path / "scores.jsonl"
    items = tuple(RequestItem(id=item.id, text=item.text) for item in read_records(toy / "items.jsonl", Item))
    queries = {query.query for query in read_records(toy / "train.jsonl", Query)}
    lines = [Request(query=query, items=items).model_dump_json() for query in sorted(queries)]
    requests.write_text("\n".join(lines))
    # The same ranker, with the prompt of `settings_of`.
    tiny_checkpoint(tmp_path / "ranker", tiny_config("llama", num_layers=1), template="yes-no", instruction="Match")
    score_file(tmp_path / "ranker", requests, scores)
    taught = ("steps=2", "losses.distillation=0.5", "losses.list_distillation=0.5")
    files = (f"data.teacher_requests={requests}", f"data.teacher_scores={scores}")
    for name, overrides in (("along", taught), ("stored", taught + files)):
        train_compressor(settings_of(toy, *overrides), tmp_path / name)
    first, second = (losses_of(tmp_path / name)[0] for name in ("along", "stored"))
    for term in ("loss", "distillation", "list_distillation"):
        assert second[term] == pytest.approx(first[term], rel=1e-4)
        assert first[term] > 1e-6


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(toy, "steps=6", "curriculum.projector_steps=1", "curriculum.noise_share=0.5", *EVERY_TERM)
    assert train_compressor(settings, tmp_path / "whole").finished
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        assert not train_compressor(settings, tmp_path / "parts").finished
    assert train_compressor(settings, tmp_path / "parts").finished
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "parts")
    terms = losses_of(tmp_path / "whole")[0]
    assert {"alignment", "hidden_alignment", "distillation", "hidden", "binary_cross_entropy"} < terms.keys()


@pytest.mark.slow
def test_frozen_parts_stay_and_a_frozen_encoder_trains_as_if_it_ran_along(toy: Path, tmp_path: Path) -> None:
    behind_prompt = "compressor.behind_prompt=true"
    frozen = ("optimiser.encoder_factor=0.0", "curriculum.noise_share=0.0", behind_prompt)
    train_compressor(settings_of(toy, *frozen), tmp_path / "encoder")
    start, after = load_checkpoint(toy / "tiny"), load_checkpoint(tmp_path / "encoder", extra=["compressor"])
    encoder = after.extra["compressor"]["encoder"]
    jax.tree.map(np.testing.assert_array_equal, encoder, {name: start.params[name] for name in encoder})
    assert not np.array_equal(after.params["layers_0"]["mlp"]["up"], start.params["layers_0"]["mlp"]["up"])

    only = ("optimiser.ranker_factor=0.0", "freeze_embeddings=false", "steps=2")
    train_compressor(settings_of(toy, *frozen, *only), tmp_path / "projector")
    after = load_checkpoint(tmp_path / "projector", extra=["compressor"])
    assert after.manifest.compressor is not None
    assert list(after.manifest.compressor.prefix_ids) == start.prompt.item_prefix_ids
    assert after.manifest.params_sha256 == start.manifest.params_sha256
    first = [each["loss"] for each in losses_of(tmp_path / "projector")][:1]
    trained = settings_of(toy, "optimiser.encoder_factor=1.0", "curriculum.noise_share=0.0", behind_prompt, *only)
    train_compressor(trained, tmp_path / "running")
    assert losses_of(tmp_path / "running")[0]["loss"] == pytest.approx(first[0], abs=1e-5)


@pytest.mark.slow
def test_a_pruned_ranker_with_an_encoder_of_its_own(toy: Path, tmp_path: Path) -> None:
    pruned = tiny_config("llama", num_layers=2, mlp_width=(16, 40), num_kv_heads=(1, 2))
    tiny_checkpoint(tmp_path / "pruned", pruned, seed=3, template="yes-no")
    wider = tiny_config(width=48, num_layers=3, tie_embeddings=False)
    tiny_checkpoint(tmp_path / "wider", wider, template="yes-no")
    out = tmp_path / "out"
    train_compressor(
        settings_of(
            toy, f"model={tmp_path}/pruned", f"compressor.encoder={tmp_path}/wider", "compressor.layers=1",
            'compressor.pooling="last"', "compressor.answer_tokens=2", "steps=2",
            'compressor.text_fields=["id"]', "compressor.max_text_tokens=3", "curriculum.text_share=0.5",
        ),
        out,
    )  # fmt: skip
    encoder, ranker = load_encoder(out), load(out)
    assert (encoder.config.encoder.num_layers, encoder.config.encoder.width, encoder.config.width) == (1, 48, 32)
    assert ranker.config.model == pruned
    assert np.isfinite(ranker.score_vectors("red", encoder.encode(TEXTS, 2), ["i1", "i2"]).log_odds).all()

    again = settings_of(
        toy, f"model={tmp_path}/pruned", f"compressor.start={out}", "steps=1",
        "optimiser.encoder_factor=0.0",
    )  # fmt: skip
    train_compressor(again, tmp_path / "again")
    assert load_encoder(tmp_path / "again").config.pooling == "last"


def test_what_does_not_fit_is_said(toy: Path, tmp_path: Path) -> None:
    other = compressor_checkpoint(tmp_path / "other", tiny_config("llama", width=48))
    with pytest.raises(InputError, match="its vectors have width 48, the ranker 32"):
        train_compressor(settings_of(toy, f"compressor.start={other}"), tmp_path / "out")
    with pytest.raises(InputError, match="holds no compressor"):
        train_compressor(settings_of(toy, f"compressor.start={toy}/tiny"), tmp_path / "out")
    with pytest.raises(InputError, match="answer_tokens 99: the prompt's suffix has only"):
        train_compressor(settings_of(toy, "compressor.answer_tokens=99"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("compressor.ks=[2, 1]", "must ascend"),
        ('compressor={start="x", behind_prompt=true, max_item_tokens=16}', "start excludes behind_prompt"),
        ('compressor.text_fields=["title"]', "belong together"),
        ("evaluation_ks=[4]", "4 is none of compressor.ks"),
        ("curriculum.projector_steps=4", "must be less than steps"),
        ("losses.binary_cross_entropy=0.0", "every weight is 0"),
        ('teacher.checkpoint="x"', "every weight that uses it is 0"),
    ],
)
def test_settings_that_contradict_one_another(toy: Path, override: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        settings_of(toy, override)


def test_a_frozen_ranker_is_not_trained_on_text(toy: Path) -> None:
    with pytest.raises(InputError, match="a frozen ranker learns nothing from text"):
        settings_of(toy, "optimiser.ranker_factor=0.0", "curriculum.text_share=0.5")


def test_the_plan_of_a_run(toy: Path) -> None:
    settings = settings_of(
        toy, "steps=100", "curriculum.text_share=0.25", "curriculum.projector_steps=20", "compressor.ks=[1, 2, 4]"
    )
    plans = [plan_of(update, settings) for update in range(100)]
    assert plans == [plan_of(update, settings) for update in range(100)]
    assert plans[:20] == [Plan(4, warm_up=True, teach=0.2)] * 20
    assert not any(plan.warm_up for plan in plans[20:])
    assert sum(plan.k == 0 for plan in plans) == 20
    on_vectors = [plan for plan in plans[20:] if plan.k]
    assert {plan.k for plan in on_vectors} == {1, 2, 4}
    assert [(plan.align, plan.teach) for plan in on_vectors] == [(1.0, 0.2)] * 30 + [(0.2, 1.0)] * 30
    assert [plan.noise for plan in plans[90:] if plan.k] == [True] * sum(plan.k > 0 for plan in plans[90:])
    assert not any(plan.noise for plan in plans[:90])


def test_words_before_the_items_are_work_once_for_all_of_them() -> None:
    lengths = np.array([5, 2, 3, 4])
    batch = {
        "mixed_tokens": np.zeros(24, np.int32),
        "mixed_prefix": np.arange(8, dtype=np.int32)[None],
        "mixed_items": (8 + np.arange(12, dtype=np.int32)).reshape(1, 4, 3),
        "item_valid": np.arange(5) < lengths[:, None],
        "joint": np.array(True),
    }
    bare, behind = (
        compressor_work(
            Models(tiny_ranker_config(RANKER), compressor_config(prefix_ids=ids), Decoder(RANKER), Decoder(ENCODER)),
            batch,
        )
        for ids in ((), (1, 2, 3))
    )
    assert (bare.tokens, bare.places) == (20 + lengths.sum(), 24 + 4 * 5)
    assert (behind.tokens, behind.places) == (bare.tokens + 3, bare.places + 3)
    pairs = 1 + 2 + 3 + 3 * lengths.sum()
    more = 3 * linear_flops_per_token(ENCODER) + pairs * attention_flops_per_pair(ENCODER)
    assert behind.flops == bare.flops + 3 * more  # forward and backward


@pytest.mark.parametrize("joint", [True, False])
def test_what_does_not_train_yet_has_its_values_and_no_gradient(joint: bool) -> None:
    tree = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}

    @jax.jit
    def squares(tree: dict[str, Any], joint: Any) -> Any:
        return sum(jnp.sum(leaf**2) for leaf in trained_if(joint, tree).values())

    value, gradient = jax.value_and_grad(squares)(tree, jnp.array(joint))
    assert value == 14
    jax.tree.map(lambda leaf, moved: np.testing.assert_array_equal(moved, 2 * leaf * joint), tree, gradient)


def test_noise_is_what_an_int8_record_gives_back() -> None:
    vectors = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    vectors[2] = 0
    identity = RecordIdentity("0" * 64, "1" * 64, "2" * 64)
    stored = unpack_record(pack_record(Record(identity, vectors, "3" * 64), "int8"), identity).vectors
    np.testing.assert_allclose(rounded_to_int8(jnp.asarray(vectors)), stored, atol=1e-6)
