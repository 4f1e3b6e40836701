"""The shapes that a server compiles before it is ready: fewer than batch scoring has by default, so that it soon is."""

from itertools import pairwise

from jaxslm.config import BucketConfig, CompressorConfig, RankerConfig
from jaxslm.score.buckets import make_bucket, pass_overhead

ITEM_EDGES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
PREFIX_EDGES = (128, 1024)
PASS_TOKENS = {"cpu": (256, 1024), "gpu": (1024, 8192), "tpu": (1024, 8192)}
"""Sizes of a forward pass by platform."""
OVERRIDES_PER_ITEM = 32
"""Embeddings that clients send in place of tokens, anywhere in query and item: for few bodies, so for few shapes."""
OVERRIDE_ITEM = 128


def serving_buckets(config: RankerConfig, platform: str, compressor: CompressorConfig | None) -> BucketConfig:
    """Returns shapes for every row that the ranker's prompt can make, with overrides too, and for compressed items.

    Args:
        platform: "cpu", "gpu" or "tpu".
    """
    sizes = PASS_TOKENS[platform]
    longest = config.prompt.max_tokens
    items = (*ITEM_EDGES, longest) if longest > ITEM_EDGES[-1] else ITEM_EDGES
    shapes = [(item, shorter, 0) for shorter, item in pairwise((ITEM_EDGES[0] // 2, *items)) if shorter < longest]
    if compressor is not None:
        behind = compressor.answer_tokens + compressor.max_text_tokens
        shapes += [(k + behind, k + compressor.answer_tokens, k) for k in compressor.ks]
    buckets = []
    for item, shortest, k in shapes:
        # A long query joins its items where they are text; where they are vectors it needs a shape.
        edges = (*PREFIX_EDGES, longest) if k and longest > PREFIX_EDGES[-1] else PREFIX_EDGES
        for prefix in edges:
            fitting = [size for size in sizes if size >= item + prefix] or [item + prefix]
            buckets += [make_bucket(size, prefix, item, shortest, k) for size in fitting]
    most = max(item for item, _, _ in shapes)
    overridden = {OVERRIDE_ITEM: sizes[0], most: sizes[-1]} if most > OVERRIDE_ITEM else {most: sizes[0]}
    for item, size in overridden.items():
        bucket = make_bucket(max(size, PREFIX_EDGES[-1] + item), PREFIX_EDGES[-1], item, item // 4)
        buckets.append(bucket.model_copy(update={"overrides_per_item": OVERRIDES_PER_ITEM}))
    return BucketConfig(buckets=tuple(buckets), overhead_tokens=pass_overhead(platform))
