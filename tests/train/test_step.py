"""The update: the same on any number of devices, unhurt by losses that are not finite, and what trains at all."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxslm.model.decoder import Decoder
from jaxslm.model.head import label_rows, log_odds
from jaxslm.model.layout import Rows
from jaxslm.train import losses, step
from jaxslm.train.encoder import ROLE, encoder_loss
from jaxslm.train.partition import LABEL_ROWS, join_params, split_params
from jaxslm.train.ranker import ranker_loss
from jaxslm.train.settings import OptimiserSettings, RankerLosses
from jaxslm.train.speed import pair_work, ranker_work
from jaxslm.train.step import (
    ItemStates,
    LossFn,
    init_state,
    item_states,
    learning_rates,
    make_mesh,
    make_optimiser,
    make_step,
    put_batch,
    sharding_of,
)
from jaxslm.train.teacher import Teacher
from tests.tiny import tiny_config, tiny_params, tiny_ranker_config

OPTIMISER = OptimiserSettings(learning_rate=1e-2, warmup_steps=2)
CONFIG = tiny_ranker_config(tiny_config("llama", num_layers=1))
UNTIED = tiny_ranker_config(tiny_config(num_layers=1, tie_embeddings=False))
R, J, PREFIX, ITEM = 2, 8, 6, 5


@jax.jit
def whole_rows(params: Any, tokens: Array, valid: Array) -> Array:
    """Returns the final state of every token of the rows [B, T]. (Op by op, as without jit, takes a minute.)"""
    states = Decoder(CONFIG.model).apply({"params": params}, tokens, Rows(valid, last_only=False))
    assert isinstance(states, Array)
    return states


@jax.jit
def every_state(params: Any, micro: dict[str, Array]) -> ItemStates:
    """Returns `item_states` on one device, those of every token among them."""
    return item_states(Decoder(CONFIG.model), params, micro, make_mesh(jax.devices()[:1]), every=True)


def list_batch(generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns a made ranker batch: two lists of eight items with 2 to 5 tokens."""
    M = R * (PREFIX + J * ITEM)
    items = (R * PREFIX + np.arange(R * J * ITEM)).reshape(R, J, ITEM)
    lengths = generator.integers(2, ITEM + 1, (R, J, 1))
    return {
        "tokens": generator.integers(1, 380, M).astype(np.int32),
        "prefix": np.arange(R * PREFIX, dtype=np.int32).reshape(R, PREFIX),
        "items": np.where(np.arange(ITEM) < lengths, items, M).astype(np.int32),
        "labels": generator.choice([0, 1 / 3, 1], (R, J)).astype(np.float32),
        "valid": np.ones((R, J), bool),
    }


def pair_batch(generator: np.random.Generator, pairs: int) -> dict[str, np.ndarray]:
    """Returns a made batch of pairs, each of which is relevant to itself alone."""
    index = np.arange(pairs * 10, dtype=np.int32).reshape(pairs, 10)
    return {
        "tokens": generator.integers(1, 380, pairs * 10).astype(np.int32),
        "prefix": index[:, :5],
        "items": index[:, None, 5:],
        "item_rows": np.arange(pairs, dtype=np.int32),  # behind its own query, so that parts of a batch are its parts
        "positive": np.eye(pairs, dtype=bool),
    }


def train(
    make_loss: Any, parts: list[list[dict[str, np.ndarray]]], *, devices: int, accumulate: int, freeze: bool = True
) -> tuple[list[float], Any]:
    """Runs one update per element of `parts`; returns the losses and the final state."""
    mesh = make_mesh(jax.devices()[:devices])
    trainable, tables = split_params(tiny_params(CONFIG.model), CONFIG, freeze_embeddings=freeze)
    optimiser = make_optimiser(OPTIMISER, learning_rates(OPTIMISER, 10))
    state = init_state(trainable, optimiser, mesh)
    frozen = {"tables": jax.device_put(tables, NamedSharding(mesh, P())), "teacher": {}}
    update = make_step(make_loss(mesh), optimiser, mesh)
    curve = []
    for part in parts:
        state, metrics = update(state, frozen, put_batch(part, accumulate, mesh))
        curve.append(float(metrics["loss"]))
    return curve, state


def made_loss(mesh: Any, *, dtype: Any = jnp.float32, remat: bool = False, **weights: float) -> LossFn:
    decoder = Decoder(CONFIG.model, dtype, remat)
    return ranker_loss(CONFIG, decoder, RankerLosses(**({"list_softmax": 1.0} | weights)), mesh, None)


def test_one_device_and_eight_give_the_same_losses_and_parameters() -> None:
    generator = np.random.default_rng(0)
    parts = [[list_batch(generator) for _ in range(8)] for _ in range(3)]
    one, state_of_one = train(made_loss, parts, devices=1, accumulate=8, freeze=False)
    eight, state_of_eight = train(made_loss, parts, devices=8, accumulate=1, freeze=False)
    np.testing.assert_allclose(one, eight, rtol=1e-5)
    for left, right in zip(
        *(jax.tree.leaves(state["params"]) for state in (state_of_one, state_of_eight)), strict=True
    ):
        np.testing.assert_allclose(left, right, atol=2e-4)
    embedding = state_of_eight["params"]["embedding"]
    assert embedding.addressable_shards[0].data.shape == (CONFIG.model.vocab_size // 8, CONFIG.model.width)
    assert jax.tree.leaves(state_of_one["params"])[0].sharding.is_fully_replicated
    moments = optax.tree_utils.tree_get(state_of_eight["optimiser"], "mu")
    jax.tree.map(
        lambda moment, leaf: np.testing.assert_equal(moment.sharding, leaf.sharding), moments, state_of_eight["params"]
    )


def test_items_of_all_devices_are_negatives() -> None:
    generator = np.random.default_rng(0)
    halves = [pair_batch(generator, 4) for _ in range(2)]
    whole = pair_batch(generator, 8) | {"tokens": np.concatenate([half["tokens"] for half in halves])}

    def loss(mesh: Any) -> LossFn:
        return encoder_loss(CONFIG, Decoder(CONFIG.model), 2, 0.05, 2.0, mesh)

    (one,), _ = train(loss, [[whole]], devices=1, accumulate=1)
    (two,), _ = train(loss, [halves], devices=2, accumulate=1)
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_the_query_can_be_read_from_the_end_of_prefixes_of_any_length() -> None:
    batch, params = pair_batch(np.random.default_rng(0), 4), tiny_params(CONFIG.model)
    M = len(batch["tokens"])
    prefix = batch["prefix"].copy()
    prefix[0, 3:], prefix[2, 4:] = M, M
    mesh = make_mesh(jax.devices()[:1])
    trainable, tables = split_params(params, CONFIG, freeze_embeddings=True)
    loss = jax.jit(encoder_loss(CONFIG, Decoder(CONFIG.model), -2, 0.05, 2.0, mesh))
    of_one = {name: array[0] for name, array in put_batch([batch | {"prefix": prefix}], 1, mesh).items()}
    _, terms = loss(trainable, {"tables": tables, "teacher": {}}, of_one)
    no, yes = np.asarray(label_rows(params, CONFIG.label_token_ids))
    pooled, errors = [], []
    for prefix_P, item_T in zip(prefix, batch["items"][:, 0], strict=True):
        own = np.sum(prefix_P < M)
        row = batch["tokens"][np.concatenate([prefix_P[:own], item_T])]
        states = np.asarray(whole_rows(params, jnp.asarray(row[None]), jnp.ones((1, len(row)), bool)))[0]
        query, item = states[own - 2 : own], states[own:]
        pooled.append((query.mean(axis=0), item.mean(axis=0)))
        along = np.concatenate([query, item]) @ (yes - no) / np.linalg.norm(yes - no)
        errors += [*((along / ROLE - np.repeat([1, -1], [2, len(item)])) ** 2)]
    queries, items = (jnp.asarray(np.stack(each)) for each in zip(*pooled, strict=True))
    expected = losses.info_nce(queries, items, 0.05, jnp.asarray(batch["positive"]))
    np.testing.assert_allclose(terms["info_nce"], expected, rtol=1e-4)
    np.testing.assert_allclose(terms["roles"], np.mean(errors), rtol=1e-4)


def test_tokens_tell_whose_they_are() -> None:
    batch, params = pair_batch(np.random.default_rng(0), 4), tiny_params(CONFIG.model)
    mesh = make_mesh(jax.devices()[:1])
    trainable, tables = split_params(params, CONFIG, freeze_embeddings=True)
    loss = jax.jit(encoder_loss(CONFIG, Decoder(CONFIG.model), 2, 0.05, 2.0, mesh))
    of_one = {name: array[0] for name, array in put_batch([batch], 1, mesh).items()}
    total, terms = loss(trainable, {"tables": tables, "teacher": {}}, of_one)
    np.testing.assert_allclose(total, terms["info_nce"] + 2 * terms["roles"], rtol=1e-6)
    index = np.concatenate([batch["prefix"], batch["items"][:, 0]], axis=1)
    states = whole_rows(params, jnp.asarray(batch["tokens"][index]), jnp.ones(index.shape, bool))
    no, yes = np.asarray(label_rows(params, CONFIG.label_token_ids))
    along = np.asarray(states)[:, 2:] @ (yes - no) / np.linalg.norm(yes - no)
    role = np.where(np.arange(8) < 3, 1, -1)
    np.testing.assert_allclose(terms["roles"], np.mean((along / ROLE - role) ** 2), rtol=1e-4)


def test_remat_changes_nothing_but_memory() -> None:
    parts = [[list_batch(np.random.default_rng(seed))] for seed in range(2)]
    plain, _ = train(made_loss, parts, devices=1, accumulate=1)
    remat, _ = train(lambda mesh: made_loss(mesh, remat=True), parts, devices=1, accumulate=1)
    np.testing.assert_allclose(plain, remat, rtol=1e-6)


def test_a_bfloat16_step_keeps_parameters_and_moments_in_float32() -> None:
    parts = [[list_batch(np.random.default_rng(seed))] for seed in range(2)]
    exact, _ = train(made_loss, parts, devices=1, accumulate=1)
    rounded, state = train(lambda mesh: made_loss(mesh, dtype=jnp.bfloat16), parts, devices=1, accumulate=1)
    assert rounded != exact
    np.testing.assert_allclose(rounded, exact, rtol=0.02)
    numbers = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 0]  # the others count updates
    assert {leaf.dtype for leaf in numbers} == {jnp.dtype("float32")}
    assert len(numbers) == 3 * len(jax.tree.leaves(state["params"]))


@pytest.mark.parametrize("norm", [1.0, 10.0])
def test_a_gradient_is_clipped_to_its_largest_global_norm(norm: float) -> None:
    """Adam's updates hardly depend on the gradient's size, its moments do."""
    params = {"layers_0": {"up": jnp.zeros((2, 3))}, LABEL_ROWS: jnp.zeros((2, 5))}
    gradient = jax.tree.map(lambda leaf: jnp.full(leaf.shape, norm / 4), params)  # of 16 numbers
    optimiser = make_optimiser(OptimiserSettings(learning_rate=1.0, clip_norm=2.0), optax.constant_schedule(1.0))
    _, state = optimiser.update(gradient, optimiser.init(params), params)
    moments = optax.tree_utils.tree_get(state, "mu")
    expected = jax.tree.map(lambda leaf: (1 - 0.9) * leaf * min(1, 2 / norm), gradient)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5), moments, expected)


def test_loss_is_that_of_whole_rows() -> None:
    batch = list_batch(np.random.default_rng(1))
    (loss,), _ = train(lambda mesh: made_loss(mesh, pairwise_logistic=0.5), [[batch]], devices=1, accumulate=1)
    params = tiny_params(CONFIG.model)
    tokens = np.append(batch["tokens"], 0)
    prefix = np.repeat(batch["prefix"], J, axis=0)
    index = np.concatenate([prefix, batch["items"].reshape(-1, ITEM)], axis=1)
    valid = index < len(tokens) - 1
    states = whole_rows(params, jnp.asarray(tokens[index]), jnp.asarray(valid))
    last = states[np.arange(R * J), valid.sum(axis=1) - 1]
    odds = log_odds(last, label_rows(params, CONFIG.label_token_ids)).reshape(R, J)
    labels, items = jnp.asarray(batch["labels"]), jnp.asarray(batch["valid"])
    expected = losses.binary_cross_entropy(odds, labels, items) + losses.list_softmax(odds, labels, items)
    expected += 0.5 * losses.pairwise_logistic(odds, labels, items)
    np.testing.assert_allclose(loss, float(expected), rtol=1e-5)


def test_states_of_items_are_those_of_whole_rows() -> None:
    batch = list_batch(np.random.default_rng(1))
    params, mesh = tiny_params(CONFIG.model), make_mesh(jax.devices()[:1])
    both = every_state(params, {name: array[0] for name, array in put_batch([batch], 1, mesh).items()})
    index = np.concatenate([np.repeat(batch["prefix"], J, axis=0), batch["items"].reshape(-1, ITEM)], axis=1)
    valid = index < len(batch["tokens"])
    tokens = jnp.asarray(np.append(batch["tokens"], 0)[index])
    states = whole_rows(params, tokens, jnp.asarray(valid))
    of_items = np.asarray(states)[:, PREFIX:]
    lengths = valid[:, PREFIX:].sum(axis=1)
    means = (of_items * valid[:, PREFIX:, None]).sum(axis=1) / lengths[:, None]
    assert both.mean is not None
    assert both.every is not None
    np.testing.assert_allclose(both.mean[0].reshape(R * J, -1), means, atol=1e-5)
    np.testing.assert_allclose(both.last[0].reshape(R * J, -1), of_items[np.arange(R * J), lengths - 1], atol=1e-5)
    np.testing.assert_allclose(both.every[0][index[valid]], np.asarray(states)[valid], atol=1e-5)


def test_a_teacher_of_every_state_compares_real_tokens_alone() -> None:
    batch = list_batch(np.random.default_rng(1))
    student, other = tiny_params(CONFIG.model), tiny_params(CONFIG.model, seed=1)
    mesh = make_mesh(jax.devices()[:1])
    decoder = Decoder(CONFIG.model)
    weights = RankerLosses(binary_cross_entropy=0.0, every_state=1.0)
    loss_fn = jax.jit(
        ranker_loss(CONFIG, decoder, weights, mesh, Teacher(other, decoder, CONFIG.label_token_ids, mesh))
    )
    trainable, tables = split_params(student, CONFIG, freeze_embeddings=True)
    micro = {name: array[0] for name, array in put_batch([batch], 1, mesh).items()}
    loss, terms = loss_fn(trainable, {"tables": tables, "teacher": other}, micro)
    assert terms.keys() == {"every_state"}
    ours, theirs = (np.asarray(every_state(params, micro).every)[0] for params in (student, other))
    used = np.unique(np.concatenate([batch["prefix"].reshape(-1), batch["items"].reshape(-1)]))
    used = used[used < len(batch["tokens"])]
    assert len(used) < len(batch["tokens"])
    cosines = np.sum(ours * theirs, axis=-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    np.testing.assert_allclose(loss, np.mean(1 - cosines[used]), rtol=1e-5)
    same, _ = loss_fn(trainable, {"tables": tables, "teacher": student}, micro)
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_a_loss_that_is_not_finite_leaves_the_state_alone() -> None:
    good, bad = list_batch(np.random.default_rng(0)), list_batch(np.random.default_rng(1))
    bad["labels"][0, 0] = np.nan
    (_, lost), after_both = train(made_loss, [[good], [bad]], devices=1, accumulate=1)
    _, after_good = train(made_loss, [[good]], devices=1, accumulate=1)
    assert np.isnan(lost)
    for left, right in zip(jax.tree.leaves(after_both), jax.tree.leaves(after_good), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("kind", ["ranker", pytest.param("encoder", marks=pytest.mark.slow)])
def test_a_gradient_goes_no_deeper_than_what_trains(kind: str) -> None:
    """Of six layers one trains: six forward and two backward passes in place of 18. One down to the labels' input
    rows, which trained label rows invite, would be of five layers more.

    What the log calls useful work is XLA's own count within 5 %. XLA also counts norms, softmax and masked pairs, and
    leaves out the gradient of the lowest trained layer's inputs.
    """
    model = tiny_config("llama", num_layers=6, width=128, head_dim=32, mlp_width=256)
    config, mesh = tiny_ranker_config(model), make_mesh(jax.devices()[:1])
    decoder, generator = Decoder(config.model), np.random.default_rng(0)
    if kind == "ranker":
        loss, batch = ranker_loss(config, decoder, RankerLosses(list_softmax=1.0), mesh, None), list_batch(generator)
        places = R * PREFIX + np.arange(R * J * ITEM, dtype=np.int32)
        batch |= {"items": places.reshape(R, J, ITEM)}  # no padding: XLA would count it
        work = ranker_work
    else:
        loss, batch = encoder_loss(config, decoder, 2, 0.05, 2.0, mesh), pair_batch(generator, 8)
        work = pair_work
    micro = {name: array[0] for name, array in put_batch([batch], 1, mesh).items()}
    flops = []
    for layers in (1, None):
        trainable, tables = split_params(tiny_params(config.model), config, freeze_embeddings=True, train_layers=layers)
        gradient = jax.jit(lambda *given: jax.grad(loss, has_aux=True)(*given)[0])
        cost: Any = gradient.lower(trainable, {"tables": tables, "teacher": {}}, micro).compile().cost_analysis()
        flops.append(cost["flops"])
    assert flops[0] < 0.55 * flops[1]
    np.testing.assert_allclose([work(model, batch, layers).flops for layers in (1, None)], flops, rtol=0.05)


def test_trained_label_rows_have_a_gradient() -> None:
    _, state = train(made_loss, [[list_batch(np.random.default_rng(0))]], devices=1, accumulate=1)
    trainable, _ = split_params(tiny_params(CONFIG.model), CONFIG, freeze_embeddings=True)
    assert np.all(np.any(np.asarray(state["params"][LABEL_ROWS]) != np.asarray(trainable[LABEL_ROWS]), axis=1))


def test_products_are_ynnpacks_where_the_processor_is_good_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(jax.devices()[:1])
    eigen = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    assert jax.jit(lambda x: (x @ x).sum(), compiler_options=eigen)(jnp.ones((4, 4))) == 64  # the compiler knows it
    for features, told in (
        ({"avx2"}, eigen),
        ({"avx2", "avx512f"}, {}),
        ((), {}),
    ):
        monkeypatch.setattr(step, "processor_features", lambda features=features: frozenset(features))
        assert step._compiler_options(mesh) == told


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_frozen_tables_keep_all_rows_but_the_labels(config: Any) -> None:
    params = tiny_params(config.model)
    trainable, tables = split_params(params, config, freeze_embeddings=True)
    assert set(tables) == {"embedding"} | ({"head"} if config is UNTIED else set())
    jax.tree.map(np.testing.assert_array_equal, join_params(trainable, tables, config), params)
    trainable[LABEL_ROWS] = trainable[LABEL_ROWS] + 1
    joined = join_params(trainable, tables, config)
    changed = "head" if config is UNTIED else "embedding"
    for name in tables:
        moved = np.flatnonzero(np.any(np.asarray(joined[name]) != np.asarray(params[name]), axis=1))
        assert moved.tolist() == (sorted(config.label_token_ids) if name == changed else [])


def test_without_freezing_every_parameter_moves() -> None:
    batch = list_batch(np.random.default_rng(0))
    _, state = train(made_loss, [[batch]], devices=1, accumulate=1, freeze=False)
    before = tiny_params(CONFIG.model)
    moved = jax.tree.map(lambda new, old: bool(jnp.any(new != old)), state["params"], before)
    assert all(jax.tree.leaves(moved))


def test_the_largest_divisible_axis_is_split() -> None:
    mesh = make_mesh(jax.devices()[:4])
    assert sharding_of((8, 16), mesh).spec == P(None, "data")
    assert sharding_of((16, 6), mesh).spec == P("data")
    assert sharding_of((3, 6), mesh).spec == P()
    assert sharding_of((), mesh).spec == P()


def test_learning_rate_rises_then_falls_to_its_last_share() -> None:
    rates = learning_rates(OptimiserSettings(learning_rate=1.0, warmup_steps=4, final_fraction=0.1), 20)
    values = [float(rates(step)) for step in range(21)]
    assert 0 < values[0] < values[1] < values[4] == 1.0
    assert values[4:] == sorted(values[4:], reverse=True)
    np.testing.assert_allclose(values[20], 0.1, rtol=1e-5)
    assert float(learning_rates(OptimiserSettings(learning_rate=1.0), 10)(0)) == 1.0
