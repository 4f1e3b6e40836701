"""The prompt as token ids: prefix | query | item | suffix, built in code and never through a rendered template.

The order lets all items of a query share one prefix. Pieces are joined where every byte-level BPE in use splits
anyway (before a space, after a newline, at a special token), so the ids equal those of the whole text.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from jaxslm.config import PromptConfig
from jaxslm.data_files import Item
from jaxslm.errors import InputError


@dataclass(frozen=True)
class Template:
    """The fixed words of a prompt. `{instruction}` stands once in `prefix`; labels are single tokens.

    `after_query` and `after_item` are tokenised with what stands before them: some tokenizers join a newline to the
    punctuation in front of it.

    Attributes:
        gathers_query: `after_query` is a question, whose tokens have read the query and nothing else and are the same
            behind every query, so that what stands behind them finds them: in training their mean state is the query's.
    """

    prefix: str
    after_query: str
    after_item: str
    suffix: str
    yes: str
    no: str
    gathers_query: bool = False


TEMPLATES = {
    # Qwen/Qwen3-Reranker-0.6B's model card, byte for byte: fields are joined by one newline, the suffix ends in two.
    "qwen3-reranker": Template(
        prefix=(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct"
            ' provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            "<Instruct>: {instruction}\n<Query>:"
        ),
        after_query="\n<Document>:",
        after_item="",
        suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        yes="yes",
        no="no",
    ),
    # For models that were not trained as rerankers: plain text that a base model continues with " yes" or " no".
    "yes-no": Template(
        prefix="{instruction}\nQuery:",
        after_query="\nDocument:",
        after_item="\n",
        suffix="Does the document match the query, yes or no? Answer:",
        yes=" yes",
        no=" no",
    ),
    # For models trained from here on: every word that is repeated for each item costs, so there is hardly one; those
    # behind the query are read once for all items.
    "brief": Template(
        prefix="{instruction}\nQuery:",
        after_query="\nWhich document matches the query best?\nDocument:",
        after_item="\n",
        suffix="Match:",
        yes=" yes",
        no=" no",
        gathers_query=True,
    ),
}


_SAMPLES = (
    ("python developer", "Engineer (m/f).", "We pay 12 a day."),
    ("soup with tofu?", "豆腐", "味噌!"),
    ("12", "7", "(12)"),
)
"""A query, a title and a text of words, digits and punctuation, which tokenizers split in ways of their own."""


def text_tokenizer(tokenizer_json: str) -> Tokenizer:
    """Returns a tokenizer that never reads text from users as control tokens: "<|im_end|>" in a posting stays text.

    Raises:
        InputError: `tokenizer_json` is broken.
    """
    try:
        tree = json.loads(Tokenizer.from_str(tokenizer_json).to_str())
    except Exception as error:  # what `tokenizers` raises has no class of its own
        raise InputError(f"tokenizer.json: broken ({error})") from None
    # Some added tokens are not marked special but control all the same, as Qwen3's "<think>".
    added = [token | {"special": True} for token in tree["added_tokens"]]
    tokenizer = Tokenizer.from_str(json.dumps(tree | {"added_tokens": added, "padding": None, "truncation": None}))
    tokenizer.encode_special_tokens = True
    return tokenizer


@dataclass(frozen=True)
class EncodedRequest:
    """A query with its items as token ids.

    Attributes:
        prefix_ids: prompt prefix and query, shared by all items.
        item_ids: per item its text and the suffix; `prefix_ids + item_ids[j]` is the row of item j.
        truncated: per item whether its body was cut to keep the row within the prompt's `max_tokens`.
    """

    prefix_ids: list[int]
    item_ids: list[list[int]]
    truncated: list[bool]


class Prompt:
    """Builds rows of token ids for one tokenizer and one prompt configuration."""

    def __init__(self, tokenizer_json: str, config: PromptConfig) -> None:
        """Args: tokenizer_json: content of a `tokenizer.json`. Raises InputError if it is broken or splits a label."""
        self.config = config
        self.template = TEMPLATES[config.template]
        self._text_tokenizer = text_tokenizer(tokenizer_json)
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        no, yes = config.labels or (self.template.no, self.template.yes)
        self.label_token_ids = (self._label_id(no), self._label_id(yes))

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def prefix_ids(self) -> list[int]:
        """Ids of the words before the query."""
        return self._ids(self._tokenizer, [self.template.prefix.format(instruction=self.config.instruction)])[0]

    @cached_property
    def suffix_ids(self) -> list[int]:
        """Ids of the words after the item; the last one is where the answer is read."""
        return self._ids(self._tokenizer, [self.template.suffix])[0]

    @cached_property
    def item_prefix_ids(self) -> list[int]:
        """Ids in front of an item that is read without a query: the instruction stands in its place.

        Training puts an item behind any query, so its states expect the prompt's words there.
        """
        return self.encode_query(self.config.instruction)

    @cached_property
    def query_from(self) -> int:
        """Where in a request's prefix the tokens begin whose mean state is the query's; negative counts from its end.

        The query and what stands behind it, or only the latter in a template that `gathers_query`.
        """
        return -self._words_after_query if self.template.gathers_query else len(self.prefix_ids)

    @cached_property
    def _words_after_query(self) -> int:
        return len(self._ids(self._text_tokenizer, [self.template.after_query])[0])

    @cached_property
    def words_around(self) -> tuple[int, int]:
        """How many tokens the prompt's own words are around a query and around an item."""
        return len(self.prefix_ids) + self._words_after_query, len(self._after_item_ids) + len(self.suffix_ids)

    @cached_property
    def sha256(self) -> str:
        """Hash of everything in the prompt that can change a row: template words, settings and label ids."""
        # Left out where it is not set, so that prompts from before it keep their hash.
        unset = {"max_item_tokens"} if self.config.max_item_tokens is None else set()
        parts = (vars(self.template), self.config.model_dump(exclude=unset), self.label_token_ids)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def text_of_row(self, query: str, item: str) -> str:
        """Returns the whole text of a row, which nothing is cut from."""
        words = self.template
        prefix = words.prefix.format(instruction=self.config.instruction)
        return f"{prefix} {query}{words.after_query} {item}{words.after_item}{words.suffix}"

    def joins_as_one_text(self) -> bool:
        """Whether this tokenizer reads pieces of a few sample rows as it reads the rows' whole texts."""
        for query, title, text in _SAMPLES:
            (front,) = self._ids(self._text_tokenizer, [f" {title}\n"])
            (body,) = self._ids(self._text_tokenizer, [text], self.template.after_item)
            (whole,) = self._ids(self._tokenizer, [self.text_of_row(query, f"{title}\n{text}")])
            if [*self.encode_query(query), *front, *body, *self.suffix_ids] != whole:
                return False
        return True

    def encode(
        self,
        query: str,
        items: Sequence[str | Item],
        max_item_tokens: int | None = None,
        numbers: Sequence[int] | None = None,
    ) -> EncodedRequest:
        """Returns the rows of one request; does not depend on how items are grouped into requests.

        Args:
            query: the searcher's words. Never cut.
            items: texts, or items whose title stands in front of the text; a title alone counts as text. Only text is
                cut.
            max_item_tokens: the most tokens of an item, title and text, if fewer than the prompt's `max_item_tokens`
                and than the row has room for.
            numbers: what messages call the items, where they are some of a request's; 0, 1, .. if None.

        Raises:
            InputError: an empty query, no items, an item without text, or no room for an item's body; one text in place
                of a sequence, or something that is no text.
        """
        prefix_ids = self.encode_query(query)
        if isinstance(items, str | Item) or not isinstance(items, Iterable):
            raise InputError(f"items: must be a list of texts, is one {type(items).__name__}")
        items = list(items)
        if not items:
            raise InputError("items: a request needs at least one")
        numbers = range(len(items)) if numbers is None else numbers
        fronts, bodies = zip(*map(self._front_and_body, numbers, items), strict=True)
        front_ids = self._ids(self._text_tokenizer, fronts)
        body_ids = self._ids(self._text_tokenizer, bodies, self.template.after_item)
        after_item_ids = self._after_item_ids
        room = self.item_room(prefix_ids, self.config.max_tokens) + len(after_item_ids)
        limits = [limit for limit in (self.config.max_item_tokens, max_item_tokens) if limit is not None]
        room = min([room, *(limit + len(after_item_ids) for limit in limits)])
        room_if_cut = room - len(after_item_ids)
        if room_if_cut < 1:
            raise InputError(
                f"query: {len(prefix_ids) - len(self.prefix_ids)} tokens leave no room for an item in a row of"
                f" max_tokens = {self.config.max_tokens}"
            )
        item_ids, truncated = [], []
        for number, front, body in zip(numbers, front_ids, body_ids, strict=True):
            if len(front) >= room_if_cut:
                raise InputError(f"item {number}: title of {len(front)} tokens leaves no room for text ({room} in all)")
            cut = len(front) + len(body) > room
            ids = (front + body)[:room_if_cut] + after_item_ids if cut else front + body
            item_ids.append(ids + self.suffix_ids)
            truncated.append(cut)
        return EncodedRequest(prefix_ids, item_ids, truncated)

    def encode_query(self, query: str) -> list[int]:
        """Returns what all items of a query share: the prompt's prefix and the query, never cut.

        Raises:
            InputError: an empty query, or something that is no text.
        """
        if not isinstance(query, str):
            raise InputError(f"query: must be a text, is {type(query).__name__}")
        if not query.strip():
            raise InputError("query: must not be empty")
        return self.prefix_ids + self._ids(self._text_tokenizer, [" " + query.strip()], self.template.after_query)[0]

    def item_room(self, prefix_ids: Sequence[int], max_tokens: int) -> int:
        """Returns how many tokens of an item, title and text, a row of `max_tokens` has room for; it may be below 1."""
        return max_tokens - len(prefix_ids) - len(self._after_item_ids) - len(self.suffix_ids)

    @cached_property
    def _after_item_ids(self) -> list[int]:
        return self._ids(self._text_tokenizer, [self.template.after_item])[0]

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text as it stands in a prompt: behind a space, without any of the prompt's words."""
        return self._ids(self._text_tokenizer, [" " + text.strip() for text in texts])

    def raw_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of whole prompts that others built: control tokens are read as such, nothing is added but
        what the tokenizer itself puts around a text.

        Raises:
            InputError: a text with halves of surrogate pairs.
        """
        return self._ids(self._tokenizer, texts, add_special_tokens=True)

    def _front_and_body(self, number: int, item: str | Item) -> tuple[str, str]:
        if not isinstance(item, str | Item):
            raise InputError(f"item {number}: must be a text or an Item, is {type(item).__name__}")
        title, body = ("", item) if isinstance(item, str) else (item.title or "", item.text)
        title, body = title.strip(), body.strip()
        if not title and not body:
            raise InputError(f"item {number}: has no text")
        return (f" {title}\n", body) if title and body else ("", f" {title or body}")

    def _label_id(self, word: str) -> int:
        ids = self._ids(self._tokenizer, [word])[0]
        if len(ids) != 1:
            raise InputError(
                f"label {word!r}: must be one token of this tokenizer, is {len(ids)}; choose others (labels)"
            )
        return ids[0]

    @staticmethod
    def _ids(
        tokenizer: Tokenizer, texts: Sequence[str], after: str = "", *, add_special_tokens: bool = False
    ) -> list[list[int]]:
        try:
            encodings = tokenizer.encode_batch_fast(
                [text + after for text in texts], add_special_tokens=add_special_tokens
            )
        except TypeError as error:
            raise InputError("text: must be a string without halves of surrogate pairs") from error
        return [encoding.ids for encoding in encodings]
