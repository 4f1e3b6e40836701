"""The few shapes of one run: they hold whatever the prompt allows, and fit what it usually makes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxslm.config import CompressorConfig, PromptConfig, RankerConfig
from jaxslm.score.buckets import few_buckets
from jaxslm.score.forward import PackRequest
from jaxslm.score.packing import Packer
from jaxslm.score.scorer import load_few_shapes
from tests.score.test_packing import COMPRESSOR
from tests.tiny import tiny_config, tiny_ranker, tiny_ranker_config

PLATFORMS = ("cpu", "gpu", "tpu")


def ranker_config(max_tokens: int, max_item_tokens: int | None = None) -> RankerConfig:
    prompt = PromptConfig(template="brief", max_tokens=max_tokens, max_item_tokens=max_item_tokens)
    return tiny_ranker_config(tiny_config()).model_copy(update={"prompt": prompt})


@settings(max_examples=200, deadline=None)
@given(
    platform=st.sampled_from(PLATFORMS),
    max_tokens=st.integers(32, 3000),
    max_item_tokens=st.none() | st.integers(1, 3000),
    data=st.data(),
)
def test_any_row_of_the_prompt_has_a_shape(
    platform: str, max_tokens: int, max_item_tokens: int | None, data: st.DataObject
) -> None:
    packer = Packer(few_buckets(platform, ranker_config(max_tokens, max_item_tokens)))
    prefix = data.draw(st.integers(0, max_tokens - 1))
    lengths = data.draw(st.lists(st.integers(1, max_tokens - prefix), min_size=1, max_size=4))
    groups = list(packer.pack([PackRequest([1] * prefix, [[2] * length for length in lengths])]))
    assert sum(len(forward.indices) for group in groups for forward in group) == len(lengths)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_items_as_the_prompt_cuts_them_behind_a_sentence_take_the_tight_shapes(platform: str) -> None:
    packer = Packer(few_buckets(platform, ranker_config(176, 92)))
    for prefix, item, shape in ((58, 95, (64, 96)), (65, 95, (128, 176)), (58, 97, (128, 176))):
        passes = packer.pack([PackRequest([1] * prefix, [[2] * item] * 40)])
        shapes = {(each.bucket.prefix_tokens, each.bucket.item_tokens) for group in passes for each in group}
        assert shapes == {shape}


@pytest.mark.parametrize("items", [[50, 50], [51, 13], [1] * 9])
def test_passes_are_full_and_rows_share_copies_of_the_prefix(items: list[int]) -> None:
    """Items at the prompt's cut: whatever requests ask for, only tokens limit a pass, and rows hold two."""
    packer = Packer(few_buckets("cpu", ranker_config(176, 92)))
    passes = [each for group in packer.pack([PackRequest([1] * 40, [[2] * 95] * n) for n in items]) for each in group]
    for forward in passes[:-1]:
        assert forward.bucket.tokens - forward.real_tokens < 40 + 95 + 95 * (max(items) == 1)
    assert {forward.bucket.items_per_row for forward in passes} == {2}


@settings(max_examples=100, deadline=None)
@given(platform=st.sampled_from(PLATFORMS), max_tokens=st.integers(32, 3000), data=st.data())
def test_vectors_of_every_k_stand_behind_any_prefix_of_the_prompt(
    platform: str, max_tokens: int, data: st.DataObject
) -> None:
    packer = Packer(few_buckets(platform, ranker_config(max_tokens), COMPRESSOR))
    for k in COMPRESSOR.ks:
        prefix = data.draw(st.integers(0, max_tokens - k - 1))
        request = PackRequest([1] * prefix, [[0] * k + [2]] * 50, np.ones((50, k, 4), np.float32))
        assert sum(len(forward.indices) for group in packer.pack([request]) for forward in group) == 50


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("text_tokens", [0, 20])
@pytest.mark.parametrize(("max_tokens", "prefixes"), [(100, {64, 128}), (176, {64, 176}), (600, {64, 128, 600})])
def test_vectors_of_every_k_have_few_shapes(
    platform: str, text_tokens: int, max_tokens: int, prefixes: set[int]
) -> None:
    fields = {"text_fields": ("title",), "max_text_tokens": text_tokens} if text_tokens else {}
    compressor = CompressorConfig(**(COMPRESSOR.model_dump() | fields))
    buckets = few_buckets(platform, ranker_config(max_tokens, 92), compressor).buckets
    for k in compressor.ks:
        of_k = [bucket for bucket in buckets if bucket.vectors_per_item == k]
        assert {bucket.item_tokens for bucket in of_k} == {k + 1 + text_tokens}
        assert {bucket.prefix_tokens for bucket in of_k} == prefixes


def test_a_ranker_of_few_shapes_gives_the_scores_of_one_of_many(tmp_path: Path) -> None:
    many = tiny_ranker(tmp_path / "ranker", template="brief", max_tokens=176, max_item_tokens=92)
    few = load_few_shapes(tmp_path / "ranker")
    texts = ["a nurse", "a baker", "a pilot"]
    np.testing.assert_allclose(few.score("who bakes?", texts), many.score("who bakes?", texts), rtol=1e-5)
    assert len(few.scorer.packer.config.buckets) < len(many.scorer.packer.config.buckets) / 10
