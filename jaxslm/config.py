"""All settings, as frozen, strict pydantic models. Imports no jax, so that `jaxslm --help` is instant."""

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jaxslm.errors import InputError

if TYPE_CHECKING:
    import numpy as np

NonEmpty = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
Family = Literal["llama", "qwen3"]
TemplateName = Literal["qwen3-reranker", "yes-no", "brief"]
ComputeDtype = Literal["float32", "bfloat16"]


class Settings(BaseModel):
    """Base of all settings: unknown fields, wrong types and later changes are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RopeScaling(Settings):
    """Llama 3's frequency scaling: long wavelengths are divided by `factor`, short ones kept, those between blended."""

    factor: Annotated[float, Field(ge=1)]
    low_freq_factor: Annotated[float, Field(gt=0)]
    high_freq_factor: Annotated[float, Field(gt=0)]
    original_max_positions: Positive


class ModelConfig(Settings):
    """Shape of a decoder. `mlp_width` and `num_kv_heads` are one number for all layers, or one per layer.

    Attributes:
        family: "qwen3" normalises queries and keys per head; "llama" does not.
        width: D. head_dim: H. num_kv_heads: K, of each layer. queries_per_kv: G; a layer has N = K * G query heads.
        mlp_width: F, of each layer. max_positions: the longest row that the weights were trained for, in tokens.
        tie_embeddings: whether the vocabulary head is the embedding table.
    """

    family: Family
    vocab_size: Positive
    width: Positive
    num_layers: Positive
    num_kv_heads: Positive | Annotated[tuple[Positive, ...], Field(strict=False)]
    queries_per_kv: Positive
    head_dim: Annotated[int, Field(gt=0, multiple_of=2)]
    mlp_width: Positive | Annotated[tuple[Positive, ...], Field(strict=False)]
    max_positions: Positive
    tie_embeddings: bool
    rope_theta: Annotated[float, Field(gt=0)]
    rope_scaling: RopeScaling | None = None
    norm_eps: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _one_width_per_layer(self) -> "ModelConfig":
        for name, value in (("num_kv_heads", self.num_kv_heads), ("mlp_width", self.mlp_width)):
            if isinstance(value, tuple) and len(value) != self.num_layers:
                raise ValueError(f"{name} lists {len(value)} layers, num_layers is {self.num_layers}")
        return self

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are RMS-normalised per head before RoPE."""
        return self.family == "qwen3"

    @property
    def kv_heads_by_layer(self) -> tuple[int, ...]:
        """K of each layer, length L."""
        return self.num_kv_heads if isinstance(self.num_kv_heads, tuple) else (self.num_kv_heads,) * self.num_layers

    @property
    def mlp_width_by_layer(self) -> tuple[int, ...]:
        """F of each layer, length L."""
        return self.mlp_width if isinstance(self.mlp_width, tuple) else (self.mlp_width,) * self.num_layers


DEFAULT_MAX_TOKENS = 2048


class PromptConfig(Settings):
    """Which prompt a ranker reads. The template's own words live in `jaxslm.prompt`.

    Attributes:
        template: "qwen3-reranker" (the published prompt of Qwen3-Reranker) or "yes-no" (a plain question) or
            "brief" (hardly a word per item and a question behind the query, for models that are trained to read it).
        instruction: what relevance means here, in a sentence.
        max_tokens: longest row in tokens, at most the model's `max_positions`; only the item's body is cut to keep it.
        max_item_tokens: most tokens of an item, title and text, however much room its row has: what a ranker is trained
            on is then what it reads behind queries of any length. No limit but the row's if None.
        labels: the words for (no, yes), each one token of the tokenizer; the template's own if None.
    """

    template: TemplateName
    instruction: NonEmpty = "Given a web search query, retrieve relevant passages that answer the query"
    max_tokens: Annotated[int, Field(ge=32)] = DEFAULT_MAX_TOKENS
    max_item_tokens: Positive | None = None
    labels: Annotated[tuple[NonEmpty, NonEmpty], Field(strict=False)] | None = None


class RankerConfig(Settings):
    """What a ranker is, beside its weights and tokenizer: enough to compile its scoring function.

    Attributes:
        label_token_ids: ids of (no, yes) in the vocabulary; P(yes) = sigmoid(z_yes - z_no).
    """

    model: ModelConfig
    prompt: PromptConfig
    label_token_ids: Annotated[tuple[int, int], Field(strict=False)]

    @model_validator(mode="after")
    def _labels_are_two_rows_of_the_vocabulary(self) -> "RankerConfig":
        no, yes = self.label_token_ids
        if no == yes or not all(0 <= label < self.model.vocab_size for label in (no, yes)):
            raise ValueError(f"label_token_ids {self.label_token_ids} must be two ids below {self.model.vocab_size}")
        return self

    @model_validator(mode="after")
    def _rows_are_no_longer_than_the_model_was_trained_for(self) -> "RankerConfig":
        if self.prompt.max_tokens > self.model.max_positions:
            raise ValueError(
                f"prompt.max_tokens {self.prompt.max_tokens}: the model was trained for rows of at most"
                f" {self.model.max_positions} tokens (max_positions)"
            )
        return self


Pooling = Literal["mean", "last"]


class CompressorConfig(Settings):
    """What a compressor is, beside its weights: enough to encode an item, and to place its vectors in a prompt.

    Attributes:
        encoder: shape of the decoder that reads items. width: D of the vectors, the ranker's.
        ks: how many vectors an item may become.
        pooling: "mean" of equal contiguous segments of an item's states, or its "last" states.
        max_item_tokens: how much of an item is read; the rest is cut.
        prefix_ids: tokens that stand in front of every item; its vectors are not of their states.
        answer_tokens: how many of the prompt's last tokens stand behind an item's vectors.
        text_fields: fields of an item that the ranker reads as text behind the vectors, the title or a place for
            example. max_text_tokens: the most tokens of them; 0 if there are none.
        tokenizer_sha256: of the encoder's tokenizer; it may be another than the ranker's.
    """

    encoder: ModelConfig
    width: Positive
    ks: Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)]
    pooling: Pooling
    max_item_tokens: Positive
    prefix_ids: Annotated[tuple[int, ...], Field(strict=False)] = ()
    answer_tokens: Positive
    text_fields: Annotated[tuple[NonEmpty, ...], Field(strict=False)] = ()
    max_text_tokens: Annotated[int, Field(ge=0)] = 0
    tokenizer_sha256: str


class Calibration(Settings):
    """P(yes) = sigmoid(scale * z + bias), z = z_yes - z_no. The scale is positive, so the order of items never changes.

    (Logits of a magnitude above about 36 share the probability 1.0 in float64: rank by logits, not by probabilities.)

    Attributes:
        method: how `jaxslm.evaluate.calibration` fitted it; "none" changes nothing.
    """

    method: Literal["none", "temperature", "platt"] = "none"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    bias: Annotated[float, Field(allow_inf_nan=False)] = 0.0

    def log_odds(self, logits: "np.ndarray") -> "np.ndarray":
        """Returns scale * z + bias, float64, same shape."""
        return self.scale * logits.astype("float64") + self.bias

    def apply(self, logits: "np.ndarray") -> "np.ndarray":
        """Returns probabilities in [0, 1], float64, same shape."""
        import numpy as np

        log_odds = self.log_odds(logits)
        small = np.exp(-np.abs(log_odds))
        return np.where(log_odds >= 0, 1, small) / (1 + small)


class Bucket(Settings):
    """One static shape of a scoring forward pass (`jaxslm.model.layout.SharedPrefix`).

    Attributes:
        tokens: M, the flat token places. rows: R, each with room for one prefix and `items_per_row` items.
        prefix_tokens: P. items_per_row: J. item_tokens: T.
        vectors_per_item: C, how many of an item's first tokens are embedding vectors instead of ids.
        overrides_per_item: up to so many of an item's tokens are vectors, wherever they stand; excludes the other.
    """

    tokens: Positive
    rows: Positive
    prefix_tokens: Positive
    items_per_row: Positive
    item_tokens: Positive
    vectors_per_item: Annotated[int, Field(ge=0)] = 0
    overrides_per_item: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_kind_of_vectors(self) -> "Bucket":
        if self.vectors_per_item and self.overrides_per_item:
            raise ValueError("vectors_per_item, overrides_per_item: one of them must be 0")
        return self

    @property
    def vector_places(self) -> int:
        """The most vectors that an item may have, of either kind."""
        return self.vectors_per_item or self.overrides_per_item


class BucketConfig(Settings):
    """The shapes that scoring compiles: no other reaches a device. `jaxslm bench fit-buckets` fits them to traffic.

    Attributes:
        buckets: in any order.
        overhead_tokens: what a forward pass costs beside its tokens (weights read, launches), as so many tokens.
    """

    buckets: Annotated[tuple[Bucket, ...], Field(min_length=1, strict=False)]
    overhead_tokens: Annotated[int, Field(ge=0)] = 32


SettingsT = TypeVar("SettingsT", bound=Settings)


def load_toml(path: Path | None, kind: type[SettingsT], overrides: tuple[str, ...] = ()) -> SettingsT:
    """Returns the settings of a TOML file after `a.b=value` overrides; a value is read as TOML, else as a string.

    Args:
        path: None: the overrides are all there is.

    Raises:
        InputError: no such file, broken TOML, an unknown field or a value against its rule.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: invalid UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: broken TOML ({error})") from None
    for override in overrides:
        _apply_override(tree, override)
    return validate(kind, tree, "settings" if path is None else str(path))


def validate(kind: type[SettingsT], tree: Any, where: str) -> SettingsT:
    """Returns `tree` as settings of `kind`; raises InputError with `where`, the field and the rule."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in problem["loc"]) or kind.__name__
        raise InputError(f"{where}: {field}: {problem['msg'].removeprefix('Value error, ')}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise InputError(f"setting {override}: must be a.b=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise InputError(f"setting {override}: {key} is a value, not a table")
    tree[keys[-1]] = value
