"""Packing: every item once, nothing but buckets, and what goes in comes out."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxslm.config import Bucket, BucketConfig, CompressorConfig
from jaxslm.errors import InputError
from jaxslm.score.buckets import default_buckets, fit_buckets, make_bucket, with_longer, with_vectors
from jaxslm.score.forward import Forward, PackRequest, empty_forward
from jaxslm.score.packing import Packer
from tests.tiny import tiny_config

SMALL = BucketConfig(
    buckets=(
        Bucket(tokens=24, rows=4, prefix_tokens=6, items_per_row=2, item_tokens=4),
        Bucket(tokens=48, rows=4, prefix_tokens=6, items_per_row=3, item_tokens=8),
        Bucket(tokens=16, rows=2, prefix_tokens=6, items_per_row=1, item_tokens=8),
    ),
    overhead_tokens=4,
)
COMPRESSOR = CompressorConfig(
    encoder=tiny_config(),
    width=4,
    ks=(1, 8),
    pooling="mean",
    max_item_tokens=16,
    answer_tokens=1,
    tokenizer_sha256="",
)
FITTED = fit_buckets([[PackRequest([1] * 18, [[2] * 12] * 9)]], count=2, max_tokens=128, overhead_tokens=32)
LONGER = Packer(with_longer(FITTED, 600, 128))
token_ids = st.integers(0, 1000)
requests_of_ids = st.lists(
    st.tuples(
        st.lists(token_ids, max_size=6),
        st.lists(st.lists(token_ids, min_size=1, max_size=8), min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=5,
)


def unpacked(forward: Forward) -> dict[int, list[int]]:
    """Reads a pass back through its index arrays alone: item number -> prefix and item tokens."""
    M, J = forward.bucket.tokens, forward.bucket.items_per_row
    found = {}
    for place, number in zip(forward.places, forward.indices, strict=True):
        prefix, item = forward.prefix[place // J], forward.items[place // J, place % J]
        found[int(number)] = forward.tokens[np.concatenate([prefix[prefix < M], item[item < M]])].tolist()
    return found


@settings(max_examples=200, deadline=None)
@given(requests=requests_of_ids, replicas=st.integers(1, 3))
def test_every_item_once_and_unpack_of_pack_is_the_identity(
    requests: list[tuple[list[int], list[list[int]]]], replicas: int
) -> None:
    found: dict[int, list[int]] = {}
    for group in Packer(SMALL).pack([PackRequest(*request) for request in requests], replicas):
        assert 1 <= len(group) <= replicas
        assert len({forward.bucket for forward in group}) == 1
        for forward in group:
            b = forward.bucket
            assert b in SMALL.buckets
            assert forward.tokens.shape == (b.tokens,)
            assert forward.prefix.shape == (b.rows, b.prefix_tokens)
            assert forward.items.shape == (b.rows, b.items_per_row, b.item_tokens)
            assert {array.dtype for array in forward.batch.values()} == {np.dtype(np.int32)}
            parts = unpacked(forward)
            assert len(parts) == len(forward.indices) == len(set(forward.places.tolist())) > 0
            assert not found.keys() & parts.keys()
            found |= parts
    rows = [[*prefix, *item] for prefix, items in requests for item in items]
    assert [found[number] for number in range(len(rows))] == rows


def test_a_prefix_stands_once_however_many_rows_its_items_take() -> None:
    bucket = Bucket(tokens=64, rows=5, prefix_tokens=8, items_per_row=2, item_tokens=4)
    request = PackRequest([7] * 8, [[1, 2]] * 9)
    ((forward,),) = Packer(BucketConfig(buckets=(bucket,))).pack([request])
    assert forward.real_tokens == 8 + 9 * 2
    np.testing.assert_array_equal(forward.prefix, np.broadcast_to(np.arange(8), (5, 8)))


def test_small_requests_share_a_pass_and_large_ones_are_split() -> None:
    packer = Packer(default_buckets("cpu"))
    small = [PackRequest([1] * 20, [[2] * 9] * 4) for _ in range(5)]
    assert len(list(packer.pack(small))) <= 2
    large = list(packer.pack([PackRequest([1] * 50, [[2] * 150] * 1000)]))
    assert len(large) > 100
    in_order = np.concatenate([forward.indices for group in large for forward in group])
    np.testing.assert_array_equal(in_order, np.arange(1000))
    assert packer.padding_fraction([PackRequest([1] * 50, [[2] * 150] * 1000)]) < 0.1


@settings(max_examples=50, deadline=None)
@example(platform="cpu", prefix=60, item=9, items=10)  # the fullest pass for its cost leaves three items for another
@given(
    platform=st.sampled_from(["cpu", "gpu"]),
    prefix=st.integers(0, 80),
    item=st.integers(1, 200),
    items=st.integers(1, 60),
)
def test_no_single_pass_costs_less_than_what_is_chosen(platform: str, prefix: int, item: int, items: int) -> None:
    buckets, requests = default_buckets(platform), [PackRequest([1] * prefix, [[2] * item] * items)]
    packed = Packer(buckets).cost_tokens(requests)
    for bucket in buckets.buckets:
        # Much longer items are left out when a bucket is chosen.
        if item <= bucket.item_tokens <= 2 * item and prefix <= bucket.prefix_tokens:
            alone = Packer(buckets.model_copy(update={"buckets": (bucket,)}))
            if len(list(alone.pack(requests))) == 1:
                assert packed <= alone.cost_tokens(requests)


def test_a_prefix_that_no_bucket_holds_joins_its_items() -> None:
    request = PackRequest(list(range(7)), [[100], [101]])
    found = {number: ids for (forward,) in Packer(SMALL).pack([request]) for number, ids in unpacked(forward).items()}
    assert found == {0: [*range(7), 100], 1: [*range(7), 101]}


def test_vectors_stand_at_their_items() -> None:
    bucket = Bucket(tokens=64, rows=3, prefix_tokens=8, items_per_row=2, item_tokens=4, vectors_per_item=2)
    vectors = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
    requests = [PackRequest([1], [[0, 0, 5]] * 3, vectors[:3]), PackRequest([2], [[0, 0, 6]] * 2, vectors[3:])]
    ((forward,),) = Packer(BucketConfig(buckets=(bucket,))).pack(requests)
    assert forward.vectors is not None
    assert forward.batch["vectors"].shape == (3, 2, 2, 3)
    np.testing.assert_array_equal(forward.vectors.reshape(6, 2, 3)[forward.places], vectors[forward.indices])
    ((converted,),) = Packer(BucketConfig(buckets=(bucket,)), np.float16).pack(requests)
    assert converted.vectors is not None
    np.testing.assert_array_equal(converted.vectors, forward.vectors.astype(np.float16))


def test_vectors_of_a_requests_items_that_are_apart_in_a_pass_stand_at_theirs() -> None:
    """Items of two lengths in turns: long ones come first, so no pass holds a request's items one after another."""
    shapes = [(40, 4, 8), (24, 4, 3)]
    buckets = [
        Bucket(tokens=M, rows=2, prefix_tokens=2, items_per_row=n, item_tokens=T, vectors_per_item=1)
        for M, n, T in shapes
    ]
    vectors = np.arange(2 * 7 * 3, dtype=np.float32).reshape(2, 7, 1, 3)
    requests = [PackRequest([1], [[0] * (8 if item % 2 else 3) for item in range(7)], each) for each in vectors]
    found = np.full((14, 1, 3), np.nan, np.float32)
    for (forward,) in Packer(BucketConfig(buckets=tuple(buckets))).pack(requests):
        assert forward.vectors is not None
        found[forward.indices] = forward.vectors.reshape(-1, 1, 3)[forward.places]
    np.testing.assert_array_equal(found, vectors.reshape(14, 1, 3))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PackRequest([1], [[2], []]), "item 1: has no tokens"),
        (PackRequest([1], [[2] * 9]), "item of 9 tokens after a prefix of 1: no bucket holds it"),
        (
            PackRequest([1] * 7, [[2], [2] * 3]),
            "after a prefix of 7: .* counts as part of each item, which may have 8 tokens",
        ),
    ],
)
def test_what_no_bucket_holds_is_refused(request_: PackRequest, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(Packer(SMALL).pack([request_]))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_default_buckets_hold_any_item(platform: str) -> None:
    packer = Packer(default_buckets(platform))
    for prefix in (0, 1, 64, 65, 1024):
        for item in (1, 16, 17, 150, 901, 8192):
            assert list(packer.pack([PackRequest([1] * prefix, [[2] * item])]))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_items_share_any_prefix_of_a_prompt(platform: str) -> None:
    packer = Packer(default_buckets(platform))
    for prefix in (1025, 1400, 2000):
        forwards = [one for (one,) in packer.pack([PackRequest([1] * prefix, [[2] * 40] * 50)])]
        assert len(forwards) <= 6
        assert all((one.prefix < one.bucket.tokens).any() for one in forwards)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("longest_row", [512, 2048, 4096])
def test_vectors_stand_behind_any_prefix_of_a_prompt(platform: str, longest_row: int) -> None:
    packer = Packer(with_vectors(SMALL, platform, COMPRESSOR, longest_row))
    assert packer.longest_item == Packer(SMALL).longest_item
    for k in COMPRESSOR.ks:
        vectors = np.ones((50, k, 4), np.float32)
        for prefix in (0, 70, longest_row - k - 1):
            (forward,), *more = packer.pack([PackRequest([1] * prefix, [[0] * k + [2]] * 50, vectors)])
            assert forward.bucket.vectors_per_item == k
            assert len(more) < 5
    with pytest.raises(InputError, match=r"no bucket holds it \(none is for items with 2 vectors\)"):
        list(packer.pack([PackRequest([1], [[0, 0, 2]], np.ones((1, 2, 4), np.float32))]))


def test_buckets_for_vectors_change_nothing_for_texts() -> None:
    """A prefix of text that only buckets of vectors would hold still joins its items."""
    longer = Bucket(tokens=64, rows=1, prefix_tokens=32, items_per_row=1, item_tokens=16, vectors_per_item=2)
    packer = Packer(BucketConfig(buckets=(*SMALL.buckets, longer), overhead_tokens=4))
    assert list(map(len, packer.pack([PackRequest([1] * 7, [[2]] * 4)]))) == [1, 1]
    with pytest.raises(InputError, match=r"item of 9 tokens after a prefix of 1: .* such a prefix may have 8 tokens"):
        list(packer.pack([PackRequest([1], [[2] * 9])]))


def test_buckets_that_are_for_vectors_stay_as_they_are() -> None:
    one = make_bucket(64, 8, 2, 2, vectors_per_item=1)
    config = SMALL.model_copy(update={"buckets": (*SMALL.buckets, one)})
    assert with_vectors(config, "cpu", COMPRESSOR, 512) == config
    added = with_vectors(SMALL, "cpu", COMPRESSOR, 512).buckets[len(SMALL.buckets) :]
    assert {bucket.vectors_per_item for bucket in added} == {1, 8}


@settings(max_examples=100, deadline=None)
@given(prefix=st.integers(0, 600), item=st.integers(1, 600))
def test_buckets_fitted_to_a_sample_hold_longer_rows_too(prefix: int, item: int) -> None:
    prefix = min(prefix, 600 - item)
    found = [one for (one,) in LONGER.pack([PackRequest([1] * prefix, [[2] * item] * 3)])]
    assert sorted(number for one in found for number in one.indices) == [0, 1, 2]


def test_a_prefix_longer_than_the_samples_is_still_shared() -> None:
    ((one,),) = LONGER.pack([PackRequest([1] * 500, [[2] * 12] * 3)])
    assert one.real_tokens == 500 + 3 * 12


def test_longer_rows_cost_few_shapes() -> None:
    assert len(FITTED.buckets) <= 2
    assert len(LONGER.config.buckets) <= len(FITTED.buckets) + 9
    assert LONGER.config.buckets[: len(FITTED.buckets)] == FITTED.buckets


def test_a_sample_without_prefixes_can_be_fitted() -> None:
    fitted = fit_buckets([[PackRequest([], [[2] * 9] * 4)]], count=2, max_tokens=64, overhead_tokens=32)
    assert list(Packer(fitted).pack([PackRequest([], [[2] * 9] * 4)]))


def test_fitted_buckets_pad_less_than_default_ones() -> None:
    generator = np.random.default_rng(0)
    sample = [
        PackRequest([1] * int(generator.integers(40, 60)), [[2] * int(n) for n in generator.integers(100, 200, 20)])
        for _ in range(4)
    ]
    fitted = fit_buckets([[one] for one in sample], count=4, max_tokens=1024, overhead_tokens=32)
    assert len(fitted.buckets) <= 4
    assert max(bucket.tokens for bucket in fitted.buckets) <= 1024
    costs = [
        sum(packer.cost_tokens([one]) for one in sample) for packer in (Packer(fitted), Packer(default_buckets("cpu")))
    ]
    assert costs[0] < 0.97 * costs[1]


def test_an_empty_pass_has_the_shape_of_its_bucket() -> None:
    bucket = make_bucket(64, 8, 4, 2)
    forward = empty_forward(bucket)
    assert forward.batch["items"].shape == (bucket.rows, bucket.items_per_row, 4)
    assert (forward.prefix == 64).all()
    assert (forward.items == 64).all()
    assert len(forward.indices) == 0
