"""Where embedding tokens enter the ranker: they replace the first C tokens of an item.

    prefix and query | C embedding tokens | some of the item's text, if the compressor wants it | answer tokens

An item's positions go on where the prefix ends, in every slot, as those of its text would.
"""

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from jaxslm.config import CompressorConfig
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.prompt import Prompt

PLACEHOLDER = 0
"""The token id in the places of vectors: any id, its embedding is replaced."""


def splice(
    x_MD: Float[Array, "M D"], vectors_RJCD: Float[Array, "R J C D"], items_RJT: Int[Array, "R J T"]
) -> Float[Array, "M D"]:
    """Returns input embeddings in which each item's first C tokens are its vectors, cast to the dtype of x.

    Args:
        x_MD: embeddings of packed tokens, placeholders included. items_RJT: index of each item token, M where none.
    """
    return override(x_MD, vectors_RJCD, items_RJT[:, :, : vectors_RJCD.shape[2]])


def override(
    x_MD: Float[Array, "M D"], vectors_RJCD: Float[Array, "R J C D"], places_RJC: Int[Array, "R J C"]
) -> Float[Array, "M D"]:
    """Returns input embeddings with vectors, cast to the dtype of x, at these places; M leaves a vector out."""
    return x_MD.at[places_RJC].set(vectors_RJCD.astype(x_MD.dtype), mode="drop")


class MixedPrompt:
    """Builds the token ids around embedding tokens."""

    def __init__(self, prompt: Prompt, config: CompressorConfig) -> None:
        """Raises InputError if the prompt's suffix is shorter than the compressor's answer tokens."""
        if len(prompt.suffix_ids) < config.answer_tokens:
            raise InputError(
                f"answer_tokens {config.answer_tokens}: the prompt's suffix has only {len(prompt.suffix_ids)} tokens"
            )
        self._prompt, self._config = prompt, config
        self._answer = prompt.suffix_ids[-config.answer_tokens :]

    def longest_item(self, k: int) -> int:
        """Returns the most tokens of an item with k vectors, these included."""
        return k + self._config.max_text_tokens + len(self._answer)

    def encode(
        self, query: str, ks: Sequence[int], texts: Sequence[str] | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """Returns what all items of a query share, and `item_ids`.

        Raises:
            InputError: as `item_ids`; an empty query, or one so long that a row would pass the prompt's `max_tokens`.
        """
        prefix, items = self._prompt.encode_query(query), self.item_ids(ks, texts)
        max_tokens = self._prompt.config.max_tokens
        if len(prefix) + max(map(len, items)) > max_tokens:
            raise InputError(
                f"query: {len(prefix)} tokens with the prompt's words leave no room for an item in a row of"
                f" max_tokens = {max_tokens}"
            )
        return prefix, items

    def item_ids(self, ks: Sequence[int], texts: Sequence[str] | None = None) -> list[list[int]]:
        """Returns the tokens of items with so many vectors each: placeholders, text, answer tokens.

        Args:
            texts: `text_of` each item where the compressor has `text_fields`.

        Raises:
            InputError: texts are missing, or there are any and the compressor has no `text_fields`.
        """
        fields, most = self._config.text_fields, self._config.max_text_tokens
        if bool(fields) != (texts is not None) or (texts is not None and len(texts) != len(ks)):
            raise InputError(f"items' texts: this compressor reads {', '.join(fields) or 'none'} beside the vectors")
        parts = [ids[:most] for ids in self._prompt.text_ids(texts)] if texts else [[]] * len(ks)
        return [[PLACEHOLDER] * k + part + self._answer for k, part in zip(ks, parts, strict=True)]


def text_of(item: Item, fields: Sequence[str]) -> str:
    """Returns the fields of an item that stay text, those it has, in one line."""
    tree = item.model_dump()
    values = ((tree.get(field) or "").strip() for field in fields)
    return "; ".join(value for value in values if value)
