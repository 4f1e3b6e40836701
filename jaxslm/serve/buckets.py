"""The shapes that a server compiles before it is ready: fewer than batch scoring has by default, so that it soon is."""

from itertools import pairwise

from jaxslm.config import BucketConfig, CompressorConfig, RankerConfig
from jaxslm.score.buckets import make_bucket

ITEM_EDGES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
PREFIX_EDGES = (128, 1024)
PASS_TOKENS = {"cpu": (256, 1024), "gpu": (1024, 8192), "tpu": (1024, 8192)}
"""Sizes of a forward pass by platform."""


def serving_buckets(config: RankerConfig, platform: str, compressor: CompressorConfig | None) -> BucketConfig:
    """Returns shapes for every row that the ranker's prompt can make, and for items of the compressor's vectors.

    Args:
        platform: "cpu", "gpu" or "tpu".
    """
    sizes = PASS_TOKENS[platform]
    longest = config.prompt.max_tokens
    shapes = [(item, shorter, 0) for shorter, item in pairwise((ITEM_EDGES[0] // 2, *ITEM_EDGES)) if shorter < longest]
    if compressor is not None:
        behind = compressor.answer_tokens + compressor.max_text_tokens
        shapes += [(k + behind, k + compressor.answer_tokens, k) for k in compressor.ks]
    buckets = []
    for item, shortest, k in shapes:
        for prefix in PREFIX_EDGES:
            fitting = [size for size in sizes if size >= item + prefix] or [item + prefix]
            buckets += [make_bucket(size, prefix, item, shortest, k) for size in fitting]
    return BucketConfig(buckets=tuple(buckets), overhead_tokens=32 if platform == "cpu" else 512)
