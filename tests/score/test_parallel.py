"""Eight devices give the scores of one, by shard_map and by pmap."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.config import Bucket, BucketConfig
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.head import vocab_logits
from jaxslm.model.layout import Rows
from jaxslm.score.compiled import CompiledScorer, make_score_fn
from jaxslm.score.forward import PackRequest, empty_forward
from jaxslm.score.packing import Packer
from jaxslm.score.parallel import replicate
from jaxslm.score.warmup import compilations, warm_up
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_params, tiny_ranker_config

CONFIG = tiny_ranker_config(tiny_config())
BUCKETS = BucketConfig(
    buckets=(
        Bucket(tokens=24, rows=3, prefix_tokens=8, items_per_row=2, item_tokens=6),
        Bucket(tokens=64, rows=6, prefix_tokens=8, items_per_row=2, item_tokens=12),
    ),
    overhead_tokens=4,
)


def requests(*shapes: tuple[int, int]) -> list[PackRequest]:
    """Requests of (prefix tokens, items), items of 1 to 12 random tokens."""
    generator = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        found: list[int] = generator.integers(0, VOCAB_SIZE, count).tolist()
        return found

    return [PackRequest(ids(P), [ids(int(generator.integers(1, 13))) for _ in range(J)]) for P, J in shapes]


@pytest.fixture(scope="module")
def scorers() -> dict[int, CompiledScorer]:
    assert jax.local_device_count() == 8
    made = {
        n: CompiledScorer(CONFIG, tiny_params(CONFIG.model), devices=jax.local_devices()[:n], buckets=BUCKETS)
        for n in (1, 3, 8)
    }
    for one in made.values():
        warm_up(one)
    return made


@pytest.mark.parametrize("devices", [3, 8])
@pytest.mark.parametrize("shapes", [((5, 1),), ((8, 3), (0, 4)), ((3, 50), (7, 1), (8, 20)), ((1, 2),) * 20])
def test_many_devices_equal_one(scorers: dict[int, CompiledScorer], devices: int, shapes: tuple) -> None:
    """Uneven work: one item for eight devices, more passes than devices, several requests."""
    work = requests(*shapes)
    expected = scorers[1].logits(work)
    before = compilations()
    found = scorers[devices].logits(work)
    assert compilations() == before
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 3])
def test_log_probabilities_of_any_tokens_come_beside_the_logits(
    scorers: dict[int, CompiledScorer], devices: int
) -> None:
    """Requests that ask for different tokens, or none, share passes; one asks for more items than are done at once."""
    plain = requests((3, 50), (7, 40), (8, 20))
    work = [replace(plain[0], label_ids=(7, 0, 7)), plain[1], replace(plain[2], label_ids=tuple(range(16)))]
    logits = scorers[devices].logits(plain)
    before = compilations()
    found = scorers[devices].logits(work)
    assert compilations() == before
    np.testing.assert_array_equal(found[:, :2], logits)
    rows = [[*request.prefix_ids, *item] for request in plain for item in request.item_ids]
    tokens, valid = np.zeros((len(rows), 20), np.int32), np.zeros((len(rows), 20), bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], valid[number, : len(row)] = row, True

    @jax.jit
    def log_probabilities(params: Params) -> jax.Array:
        states: Any = Decoder(CONFIG.model).apply({"params": params}, jnp.asarray(tokens), Rows(jnp.asarray(valid)))
        return jax.nn.log_softmax(vocab_logits(states, params))

    expected = np.asarray(log_probabilities(tiny_params(CONFIG.model)))
    np.testing.assert_allclose(found[:50, 2:5], expected[:50, [7, 0, 7]], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[90:, 2:], expected[90:, :16], rtol=0, atol=1e-5)


def test_pmap_of_the_same_function_gives_the_same_scores(scorers: dict[int, CompiledScorer]) -> None:
    devices = jax.local_devices()
    work = requests((3, 40), (7, 20))
    score = make_score_fn(CONFIG, dtype=jnp.float32)
    by_pmap = jax.pmap(score, in_axes=(None, 0), devices=devices)
    found = np.empty((60, 2), np.float32)
    for group in Packer(BUCKETS).pack(work, len(devices)):
        full = [*group, *[empty_forward(group[0].bucket)] * (len(devices) - len(group))]
        batch = {name: np.stack([forward.batch[name] for forward in full]) for name in full[0].batch}
        scorers[8].collect(group, (by_pmap(tiny_params(CONFIG.model), batch),), found)
    np.testing.assert_allclose(found, scorers[8].logits(work), rtol=0, atol=1e-6)


def test_weights_are_put_on_every_device_once() -> None:
    devices = jax.local_devices()
    params = replicate(tiny_params(CONFIG.model), devices)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    assert all(leaf.sharding.device_set == set(devices) for leaf in jax.tree.leaves(params))
