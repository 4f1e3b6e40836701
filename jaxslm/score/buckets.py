"""Which shapes are compiled: defaults for any traffic, and a fit to a sample of it."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from jaxslm.config import Bucket, BucketConfig, CompressorConfig, PromptConfig, RankerConfig
from jaxslm.model.layout import LONG_PREFIX
from jaxslm.score.forward import PackRequest
from jaxslm.score.packing import Packer

ITEM_EDGES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
"""Item lengths of the default buckets. Only attention sees the padding up to them."""

PREFIX_EDGES = (64, 256, 1024, 2048)
"""Prefixes of the default buckets, up to the longest row of a prompt by default."""

LONG_PASS_ITEMS = 1024
"""Tokens of items in a pass whose prefix alone is longer than most passes."""

SLOT_TOKENS = 64
"""Items of fewer tokens share rows of about this many, or half the prefix if that is more: products with the prefix are
not tiny then, and the copies of a prefix, one a row, not many times what they are for."""

PAIRED_TOKENS = 128
"""Longer items, up to this many tokens, share a row by twos: a short prefix has half as many copies then, each of which
attends to itself. Two cores score items of 95 tokens behind 64 places 6 % faster, 8 % with half of the neurons."""


def pass_overhead(platform: str) -> int:
    """Returns `BucketConfig.overhead_tokens` of a platform: "cpu", "gpu" or "tpu".

    On an H200 a pass of 1,920 tokens through 28 layers takes about 2 ms more than its share of a large one
    (docs/results/scoring.md): launches, and products too small for the device.
    """
    return 32 if platform == "cpu" else 1024


def make_bucket(tokens: int, prefix: int, item: int, shortest: int, vectors_per_item: int = 0) -> Bucket:
    """Returns a bucket of `tokens` places for items of up to `item` tokens.

    Args:
        shortest: length of the shortest items it should hold enough of to be full.
    """
    per_row = max(1, max(SLOT_TOKENS, prefix // 2) // item)
    if per_row == 1 and item <= PAIRED_TOKENS and prefix < LONG_PREFIX:
        per_row = 2
    slots = max(1, tokens // max(shortest, 1))
    return Bucket(
        tokens=tokens,
        rows=-(-slots // per_row),
        prefix_tokens=prefix,
        items_per_row=per_row,
        item_tokens=item,
        vectors_per_item=vectors_per_item,
    )


def default_buckets(platform: str) -> BucketConfig:
    """Returns shapes for any traffic: items up to 8192 tokens, prefixes up to 2048 (behind them items up to 1024).

    On a CPU passes of about a thousand tokens are fastest (their states stay in cache); a GPU wants many more.

    Args:
        platform: "cpu", "gpu" or "tpu".
    """
    sizes = (128, 256, 512, 1024) if platform == "cpu" else (512, 2048, 8192)
    buckets = []
    for shorter, item in pairwise((ITEM_EDGES[0] // 2, *ITEM_EDGES)):
        for prefix in PREFIX_EDGES:
            fitting = [size for size in sizes if size >= item + prefix] or [item + prefix]
            # Long prefixes and long items are rare: fewer sizes. Long items fill a larger pass better.
            if prefix > 1024:
                if item > 1024:
                    continue  # longer than a prompt makes rows by default: such a prefix joins the item
                fitting = [max(sizes[-1], prefix + LONG_PASS_ITEMS, prefix + item)]
            elif item > sizes[-1] // 4 or prefix == 1024:
                fitting = sorted({fitting[-1], max(fitting[-1], 2 * sizes[-1])})
            buckets += [make_bucket(size, prefix, item, shorter) for size in fitting]
    return BucketConfig(buckets=tuple(buckets), overhead_tokens=pass_overhead(platform))


FEW_PREFIX_TOKENS = (64, 128)
"""Prefixes of `few_buckets`: a sentence, and the longest that texts share; a longer one joins them."""


def few_buckets(platform: str, config: RankerConfig, compressor: CompressorConfig | None = None) -> BucketConfig:
    """Returns few shapes that hold any text of the prompt behind a short prefix, and for each k any vectors.

    There is little to compile, where programs serve one run. Usual rows are a sentence and an item as the prompt cuts
    it; they have several sizes, and others one, in which attention pads more.

    Args:
        platform: "cpu", "gpu" or "tpu".
    """
    prompt = config.prompt
    sentence, longest_prefix = FEW_PREFIX_TOKENS
    passes = (256, 1024) if platform == "cpu" else (512, 4096, 16384)
    usual, shortest = _usual_items(prompt)
    buckets = [make_bucket(size, sentence, usual, shortest) for size in _few_sizes(passes, sentence + usual)]
    longest = _few_sizes(passes, longest_prefix + prompt.max_tokens)[-1]
    buckets.append(make_bucket(longest, longest_prefix, prompt.max_tokens, prompt.max_tokens // 2))
    if compressor is not None:
        for k in compressor.ks:
            item = k + compressor.answer_tokens + compressor.max_text_tokens
            buckets += [make_bucket(size, sentence, item, item, k) for size in passes]
            # No prefix can join vectors: the longest that the prompt makes needs a shape too, and where it is not much
            # longer that one is enough.
            far = prompt.max_tokens > 2 * longest_prefix
            for prefix in (longest_prefix, prompt.max_tokens) if far else (max(longest_prefix, prompt.max_tokens),):
                buckets.append(make_bucket(max(passes[-1], prefix + item), prefix, item, item, k))
    return BucketConfig(buckets=tuple(dict.fromkeys(buckets)))


def _usual_items(prompt: PromptConfig) -> tuple[int, int]:
    """Returns how long usual items are at most, and what the short ones of them have.

    Of items that the prompt cuts most are as long as it lets them; more rows for short ones would only be padding in
    attention. The first edge above that length leaves room for a few words of the prompt.
    """
    longest = prompt.max_tokens
    edges = [edge for edge in ITEM_EDGES if (prompt.max_item_tokens or longest) < edge < longest]
    return (edges[0], 7 * edges[0] // 8) if edges else (longest, longest // 2)


def _few_sizes(passes: Sequence[int], row: int) -> Sequence[int]:
    """The passes that hold such a row, and one that just does where all that do are much larger."""
    fitting = [tokens for tokens in passes if tokens >= row]
    return fitting if fitting and fitting[0] < 1.5 * row else [row, *fitting]


def with_vectors(config: BucketConfig, platform: str, compressor: CompressorConfig, longest_row: int) -> BucketConfig:
    """Returns the configuration with shapes for items of embedding tokens, for each k of the compressor.

    Where it has such shapes already it stays as it is: they are a choice of some k.

    Args:
        platform: "cpu", "gpu" or "tpu".
        longest_row: the prompt's `max_tokens`: a prefix cannot join its items here, so one of any length needs a shape.
    """
    sizes = (128, 256, 512, 1024) if platform == "cpu" else (512, 2048, 8192)
    edges = [*(edge for edge in PREFIX_EDGES if edge < longest_row), longest_row]
    buckets = list(config.buckets)
    if any(bucket.vectors_per_item for bucket in buckets):
        return config
    for k in compressor.ks:
        shortest = k + compressor.answer_tokens
        item = shortest + compressor.max_text_tokens
        for prefix in edges:
            fitting = [size for size in sizes if size >= item + prefix] or [prefix + max(item, LONG_PASS_ITEMS)]
            buckets += [make_bucket(size, prefix, item, shortest, vectors_per_item=k) for size in fitting]
    return config.model_copy(update={"buckets": tuple(buckets)})


def fit_buckets(
    traffic: Sequence[Sequence[PackRequest]], count: int, max_tokens: int, overhead_tokens: int
) -> BucketConfig:
    """Returns `count` or fewer buckets that make this traffic cheap.

    Greedy: starts with one bucket that holds the longest prefix and item, then adds the candidate that lowers the cost
    of the sample most, until none lowers it by half a percent. Candidates have item lengths at the sample's quantiles
    and sizes that whole items fill.

    Args:
        traffic: a sample, a few dozen requests; each inner sequence is scored together.
        max_tokens: size of the largest forward pass, unless one item needs more.
        overhead_tokens: `pass_overhead` of the platform.
    """
    requests = [request for together in traffic for request in together]
    lengths = np.sort([len(item) for request in requests for item in request.item_ids])
    prefix = _rounded(max(1, *(len(request.prefix_ids) for request in requests)))
    vectors = requests[0].vectors_per_item
    edges = sorted({int(np.quantile(lengths, q, method="higher")) for q in np.linspace(0.1, 1.0, 10)})
    remaining = list(
        dict.fromkeys(
            make_bucket(tokens, prefix, item, shortest, vectors)
            for shorter, item in pairwise((int(lengths[0]), *edges))
            for shortest in (shorter, item)
            for tokens in _sizes(requests, item, max_tokens)
        )
    )
    chosen = [max(remaining, key=lambda bucket: (bucket.item_tokens, bucket.tokens))]
    best = _cost(traffic, chosen, overhead_tokens)
    while len(chosen) < count and remaining:
        costs = [_cost(traffic, [*chosen, candidate], overhead_tokens) for candidate in remaining]
        lowest = int(np.argmin(costs))
        if costs[lowest] > best * 0.995:
            break
        best = costs[lowest]
        chosen.append(remaining.pop(lowest))
    return BucketConfig(buckets=_used(traffic, chosen, overhead_tokens), overhead_tokens=overhead_tokens)


def with_longer(config: BucketConfig, longest_row: int, max_tokens: int) -> BucketConfig:
    """Returns the configuration with shapes for texts that are longer than the sample it was fitted to.

    Items get edges at twice, four times, ... the longest, up to a whole row; prefixes at four times, 16 times, ... A
    long prefix in front of a long item has no shape: it joins the item (`Packer`).

    Args:
        longest_row: the prompt's `max_tokens`. max_tokens: size of a forward pass, unless one row needs more.
    """
    longest = max(config.buckets, key=lambda bucket: bucket.item_tokens)
    item, prefix = longest.item_tokens, longest.prefix_tokens
    items = [
        make_bucket(max(max_tokens, min(prefix + edge, longest_row)), prefix, edge, shorter)
        for shorter, edge in pairwise(_steps(item, 2, longest_row))
    ]
    prefixes = [
        make_bucket(max(max_tokens, edge + LONG_PASS_ITEMS, edge + item), edge, item, item)
        for edge in _steps(prefix, 4, longest_row)[1:]
    ]
    return config.model_copy(update={"buckets": (*config.buckets, *items, *prefixes)})


def _steps(start: int, factor: int, end: int) -> list[int]:
    """start, start * factor, ... and `end` last; `start` alone if that is no less."""
    steps = [start]
    while steps[-1] < end:
        steps.append(min(steps[-1] * factor, end))
    return steps


def _cost(traffic: Sequence[Sequence[PackRequest]], buckets: Sequence[Bucket], overhead_tokens: int) -> float:
    packer = Packer(BucketConfig(buckets=tuple(buckets), overhead_tokens=overhead_tokens))
    return sum(packer.cost_tokens(together) for together in traffic)


def _used(
    traffic: Sequence[Sequence[PackRequest]], buckets: Sequence[Bucket], overhead_tokens: int
) -> tuple[Bucket, ...]:
    """The first bucket, which holds everything, and those others that the sample makes use of."""
    packer = Packer(BucketConfig(buckets=tuple(buckets), overhead_tokens=overhead_tokens))
    used = {forward.bucket for together in traffic for group in packer.pack(together) for forward in group}
    return tuple(bucket for number, bucket in enumerate(buckets) if number == 0 or bucket in used)


def _sizes(requests: Sequence[PackRequest], item: int, max_tokens: int) -> set[int]:
    """Sizes for ragged items (`max_tokens`, its half, ...) and for equal ones (whole items, parts of a request)."""
    prefix = max(len(request.prefix_ids) for request in requests)
    most = max(1, (max_tokens - prefix) // item)
    typical = int(np.median([len(request.item_ids) for request in requests]))
    parts = -(-typical // most)
    items = {max(1, most >> power) for power in range(5)} | {-(-typical // (parts + more)) for more in range(3)}
    items.add(max(1, typical % most))
    several = max_tokens // (prefix + item * typical)  # whole requests that share a pass
    sizes = {_rounded(prefix + item * number) for number in items} | {max_tokens >> power for power in range(4)}
    sizes.add(_rounded(several * (prefix + item * typical)))
    return {size for size in sizes if prefix + item <= size <= max(max_tokens, _rounded(prefix + item))}


def _rounded(tokens: int, to: int = 8) -> int:
    return -(-tokens // to) * to
