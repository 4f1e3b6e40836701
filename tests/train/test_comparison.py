"""The comparison layer: it scores by the similarity of query and item, and is an ordinary layer."""

from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.config import ModelConfig, RankerConfig
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder, init_params
from jaxslm.model.head import label_rows, log_odds
from jaxslm.model.layout import SharedPrefix
from jaxslm.train.comparison import NpBatch, _sample, add_comparison_layer
from tests.tiny import tiny_config, tiny_params, tiny_ranker_config
from tests.train.graded import PROMPT, ranker, write_graded

BASE = tiny_ranker_config(tiny_config("llama", num_layers=2))
MODEL = BASE.model.model_copy(
    update={"width": 64, "num_kv_heads": 1, "queries_per_kv": 2, "head_dim": 16, "mlp_width": 64}
)
CONFIG = BASE.model_copy(update={"model": MODEL})


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[NpBatch]:
    return list(islice(ranker(write_graded(tmp_path_factory.mktemp("graded"))), 8))


@partial(jax.jit, static_argnums=0)
def final_states(config: ModelConfig, params: Any, tokens: jax.Array, prefix: jax.Array, items: jax.Array) -> jax.Array:
    """Returns the states of the items' answer tokens."""
    return jnp.asarray(Decoder(config).apply({"params": params}, tokens, SharedPrefix(prefix, items, len(tokens))))


def scores(config: Any, params: Any, label_ids: tuple[int, int], batch: NpBatch) -> np.ndarray:
    states = final_states(config, params, *(jnp.asarray(batch[name]) for name in ("tokens", "prefix", "items")))
    odds = log_odds(states.reshape(-1, config.width), label_rows(params, label_ids))
    found: np.ndarray = np.asarray(odds).reshape(batch["valid"].shape)[batch["valid"]]
    return found


def similarities(params: Any, batches: list[NpBatch]) -> list[np.ndarray]:
    """Returns per batch the cosine of the mean states of each item and its query."""
    sample = _sample(MODEL, params, PROMPT, batches)
    units = [means / np.linalg.norm(means, axis=1, keepdims=True) for means in (sample.queries, sample.items)]
    ends = np.cumsum([batch["valid"].sum() for batch in batches])
    return np.split(np.sum(units[0] * units[1], axis=1), ends[:-1])


def labelled_by(similarity: np.ndarray, batch: NpBatch) -> NpBatch:
    """Returns the batch with the most similar item of each list as the only relevant one."""
    in_lists: np.ndarray = np.full(batch["valid"].shape, -np.inf)
    in_lists[batch["valid"]] = similarity
    best = np.arange(in_lists.shape[1]) == in_lists.argmax(axis=1)[:, None]
    return {**batch, "labels": (best & batch["valid"]).astype(np.float32)}


def test_the_new_layer_scores_by_the_similarity_of_mean_states(batches: list[NpBatch]) -> None:
    params = init_params(MODEL, jax.random.key(4))  # of eight random models the correlation is 0.59 to 0.89
    similarity = similarities(params, batches)
    batches = [labelled_by(each, batch) for each, batch in zip(similarity, batches, strict=True)]
    model, grown = add_comparison_layer(CONFIG, params, PROMPT, batches[:6])
    assert model == MODEL.model_copy(update={"num_layers": 3})
    for name in ("layers_0", "layers_1"):
        jax.tree.map(np.testing.assert_array_equal, grown[name], params[name])
    found = [scores(model, grown, CONFIG.label_token_ids, batch) for batch in batches]
    assert np.corrcoef(np.concatenate(found[6:]), np.concatenate(similarity[6:]))[0, 1] > 0.6
    assert abs(np.concatenate(found[:6]).mean() + 1.8) < 0.01


def test_the_same_data_gives_the_same_layer(batches: list[NpBatch]) -> None:
    params = init_params(MODEL, jax.random.key(3))
    _, first = add_comparison_layer(CONFIG, params, PROMPT, batches[:2])
    _, again = add_comparison_layer(CONFIG, params, PROMPT, batches[:2])
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "qwen3"}, "without q/k norm"),
        ({"queries_per_kv": 1, "num_kv_heads": 2}, "two query heads"),
        ({"mlp_width": 24}, "must be above 32"),
    ],
)
def test_models_without_room_are_refused(changes: dict[str, Any], message: str, batches: list[NpBatch]) -> None:
    model = MODEL.model_copy(update=changes)
    config = RankerConfig(model=model, prompt=CONFIG.prompt, label_token_ids=CONFIG.label_token_ids)
    with pytest.raises(InputError, match=message):
        add_comparison_layer(config, tiny_params(model), PROMPT, batches[:1])
