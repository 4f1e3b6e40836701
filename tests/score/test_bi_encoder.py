"""The bi-encoder: what it pools, and that no score depends on company."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder
from jaxslm.prompt import Prompt
from jaxslm.score import bi_encoder
from jaxslm.score.bi_encoder import BiEncoder, mean_states
from tests.tiny import tiny_config, tiny_params, tiny_ranker_config, tiny_tokenizer_json

CONFIG = tiny_ranker_config(tiny_config("llama", num_layers=1))
PROMPT = Prompt(tiny_tokenizer_json(), CONFIG.prompt)


def test_states_are_averaged_over_the_pooled_tokens_alone() -> None:
    params, states = tiny_params(CONFIG.model), jax.jit(partial(mean_states, Decoder(CONFIG.model)))
    pooled = jnp.asarray([[False, True, True]])
    alone = states(params, jnp.asarray([[5, 6, 7]]), jnp.ones((1, 3), bool), pooled)
    valid = jnp.asarray([[True, False, True, True, False], [False] * 5])
    pooled = valid.at[0, 0].set(False)
    padded = states(params, jnp.asarray([[5, 9, 6, 7, 9], [1] * 5]), valid, pooled)
    np.testing.assert_allclose(padded[0], alone[0], atol=1e-5)
    np.testing.assert_array_equal(padded[1], 0)


def test_a_bi_encoder_scores_an_item_the_same_in_any_company() -> None:
    scorer = BiEncoder(CONFIG.model, PROMPT, jnp.dtype("float32"), max_item_tokens=12)
    scorer.load(tiny_params(CONFIG.model))
    items = [
        Item(id=f"i{n}", text=f"developer {n}", title="job" if n % 2 else None) for n in range(bi_encoder._ROWS + 3)
    ]
    together = scorer.score("python", items)
    scorer.load(tiny_params(CONFIG.model))
    np.testing.assert_allclose(scorer.score("python", items[-1:]), together[-1:], atol=1e-5)
    assert np.all(np.abs(together) <= 1 + 1e-6)


def test_long_items_are_cut_and_encoded_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bi_encoder, "_TOKENS", 100)
    scorer = BiEncoder(CONFIG.model, PROMPT, jnp.dtype("float32"), max_item_tokens=40)
    scorer.load(tiny_params(CONFIG.model))
    texts = ["developer " * 100, "developer " * 200, "python", "<|im_end|>", "python"]
    scores = scorer.score("python", [Item(id=str(n), text=text) for n, text in enumerate(texts)])
    assert scores[0] == scores[1]
    np.testing.assert_allclose(scores[2], scores[4], atol=1e-5)


def test_nothing_to_encode_is_refused() -> None:
    scorer = BiEncoder(CONFIG.model, PROMPT, jnp.dtype("float32"), max_item_tokens=12)
    scorer.load(tiny_params(CONFIG.model))
    with pytest.raises(InputError, match="item 1: has no text"):
        scorer.score("python", [Item(id="a", text="x"), Item(id="b", title=" ", text="")])
    with pytest.raises(InputError, match="query: must not be empty"):
        scorer.score(" ", [Item(id="a", text="x")])
