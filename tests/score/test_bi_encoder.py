"""The bi-encoder: what it pools, and that no score depends on company."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder
from jaxslm.prompt import Prompt
from jaxslm.score import bi_encoder
from jaxslm.score.bi_encoder import BiEncoder
from tests.tiny import every_state, tiny_config, tiny_params, tiny_ranker_config, tiny_tokenizer_json

CONFIG = tiny_ranker_config(tiny_config("llama", num_layers=1))
PROMPT = Prompt(tiny_tokenizer_json(), CONFIG.prompt)


def test_a_score_is_the_cosine_of_mean_states() -> None:
    """Means are over a text's own tokens in a row by itself: the item's with the newline, the query's question."""
    params, decoder = tiny_params(CONFIG.model), Decoder(CONFIG.model)
    item = Item(id="a", text="welder and baker", title="job")
    query, before = PROMPT.encode_query("python"), PROMPT.item_prefix_ids
    item_ids = PROMPT.encode("python", [item]).item_ids[0][: -len(PROMPT.suffix_ids)]

    def unit(ids: list[int], first: int) -> np.ndarray:
        mean = np.asarray(every_state(decoder, params, jnp.array([ids])))[0, first:].mean(axis=0)
        return mean / np.linalg.norm(mean)

    scorer = BiEncoder(CONFIG.model, PROMPT, jnp.dtype("float32"), max_item_tokens=30)
    scorer.load(params)
    wanted = unit(query, PROMPT.query_from) @ unit([*before, *item_ids], len(before))
    np.testing.assert_allclose(scorer.score("python", [item]), [wanted], atol=1e-5)


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
    with pytest.raises(InputError, match="item 'b': has no text"):
        scorer.score("python", [Item(id="a", text="x"), Item(id="b", title=" ", text="")])
    with pytest.raises(InputError, match="query: must not be empty"):
        scorer.score(" ", [Item(id="a", text="x")])
