"""From ragged requests to a few static shapes, in plain numpy: no other shape ever reaches the compiled function.

A forward pass takes whole items of any requests, end to end in M token places, each request's prefix once in front of
its items. Items stand in a grid of R rows of J slots; the items of one row share one prefix, and a request takes as
many rows as it needs. So a bucket fits any mix of requests, and linear maps see padding only behind the last token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Int32

from jaxslm.config import Bucket, BucketConfig
from jaxslm.errors import InputError
from jaxslm.score.forward import MAX_LABEL_IDS, OVERRIDES, Forward, PackRequest, Vectors

TOKENS_PER_PAIR = 1 / 1500
"""What one attended (query, key) pair costs, as a share of a token in the linear maps: about 1/3000 for models of
0.1 to 0.6 B parameters, counted double because small products run at half the speed."""


def pair_tokens(bucket: Bucket) -> float:
    """Returns the cost of the bucket's attention in tokens of linear work: items over prefix and half of themselves."""
    slots = bucket.rows * bucket.items_per_row * bucket.item_tokens
    pairs = slots * (bucket.prefix_tokens + bucket.item_tokens / 2) + bucket.rows * bucket.prefix_tokens**2 / 2
    return pairs * TOKENS_PER_PAIR


class Packer:
    """Packs requests into the buckets of a configuration; keeps what it worked out about them."""

    def __init__(self, config: BucketConfig, vector_dtype: DTypeLike | None = None) -> None:
        """`vector_dtype`: of the vectors in passes; by default as they are given."""
        self.config, self._vector_dtype = config, vector_dtype
        self._cost = {bucket: bucket.tokens + pair_tokens(bucket) + config.overhead_tokens for bucket in config.buckets}
        self._item_edges = np.array(sorted({bucket.item_tokens for bucket in config.buckets}))
        self._prefix_edges = np.array(sorted({bucket.prefix_tokens for bucket in config.buckets}))
        self._candidates: dict[tuple[int, int, int, int], list[Bucket]] = {}

    @property
    def longest_item(self) -> int:
        """The most tokens that an item of text may have; 0 if all buckets are for vectors."""
        return max((bucket.item_tokens for bucket in self.config.buckets if _takes(bucket, 0, 0)), default=0)

    def pack(self, requests: Sequence[PackRequest], replicas: int = 1) -> Iterator[list[Forward]]:
        """Yields forward passes that together hold every item once, in groups of up to `replicas` of one bucket.

        Longest items first, so that each pass holds items of like length. A request that does not fit is split and its
        prefix repeated; small requests share.

        Raises:
            InputError: an item without tokens, or an item and its prefix that no bucket holds.
        """
        work = _Work.of([self._joined(request) for request in requests])
        classes = np.searchsorted(self._item_edges, work.lengths)
        order = np.lexsort((work.request_of_item, -classes))
        for bucket, counts in self._choices(work, order, replicas):
            group = []
            for count in counts:
                group.append(_fill(work, order[:count], bucket, self._vector_dtype))
                order = order[count:]
            yield group
        if len(order):
            number = int(work.request_of_item[order[0]])
            row = int(work.lengths[order[0]] + work.prefix_lengths[number])
            prefix = len(requests[number].prefix_ids)
            raise InputError(self._too_large(row - prefix, prefix, work.kind, work.vectors_per_item))

    def _joined(self, request: PackRequest) -> PackRequest:
        """The request as it is, or if no bucket holds prefix and items, with the one in each of the others: exact."""
        longest, length = max(map(len, request.item_ids), default=0), len(request.prefix_ids)
        places = request.vector_places
        first = request.vectors is not None and places is None
        if first or self._holding(longest, length, request.kind, request.vectors_per_item):
            return request
        return replace(
            request,
            prefix_ids=(),
            item_ids=[[*request.prefix_ids, *item] for item in request.item_ids],
            vector_places=None if places is None else np.where(places < 0, places, places + length),
        )

    def cost_tokens(self, requests: Sequence[PackRequest]) -> float:
        """Returns the cost of scoring these requests in tokens of linear work, padding and overhead included."""
        return sum(self._cost[forward.bucket] for group in self.pack(requests) for forward in group)

    def padding_fraction(self, requests: Sequence[PackRequest]) -> float:
        """Returns the share of token places that hold no token when these requests are packed together."""
        forwards = [forward for group in self.pack(requests) for forward in group]
        real = sum(forward.real_tokens for forward in forwards)
        return 1.0 - real / sum(forward.bucket.tokens for forward in forwards)

    def _choices(
        self, work: "_Work", order: Int[np.ndarray, " n"], replicas: int
    ) -> Iterator[tuple[Bucket, list[int]]]:
        """Yields the buckets that take these items in turn, and how many of them go into each copy, as far as they fit.

        At each step it is that with the most item tokens per cost, until a single one holds all that is left: then the
        cheapest of going on so to the end and of stopping with such a one, now or after any step.
        """
        steps: list[_Option] = []
        ending: list[_Option] = []
        while len(order):
            options = self._options(work, order, replicas)
            if not options:
                break
            last = min((each for each in options if each.items == len(order)), key=lambda each: each.cost, default=None)
            if last and (not ending or _cost_of([*steps, last]) <= _cost_of(ending)):
                ending = [*steps, last]
            fullest = max(options, key=lambda option: option.tokens / option.cost)
            order = order[fullest.items :]
            if ending:
                steps.append(fullest)
            else:
                yield fullest.bucket, fullest.counts
        for option in ending:
            yield option.bucket, option.counts

    def _options(self, work: "_Work", order: Int[np.ndarray, " left"], replicas: int) -> list["_Option"]:
        """Returns for each bucket that holds the first item how many each of up to `replicas` copies would take."""
        length, prefix = int(work.lengths[order[0]]), int(work.prefix_lengths[work.request_of_item[order[0]]])
        options = []
        windows = {0: _Window.of(work, order)}
        for bucket in self._holding(length, prefix, work.kind, work.vectors_per_item):
            counts: list[int] = []
            start = 0
            while len(counts) < replicas and start < len(order):
                if start not in windows:
                    windows[start] = _Window.of(work, order[start:])
                count = windows[start].fitting(bucket)
                if count == 0:
                    break
                counts.append(count)
                start += count
            if counts:
                tokens = int(work.lengths[order[:start]].sum())
                options.append(_Option(bucket, self._cost[bucket], counts, start, tokens))
        return options

    def _too_large(self, length: int, prefix: int, kind: int, vectors: int) -> str:
        """Says what no bucket holds, and what the buckets of its kind do."""
        like = [bucket for bucket in self.config.buckets if _takes(bucket, kind, vectors)]
        what = {0: "", OVERRIDES: f" with {vectors} overrides"}.get(kind, f" with {vectors} vectors")
        rooms = [min(each.item_tokens, each.tokens - prefix) for each in like if each.prefix_tokens >= prefix]
        if rooms:
            most = f"an item{what} after such a prefix may have {max(rooms)} tokens"
        elif like and kind in (0, OVERRIDES):
            longest = max(bucket.item_tokens for bucket in like)
            most = f"such a prefix counts as part of each item, which may have {longest} tokens"
        else:
            most = "none has such a prefix"
        return f"item of {length} tokens{what} after a prefix of {prefix}: no bucket holds it" + (
            f" ({most})" if like else f" (none is for items{what})"
        )

    def _holding(self, length: int, prefix: int, kind: int, vectors: int) -> list[Bucket]:
        """The buckets for items and prefixes of this class, without those of needlessly long items."""
        item_class = int(np.searchsorted(self._item_edges, length))
        prefix_class = int(np.searchsorted(self._prefix_edges, prefix))
        key = item_class, prefix_class, kind, vectors
        if key not in self._candidates:
            if item_class == len(self._item_edges) or prefix_class == len(self._prefix_edges):
                return []
            item, prefix = int(self._item_edges[item_class]), int(self._prefix_edges[prefix_class])
            large_enough = [
                bucket
                for bucket in self.config.buckets
                if bucket.item_tokens >= item and bucket.prefix_tokens >= prefix
                if _takes(bucket, kind, vectors)
            ]
            shortest = min((bucket.item_tokens for bucket in large_enough), default=0)
            self._candidates[key] = [bucket for bucket in large_enough if bucket.item_tokens <= 2 * shortest]
        return self._candidates[key]


@dataclass(frozen=True)
class _Option:
    """One way to go on: a bucket, what it costs, how many items each copy of it takes, and all with how many tokens."""

    bucket: Bucket
    cost: float
    counts: list[int]
    items: int
    tokens: int


def _cost_of(options: Sequence[_Option]) -> float:
    return sum(option.cost for option in options)


def _takes(bucket: Bucket, kind: int, vectors: int) -> bool:
    """Whether a bucket is for items of this kind with so many vectors."""
    if kind == OVERRIDES:
        return bucket.overrides_per_item >= max(vectors, 1)
    return bucket.vectors_per_item == vectors and not bucket.overrides_per_item


@dataclass(frozen=True)
class _Work:
    """All requests as arrays. `pool` holds every prefix and every item end to end."""

    pool: Int32[np.ndarray, " all"]
    prefix_lengths: Int[np.ndarray, " requests"]
    prefix_starts: Int[np.ndarray, " requests"]
    lengths: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " n"]
    request_of_item: Int[np.ndarray, " n"]
    kind: int
    first_items: Int[np.ndarray, " requests"]
    vectors: list[Vectors] | None
    vector_places: Int[np.ndarray, "n C"] | None
    label_ids: Int32[np.ndarray, "n L"] | None

    @property
    def vectors_per_item(self) -> int:
        return max((len(vectors[0]) for vectors in self.vectors or ()), default=0)

    @classmethod
    def of(cls, requests: Sequence[PackRequest]) -> "_Work":
        prefixes = [request.prefix_ids for request in requests]
        items = list(chain.from_iterable(request.item_ids for request in requests))
        prefix_lengths = np.fromiter(map(len, prefixes), np.int64, len(prefixes))
        lengths = np.fromiter(map(len, items), np.int64, len(items))
        if (lengths == 0).any():
            raise InputError(f"item {int(np.argmin(lengths))}: has no tokens")
        ends = np.cumsum(np.concatenate([prefix_lengths, lengths]))
        pool = np.fromiter(chain.from_iterable(chain(prefixes, items)), np.int32, int(ends[-1]) if len(ends) else 0)
        starts = ends - np.concatenate([prefix_lengths, lengths])
        counts = np.fromiter((len(request.item_ids) for request in requests), np.int64, len(requests))
        kinds = {request.kind for request in requests} or {0}
        if len(kinds) > 1:
            raise InputError("requests: all or none must have vectors, equally many or all with places")
        return cls(
            pool,
            prefix_lengths,
            starts[: len(prefixes)],
            lengths,
            starts[len(prefixes) :],
            np.repeat(np.arange(len(requests)), counts),
            kinds.pop(),
            np.cumsum(counts) - counts,
            [request.vectors for request in requests if request.vectors is not None] or None,
            _vector_places(requests),
            _label_ids(requests, counts),
        )


def _vector_places(requests: Sequence[PackRequest]) -> Int[np.ndarray, "n C"] | None:
    """Returns where the vectors of all items stand, if they may stand anywhere; -1 fills up those of fewer."""
    places = [request.vector_places for request in requests if request.vector_places is not None]
    if not places:
        return None
    C = max(each.shape[1] for each in places)
    return np.concatenate([np.pad(each, ((0, 0), (0, C - each.shape[1])), constant_values=-1) for each in places])


def _label_ids(
    requests: Sequence[PackRequest], counts: Int[np.ndarray, " requests"]
) -> Int32[np.ndarray, "n L"] | None:
    """Returns what each item asks for, as `Forward.label_ids`."""
    if not any(request.label_ids for request in requests):
        return None
    rows = np.full((len(requests), MAX_LABEL_IDS), -1, np.int32)
    for row, request in zip(rows, requests, strict=True):
        if request.label_ids:
            row[:] = request.label_ids[-1]
            row[: len(request.label_ids)] = request.label_ids
    return rows.repeat(counts, axis=0)


@dataclass(frozen=True)
class _Runs:
    """Consecutive items of one request. `first`: [n], True where one begins; `place`: [n], number within the run."""

    first: Bool[np.ndarray, " n"]
    place: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, request: Int[np.ndarray, " n"]) -> "_Runs":
        first = np.empty(len(request), bool)
        first[0] = True
        np.not_equal(request[1:], request[:-1], out=first[1:])
        numbers = np.arange(len(request))
        return cls(first, numbers - np.maximum.accumulate(np.where(first, numbers, 0)))


WINDOW = 16384
"""A forward pass holds at most this many items."""


@dataclass(frozen=True)
class _Window:
    """The next items, with what a pass that takes the first n of them needs: running totals, [n] each.

    Attributes:
        tokens: item and prefix tokens. prefixes: the longest prefix. runs: whose items follow one another.
        rows: by items per row, grid rows; filled when asked for.
    """

    tokens: Int[np.ndarray, " n"]
    prefixes: Int[np.ndarray, " n"]
    runs: _Runs
    rows: dict[int, Int[np.ndarray, " n"]]

    @classmethod
    def of(cls, work: _Work, order: Int[np.ndarray, " left"]) -> "_Window":
        order = order[:WINDOW]
        request = work.request_of_item[order]
        runs, prefixes = _Runs.of(request), work.prefix_lengths[request]
        tokens = np.cumsum(work.lengths[order] + prefixes * runs.first)
        return cls(tokens, np.maximum.accumulate(prefixes), runs, {})

    def fitting(self, bucket: Bucket) -> int:
        """Returns how many of the items the bucket holds; it must be one of their class (items only get shorter)."""
        J = bucket.items_per_row
        if J not in self.rows:
            self.rows[J] = np.cumsum(self.runs.place % J == 0)
        limits = (self.tokens, bucket.tokens), (self.rows[J], bucket.rows), (self.prefixes, bucket.prefix_tokens)
        return min(int(values.searchsorted(limit, side="right")) for values, limit in limits)


def _fill(work: _Work, indices: Int[np.ndarray, " held"], bucket: Bucket, vector_dtype: DTypeLike | None) -> Forward:
    """Returns the forward pass of these items: each run's prefix and then its items, end to end."""
    M, R, P = bucket.tokens, bucket.rows, bucket.prefix_tokens
    J, T = bucket.items_per_row, bucket.item_tokens
    lengths, request = work.lengths[indices], work.request_of_item[indices]
    runs = _Runs.of(request)
    # Two segments per item, its run's prefix (empty but for the first of a run) and itself, in the order they are laid.
    segments = np.stack([work.prefix_lengths[request] * runs.first, lengths], axis=1).reshape(-1)
    sources = np.stack([work.prefix_starts[request], work.starts[indices]], axis=1).reshape(-1)
    ends = np.cumsum(segments)
    begins, total = ends - segments, int(ends[-1])
    tokens = np.zeros(M, np.int32)
    tokens[:total] = work.pool[np.repeat(sources - begins, segments) + np.arange(total)]

    begins_row = runs.place % J == 0
    row = np.cumsum(begins_row) - 1
    run_starts = begins[::2][runs.first][np.cumsum(runs.first) - 1]
    places = row * J + runs.place % J
    prefix = np.full((R, P), M, np.int32)
    prefix[: int(row[-1]) + 1] = _indices(
        run_starts[begins_row], work.prefix_lengths[request[begins_row]], P, otherwise=M
    )
    items = np.full((R * J, T), M, np.int32)
    items[places] = _indices(begins[1::2], lengths, T, otherwise=M)
    vectors = vector_places = None
    if work.vectors is not None:
        numbers = indices - work.first_items[request]
        vectors = _vectors_at(work.vectors, numbers, request, places, bucket, vector_dtype)
    if work.vector_places is not None:
        own = work.vector_places[indices]
        vector_places = np.full((R, J, bucket.vector_places), M, np.int32)
        vector_places.reshape(R * J, bucket.vector_places)[places, : own.shape[1]] = np.where(
            own < 0, M, begins[1::2][:, None] + own
        )
    label_ids = None if work.label_ids is None else work.label_ids[indices]
    grid = items.reshape(R, J, T)
    return Forward(bucket, tokens, prefix, grid, vectors, places, indices, total, label_ids, vector_places)


def _vectors_at(
    vectors: Sequence[Vectors],
    numbers: Int[np.ndarray, " held"],
    request: Int[np.ndarray, " held"],
    places: Int[np.ndarray, " held"],
    bucket: Bucket,
    dtype: DTypeLike | None,
) -> Float[np.ndarray, "R J _ D"]:
    """Returns each item's vectors at its place. A pass of them has megabytes: they are copied, and converted, once.

    Args:
        vectors: of the items of each request. numbers: each item's among those of its request. places: one after
            another within a run.
    """
    R, J, C, D = bucket.rows, bucket.items_per_row, bucket.vector_places, vectors[0][0].shape[1]
    at = np.zeros((R * J, C, D), dtype or np.result_type(*(each[0].dtype for each in vectors)))
    begins = np.flatnonzero((np.diff(numbers, prepend=-2) != 1) | (np.diff(request, prepend=-1) != 0))
    for begin, end in zip(begins, [*begins[1:], len(numbers)], strict=True):
        source = vectors[request[begin]][numbers[begin] : numbers[begin] + end - begin]
        out = at[places[begin] : places[begin] + end - begin, : len(source[0])]
        np.stack(source, out=out, casting="unsafe")
    return at.reshape(R, J, C, D)


def _indices(starts: np.ndarray, lengths: np.ndarray, width: int, *, otherwise: int) -> np.ndarray:
    """Returns [n, width]: starts, starts + 1, ... for `lengths` entries, then `otherwise`."""
    offsets = np.arange(width)
    return np.where(offsets < lengths[:, None], starts[:, None] + offsets, otherwise)
