"""Settings of the input pipeline: where lists and pairs come from, and the static shapes they fill."""

from typing import Annotated

from pydantic import Field, model_validator

from jaxslm.config import Positive, Settings

NonNegative = Annotated[int, Field(ge=0)]

MAY_CHANGE = frozenset({"items", "queries", "teacher_requests", "teacher_scores", "epochs", "workers"})
"""Settings of the data that a resumed run may change: what the files hold is compared instead of their paths."""


class SourceSettings(Settings):
    """Where training queries come from and in which order.

    Attributes:
        items: path of an items file (JSON Lines or Parquet), or `hf://owner/name/split`. Always held in memory.
        queries: path of a queries file, or `hf://owner/name/split`.
        seed: order of the queries and choice of items; with the epoch's number it fixes both.
        epochs: passes over the queries; without end if None. Hosts may differ by a batch or two per pass, so a run on
            several hosts counts steps and leaves this None.
        streaming: queries are read as they are needed instead of being held in memory; they are then shuffled only
            within windows of `shuffle_window` neighbours, and the whole file is counted once in advance.
        shuffle_window: queries per window; used by streaming alone.
        workers: processes that build lists ahead of the loop; 0 builds them in the loop's own thread. The batches do
            not depend on it. More than 0 needs `grain`; when streaming, every worker reads the whole file.
    """

    items: str
    queries: str
    seed: NonNegative = 0
    epochs: Positive | None = None
    streaming: bool = False
    shuffle_window: Positive = 4096
    workers: NonNegative = 0


class DataSettings(SourceSettings):
    """Lists for training a ranker. A list is one query with J items, packed several to a batch of M tokens.

    Attributes:
        items_per_list: J. Of these, `items_per_list - hard_negatives - random_negatives` are places for items with a
            label above 0; places left over go to hard, then to random negatives.
        hard_negatives: items with label 0, drawn from the judged ones and from BM25's best `hard_negative_pool`.
        random_negatives: items with label 0, drawn from all that some query judges.
        hard_negative_pool: length of the BM25 list; 0 draws from judged items only and needs no `bm25s`.
        lists_per_batch: R, the most lists in a batch.
        tokens_per_batch: M, tokens of a batch with padding; room for one list of the largest size. Padding is least
            when M is one or two per cent above R times the usual list; "padding_fraction" in the log tells.
        max_prefix_tokens: P, the prompt's words and the query. A longer query is an error, never cut.
        max_item_tokens: T, an item's text and the prompt's suffix. The text's end is cut to keep it.
        teacher_requests: the input of `jaxslm score` that made `teacher_scores`; its items need ids. `jaxslm
            teacher-requests` writes one for these settings.
        teacher_scores: the output of `jaxslm score`; adds "teacher" to the batches, found by query text and item id.
    """

    items_per_list: Annotated[int, Field(ge=8)] = 8
    hard_negatives: NonNegative = 3
    random_negatives: NonNegative = 1
    hard_negative_pool: NonNegative = 50
    lists_per_batch: Positive
    tokens_per_batch: Positive
    max_prefix_tokens: Positive
    max_item_tokens: Positive
    teacher_requests: str | None = None
    teacher_scores: str | None = None

    @model_validator(mode="after")
    def _shapes_hold_a_list(self) -> "DataSettings":
        if self.hard_negatives + self.random_negatives >= self.items_per_list:
            raise ValueError(
                f"hard_negatives {self.hard_negatives} and random_negatives {self.random_negatives}"
                f" leave no place for a relevant item in items_per_list {self.items_per_list}"
            )
        largest = self.max_prefix_tokens + self.items_per_list * self.max_item_tokens
        if self.tokens_per_batch < largest:
            raise ValueError(
                f"tokens_per_batch {self.tokens_per_batch} is less than the largest list: max_prefix_tokens +"
                f" items_per_list * max_item_tokens = {largest}"
            )
        if (self.teacher_requests is None) != (self.teacher_scores is None):
            raise ValueError("teacher_requests and teacher_scores belong together")
        return self


class PairSettings(SourceSettings):
    """Pairs of a query and one of its best items, for contrastive training.

    Attributes:
        pairs_per_batch: B, the most pairs in a batch; each pair's negatives are the items of the others.
        tokens_per_batch: M, tokens of a batch with padding; room for two pairs of the largest size.
        max_prefix_tokens: P, the prompt's words and the query. A longer query is an error, never cut.
        max_item_tokens: T, an item's text, whose end is cut to keep it.
    """

    pairs_per_batch: Annotated[int, Field(ge=2)]
    tokens_per_batch: Positive
    max_prefix_tokens: Positive
    max_item_tokens: Positive

    @model_validator(mode="after")
    def _shapes_hold_two_pairs(self) -> "PairSettings":
        if self.tokens_per_batch < 2 * (self.max_prefix_tokens + self.max_item_tokens):
            raise ValueError(
                f"tokens_per_batch {self.tokens_per_batch} is less than two of the largest pairs: twice"
                " max_prefix_tokens + max_item_tokens"
            )
        return self
