"""Batches of a compressor: one shape for every k, and nothing read from the places that a smaller one leaves empty."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.checkpoint import load_checkpoint
from jaxslm.compress.encoder import ItemTokenizer, VectorEncoder
from jaxslm.config import CompressorConfig
from jaxslm.model.decoder import Decoder
from jaxslm.train.compressor_data import CompressorItems, MixedLists
from jaxslm.train.compressor_step import Models, mixed_states
from jaxslm.train.data import ranker_batches, ranker_data
from jaxslm.train.data_settings import DataSettings
from jaxslm.train.lists import TokenList
from jaxslm.train.packing import Batch, collate_lists
from jaxslm.train.step import make_mesh
from tests.compress.tiny_compressor import ENCODER, RANKER, compressor_config, compressor_params
from tests.tiny import tiny_params, tiny_ranker_config, tiny_tokenizer_json
from tests.train.toy import toy_folder


class Lists:
    """Some lists of the toy data, laid out for compressors of several ks."""

    def __init__(self, folder: Path) -> None:
        self.settings = DataSettings(
            items=str(folder / "items.jsonl"), queries=str(folder / "train.jsonl"), items_per_list=8,
            hard_negative_pool=0, lists_per_batch=2, tokens_per_batch=1200, max_prefix_tokens=104, max_item_tokens=60,
        )  # fmt: skip
        self.prompt = load_checkpoint(folder / "tiny").prompt
        self.data = ranker_data(self.settings, self.prompt)
        self.chosen: list[TokenList] = []
        next(ranker_batches(self.settings, self.prompt, data=self.data, collate=self._keep))

    def _keep(self, chosen: Sequence[TokenList]) -> Batch:
        self.chosen = list(chosen)
        return collate_lists(chosen, self.settings)

    def batch(self, config: CompressorConfig, k: int, *, frozen: bool) -> Batch:
        """Returns the batch of k vectors an item; a frozen encoder's states are computed before."""
        items = CompressorItems.of(self.data, config, ItemTokenizer(tiny_tokenizer_json()))
        if frozen:
            items = replace(items, pooled=VectorEncoder(config, PARAMS, tiny_tokenizer_json()).pooled(items.ids))
        batch = MixedLists(self.settings, config, self.prompt, items).collate(self.chosen, k)
        return batch | {"k": np.array(k, np.float32)}


PARAMS = compressor_params(compressor_config())


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Lists:
    return Lists(toy_folder(tmp_path_factory.mktemp("toy"), num_layers=1))


def states_of(config: CompressorConfig, batch: Batch) -> np.ndarray:
    """Returns the last tokens' states of the lists' items, [lists, items, D]."""
    mesh = make_mesh(jax.devices()[:1])
    models = Models(tiny_ranker_config(RANKER), config, Decoder(RANKER), Decoder(ENCODER))
    params = PARAMS | {"ranker": tiny_params(RANKER, 1)}
    part = {name: jnp.asarray(array)[None] for name, array in batch.items()} | {"noise": jnp.zeros(1)}
    states = jax.jit(lambda params, part: mixed_states(models, params, part, mesh, every=False).last[0])
    return np.asarray(states(params, part))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_smaller_k_reads_what_it_would_in_a_shape_of_its_own(lists: Lists, frozen: bool) -> None:
    shared, alone = compressor_config(ks=(1, 3)), compressor_config(ks=(1,))
    small, large = (lists.batch(shared, k, frozen=frozen) for k in shared.ks)
    shape_of = {name: (array.shape, array.dtype) for name, array in small.items()}
    assert shape_of == {name: (array.shape, array.dtype) for name, array in large.items()}
    own = lists.batch(alone, 1, frozen=frozen)
    assert own["mixed_tokens"].size < small["mixed_tokens"].size
    read, wanted = states_of(shared, small), states_of(alone, own)
    np.testing.assert_allclose(read, wanted, rtol=1e-5, atol=1e-5)
    assert not np.allclose(states_of(shared, large), wanted, atol=1e-2)


def test_a_smaller_k_leaves_places_of_its_items_empty(lists: Lists) -> None:
    batch = lists.batch(compressor_config(ks=(1, 2, 4)), 2, frozen=True)
    items, none = batch["mixed_items"], len(batch["mixed_tokens"])
    assert (items[..., :3] < none).all(), "two vectors and the answer token"
    assert (items[..., 3:] == none).all()
