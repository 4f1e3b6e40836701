"""Bodies of requests and answers. Fields that score nothing but that known clients send are accepted and named."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jaxslm.data_files import NonEmpty
from jaxslm.score.forward import MAX_LABEL_IDS

OnMiss = Literal["fail", "text", "skip"]
ItemStatus = Literal["text", "embedding", "not_found", "stale", "corrupt"]


# Rules that the server tells in its own words are only in the schema's text (`json_schema_extra`).
Size = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(json_schema_extra={"pattern": r"\S"})]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Rows = Annotated[list[Tokens], Field(fail_fast=True)]
Vector = Annotated[list[float], Field(fail_fast=True)]
Vectors = Annotated[list[Vector], Field(fail_fast=True)]
Nothing = Annotated[dict[str, Any], Field(max_length=0)] | None


class Body(BaseModel):
    """Base of request bodies: unknown fields, wrong types, NaN and Infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class EmbeddingArray(Body):
    """An array as base64 of its little-endian bytes, rows after one another."""

    data: str = Field(description="base64 of the bytes, C order")
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: Annotated[tuple[Size, Size, Size], Field(strict=False)] = Field(
        description="[items, vectors per item, width of the ranker]"
    )


ANY_ITEMS: list[Any] = [
    {"required": [name], "properties": {name: {"type": kinds}}}
    for name, kinds in (("items", ["string", "array"]), ("item_ids", "array"), ("item_embeddings", "object"))
]


class ScoreRequest(Body):
    """Scores items against a query. SGLang's body, and more: item ids, embeddings as base64, titles.

    Text is put into the ranker's own prompt. A body with `label_token_ids`, as SGLang's clients send it, brings its own
    prompt: its text is scored as it stands, query and item end to end. Token ids always are.
    """

    model_config = ConfigDict(json_schema_extra={"anyOf": ANY_ITEMS})
    query: str | Tokens = Field(description="text, or token ids if the items are token ids")
    items: str | Texts | Rows | None = Field(None, description="texts, or rows of token ids")
    label_token_ids: Tokens | None = Field(
        None,
        description="labels of `scores`: any tokens; the ranker's no and yes if null",
        json_schema_extra={"minItems": 1, "maxItems": MAX_LABEL_IDS},
    )
    apply_softmax: bool = Field(
        False,
        description="with `label_token_ids`: true: probabilities among these labels; false: among the whole vocabulary",
    )
    item_first: bool = Field(False, description="item before query; only for token ids and own prompts")
    embed_override_token_id: TokenId | None = Field(None, description="token whose places the overrides fill")
    query_embed_overrides: Vectors | None = None
    item_embed_overrides: Annotated[list[Vectors | None], Field(fail_fast=True)] | None = None
    return_pooled_hidden_states: bool = Field(False, description="true is refused: nothing is pooled")
    model: str | None = None
    item_ids: Annotated[list[str | None], Field(fail_fast=True)] | None = Field(
        None, description="look these up in the item store; null: use the text of `items`"
    )
    item_embeddings: EmbeddingArray | None = None
    on_miss: OnMiss = Field(
        "fail",
        description="an id without usable vectors: refuse (404), score its text in `items` (not where the compressor"
        " reads that beside vectors), or leave it out",
    )
    max_tokens_per_item: Annotated[int, Field(gt=0)] | None = None


class ScoreUsage(BaseModel):
    """Tokens that were scored; the query's once. Items from the score cache count as if scored."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None
    reasoning_tokens: int = 0


class ScoreResponse(BaseModel):
    """SGLang's answer, and per item: log-odds, calibrated P(yes), what was scored, and whether its text was cut."""

    scores: list[list[float] | None] = Field(
        description="per item the probability of each label, in the order of `label_token_ids`, (no, yes) by default;"
        " null if it was left out"
    )
    model: str
    usage: ScoreUsage
    object: Literal["scoring"] = "scoring"
    pooled_hidden_states: None = None
    label_token_ids: list[int]
    logits: list[float | None] = Field(description="z_yes - z_no")
    calibrated: list[float | None] | None = Field(
        None, description="P(yes) by the checkpoint's calibration; null if it has none"
    )
    truncated: list[bool]
    status: list[ItemStatus] = Field(
        description="what was scored: text or embedding; or why an id could not be: with a score, its text was instead"
    )


class Document(BaseModel):
    """A document of a rerank request. Other fields are left aside."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    text: str
    title: str | None = None


class TextPart(BaseModel):
    """A part of a message. Parts of other types than text are refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


class Content(BaseModel):
    """Parts, in vLLM's words."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    content: Parts


AnyDocument = Text | Document | Content | Parts
"""A document as any of the clients sends it; SGLang's are bare parts. Lines of one text each are one document."""


def document_of(given: AnyDocument) -> Document:
    """Returns a document in the one form."""
    if isinstance(given, Document):
        return given
    if isinstance(given, str):
        return Document(text=given)
    return Document(text="\n".join(part.text for part in (given.content if isinstance(given, Content) else given)))


AT_LEAST_ONE = Field(fail_fast=True, json_schema_extra={"minItems": 1})
RANK_FIELDS = Field(json_schema_extra={"enum": [["text"], ["title", "text"]]})


class RerankRequest(Body):
    """Orders documents by relevance to a query. Bodies of Cohere, Jina, vLLM and SGLang."""

    query: AnyDocument
    documents: Text | Content | Annotated[list[AnyDocument], AT_LEAST_ONE] = Field(
        description="texts, objects with text and title, or parts of messages; vLLM's `content` is a document a part"
    )
    model: str | None = None
    top_n: Annotated[int, Field(ge=0)] | None = Field(None, description="how many to return; all if 0 or null")
    return_documents: bool | None = Field(None, description="by default yes, but not on /v2/rerank")
    max_tokens_per_doc: Annotated[int, Field(ge=0)] | None = Field(None, description="0 or null: the ranker's own")
    max_tokens_per_query: Annotated[int, Field(ge=0)] | None = Field(
        None, description="0 or null: any; a longer query is refused, as queries are never cut"
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="documents are cut so that a row has no more tokens; -1 or null: the ranker's own limit"
    )
    use_activation: bool | None = Field(None, description="false: log-odds instead of probabilities")
    rank_fields: Annotated[list[str], RANK_FIELDS] | None = Field(
        None, description='["text"] leaves titles out, ["title", "text"] does not'
    )
    instruction: str | None = Field(None, description="null, or the one instruction that the ranker was trained with")
    instruct: str | None = Field(None, description="as `instruction`")
    # Of no effect on scores.
    user: str | None = None
    request_id: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    truncation_side: Literal["right"] | None = None
    max_chunks_per_doc: int | None = Field(None, description="of no effect: documents are cut, not split")
    mm_processor_kwargs: Nothing = None
    chat_template_kwargs: Nothing = None

    @property
    def every_document(self) -> list[Document]:
        """The documents in their one form; titles only if they count."""
        if isinstance(self.documents, Content):
            return [Document(text=part.text) for part in self.documents.content]
        given = [self.documents] if isinstance(self.documents, str) else self.documents
        documents = [document_of(each) for each in given]
        if self.rank_fields is None or "title" in self.rank_fields:
            return documents
        return [Document(text=document.text) for document in documents]


class RerankDocument(BaseModel):
    """A document as it was sent."""

    text: str


class RerankResult(BaseModel):
    """One document with its place in the request. `logit` is z_yes - z_no."""

    index: int
    relevance_score: float
    logit: float
    truncated: bool
    document: RerankDocument | None = None


class RerankResponse(BaseModel):
    """Best first; equal scores in the order of the request."""

    id: str
    object: Literal["rerank"] = "rerank"
    created: int
    model: str
    results: list[RerankResult]
    usage: dict[str, int]
    meta: dict[str, Any] = Field(description="Cohere's: api_version, billed_units and tokens")


class CatalogueItem(Body):
    """An item to encode and store."""

    id: NonEmpty
    text: str
    title: str | None = None


class PutItemsRequest(Body):
    """Items to encode and store, in place of what their ids had."""

    items: Annotated[list[CatalogueItem], Field(min_length=1, fail_fast=True)]
    vectors_per_item: Annotated[int, Field(gt=0)] | None = Field(
        None, description="one of the numbers that the compressor knows; the largest if null"
    )


class FailedItems(BaseModel):
    """Items that could not be encoded for one reason."""

    reason: str
    items: int
    first_id: str


class PutItemsResponse(BaseModel):
    """Items encoded and stored, items that the store had already, and those that failed."""

    encoded: int
    unchanged: int
    failed: list[FailedItems]
    vectors_per_item: int


class DeleteItemsRequest(Body):
    """Ids to drop from the store."""

    ids: Annotated[list[str], Field(min_length=1, fail_fast=True)]


class DeleteItemsResponse(BaseModel):
    """How many of the ids were there."""

    deleted: int


class ReloadRequest(Body):
    """A checkpoint to put into service."""

    model: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="folder on the server's machine; the one that was loaded last if null"
    )


class ReloadResponse(BaseModel):
    """The checkpoint that is in service now.

    A checkpoint with other weights makes the store's records stale. `stored_items` says so of the first 100: how many
    have each status.
    """

    model: str
    params_sha256: str
    seconds: float
    stored_items: dict[str, int] | None = Field(None, description="null without a store")


class HealthResponse(BaseModel):
    """State of the server: "ready", or why it is not."""

    status: str


class ErrorResponse(BaseModel):
    """The body of every refusal."""

    object: Literal["error"] = "error"
    message: str
    type: str
    param: str | None
    code: int
    id: str
