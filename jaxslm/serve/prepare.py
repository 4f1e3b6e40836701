"""From a request's body to rows of tokens for the device: what runs in a thread pool, off the event loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

from jaxslm.data_files import Item
from jaxslm.score.compressed import VectorRequest
from jaxslm.score.forward import MAX_LABEL_IDS, PackRequest
from jaxslm.score.scorer import Ranker
from jaxslm.serve.cache import CachedScore, ScoreCache, score_key
from jaxslm.serve.catalogue import Catalogue
from jaxslm.serve.errors import ApiError, invalid
from jaxslm.serve.metrics import Metrics
from jaxslm.serve.schemas import ItemStatus, OnMiss, RerankRequest, ScoreRequest, document_of
from jaxslm.serve.vectors import decode, overrides_of


@dataclass
class Prepared:
    """A request with its rows, and the place of each item's score.

    Attributes:
        logits: of (no, yes), [J, 2]; NaN where no score is known yet, or ever.
        log_probs: [J, L] among the whole vocabulary, of the labels that are asked for; None if the logits will do.
        status, truncated, tokens: per item; tokens without those of the shared prefix.
        prefix_tokens: of the prefix that items share.
        work: what the device has to score, with the places of its items.
        keys: under which names the score cache keeps the places that are scored now.
    """

    logits: Float32[np.ndarray, "J 2"]
    status: list[ItemStatus]
    truncated: list[bool]
    tokens: np.ndarray
    prefix_tokens: int = 0
    work: list[tuple[PackRequest, list[int]]] = field(default_factory=list)
    keys: dict[int, str] = field(default_factory=dict)
    log_probs: Float32[np.ndarray, "J L"] | None = None

    @classmethod
    def of(cls, num_items: int, num_labels: int = 0) -> "Prepared":
        """Returns a request of so many items of text of which nothing is known."""
        logits = np.full((num_items, 2), np.nan, np.float32)
        log_probs = np.full((num_items, num_labels), np.nan, np.float32) if num_labels else None
        tokens = np.zeros(num_items, np.int64)
        return cls(logits, ["text"] * num_items, [False] * num_items, tokens, log_probs=log_probs)

    @property
    def num_tokens(self) -> int:
        """All tokens of the request, the shared prefix once."""
        return self.prefix_tokens + int(self.tokens.sum())

    def add(self, request: PackRequest, places: list[int]) -> None:
        """Adds rows for the device."""
        self.work.append((request, places))
        self.tokens[places] = [len(ids) for ids in request.item_ids]

    def fill_in(self, places: list[int], values: Float32[np.ndarray, "n C"]) -> None:
        """Notes what the device found for these places."""
        self.logits[places] = values[:, :2]
        if self.log_probs is not None:
            self.log_probs[places] = values[:, 2 : 2 + self.log_probs.shape[1]]

    def scored(self) -> dict[str, CachedScore]:
        """Returns what the score cache should keep of the answers."""
        return {
            key: CachedScore(
                float(self.logits[place, 0]),
                float(self.logits[place, 1]),
                int(self.tokens[place]),
                self.truncated[place],
            )
            for place, key in self.keys.items()
        }


class Preparer:
    """Turns bodies into rows for one ranker. Safe for threads.

    Its methods raise ApiError for what the schema cannot say, InputError for what the prompt refuses, and
    StoreUnavailable if the item store fails.
    """

    def __init__(
        self,
        ranker: Ranker,
        metrics: Metrics,
        max_items: int,
        catalogue: Catalogue | None = None,
        cache: ScoreCache | None = None,
    ) -> None:
        self._ranker, self._metrics, self._max_items = ranker, metrics, max_items
        self._catalogue, self._cache = catalogue, cache
        # All that a score depends on, beside query and item: weights, prompt, and how they are used.
        identity = ranker.manifest.model_dump_json(include={"params_sha256", "template_sha256", "ranker", "compressor"})
        self._model = f"{identity} {ranker.dtype}"
        buckets = ranker.scorer.buckets.buckets
        self._overrides_per_item = max(bucket.overrides_per_item for bucket in buckets)

    def rerank(self, body: RerankRequest) -> Prepared:
        """Returns the rows of documents in the ranker's prompt."""
        query, documents = document_of(body.query).text, body.every_document
        if not documents:
            raise invalid("documents: at least one is needed", "documents")
        self._check_number(len(documents))
        _check_query(query)
        if body.rank_fields not in (None, ["text"], ["title", "text"]):
            raise invalid('rank_fields: must be ["text"] or ["title", "text"]', "rank_fields")
        own = self._ranker.prompt.config.instruction
        for name, given in (("instruct", body.instruct), ("instruction", body.instruction)):
            if given not in (None, own):
                raise invalid(f"{name}: must be null or what the ranker was trained with: {own!r}", name)
        prepared = Prepared.of(len(documents))
        items = {
            place: Item(id="document", title=document.title, text=document.text) if document.title else document.text
            for place, document in enumerate(documents)
        }
        self._add_texts(prepared, query, items, self._document_limit(body, query), "documents")
        return prepared

    def _document_limit(self, body: RerankRequest, query: str) -> int | None:
        """Returns how many tokens of a document count at most; checks what the body says of the query's."""
        prompt, limits = self._ranker.prompt, [body.max_tokens_per_doc] if body.max_tokens_per_doc else []
        if body.max_tokens_per_query and (length := len(prompt.text_ids([query])[0])) > body.max_tokens_per_query:
            raise invalid(
                f"max_tokens_per_query: the query has {length} tokens, and queries are never cut",
                "max_tokens_per_query",
            )
        if body.truncate_prompt_tokens is not None and body.truncate_prompt_tokens >= 0:
            room = prompt.item_room(prompt.encode_query(query), body.truncate_prompt_tokens)
            if room < 1:
                raise invalid(
                    f"truncate_prompt_tokens: query and prompt alone have {body.truncate_prompt_tokens - room}",
                    "truncate_prompt_tokens",
                )
            limits.append(room)
        return min(limits, default=None)

    def score(self, body: ScoreRequest) -> Prepared:
        """Returns the rows of a `/v1/score` request."""
        given = [len(x) for x in (body.items, body.item_ids) if isinstance(x, list)]
        given += [1] if isinstance(body.items, str) else []
        given += [body.item_embeddings.shape[0]] if body.item_embeddings is not None else []
        if not given:
            raise invalid("items, item_ids or item_embeddings: one is needed", "items")
        if len(set(given)) > 1:
            raise invalid(f"items, item_ids and item_embeddings: must be equally many, are {given}", "items")
        self._check_number(given[0])
        if body.return_pooled_hidden_states:
            raise invalid(
                "return_pooled_hidden_states: must be false: a ranker that reads label tokens pools nothing",
                "return_pooled_hidden_states",
            )
        label_ids = self._asked_labels(body)
        if not given[0]:
            return Prepared.of(0, len(label_ids))
        items = [body.items] if isinstance(body.items, str) else body.items
        own_prompt = body.label_token_ids is not None or body.embed_override_token_id is not None
        if isinstance(body.query, list) or own_prompt or (items and isinstance(items[0], list)):
            if body.item_ids is not None or body.item_embeddings is not None:
                raise invalid("item_ids, item_embeddings: need the ranker's own prompt: a text as query, no labels")
            return self._rows(body, items or [], label_ids)
        return self._in_ranker_prompt(body, body.query, [str(item) for item in items] if items else None)

    def _asked_labels(self, body: ScoreRequest) -> tuple[int, ...]:
        """Returns the labels whose log-probabilities the device must compute: none if the ranker's own logits do."""
        labels, vocab_size = body.label_token_ids, self._ranker.config.model.vocab_size
        if labels is None:
            return ()
        if not 0 < len(labels) <= MAX_LABEL_IDS:
            raise invalid(
                f"label_token_ids: {len(labels)} ids: 1 to {MAX_LABEL_IDS} can be asked for", "label_token_ids"
            )
        if max(labels) >= vocab_size:
            raise invalid(f"label_token_ids: {max(labels)} is outside 0..{vocab_size - 1}", "label_token_ids")
        own = set(labels) <= set(self._ranker.label_token_ids)
        return () if own and body.apply_softmax else tuple(labels)

    def _check_number(self, num_items: int) -> None:
        if num_items > self._max_items:
            raise ApiError(413, "too_many_items", f"{num_items} items: at most {self._max_items} in one request")

    def _in_ranker_prompt(self, body: ScoreRequest, query: str, texts: list[str] | None) -> Prepared:
        _check_query(query)
        if body.item_first:
            raise invalid("item_first: the ranker's own prompt has the query first", "item_first")
        if body.item_ids is not None and body.item_embeddings is not None:
            raise invalid("item_ids, item_embeddings: either, not both", "item_ids")
        scorer = self._ranker.vector_scorer
        if body.item_ids is not None and body.on_miss == "text" and scorer is not None and scorer.reads_texts:
            raise invalid(
                'on_miss: must be "fail" or "skip": with this compressor the text of an item with an id is what is read'
                " beside its vectors",
                "on_miss",
            )
        if body.item_embeddings is not None:
            array = decode(body.item_embeddings, self._ranker.config.model.width)
            prepared = Prepared.of(len(array))
            self._add_vectors(prepared, query, dict(enumerate(array)), texts)
            return prepared
        ids = body.item_ids or [None] * len(texts or [])
        prepared = Prepared.of(len(ids))
        found = self._look_up(prepared, ids)
        missing = [place for place in range(len(ids)) if place not in found]
        self._check_misses(prepared, ids, missing, texts, body.on_miss)
        if found:
            self._add_vectors(prepared, query, found, texts)
        if texts is not None:
            wanted = {place: texts[place] for place in missing if ids[place] is None or body.on_miss == "text"}
            if wanted:
                self._add_texts(prepared, query, wanted, body.max_tokens_per_item, "items")
        return prepared

    def _look_up(self, prepared: Prepared, ids: Sequence[str | None]) -> dict[int, np.ndarray]:
        """Returns the vectors of the ids that have any, by place; notes the status of the others."""
        asked = [(place, item_id) for place, item_id in enumerate(ids) if item_id is not None]
        if not asked:
            return {}
        if self._catalogue is None:
            raise invalid("item_ids: this server has no item store for its checkpoint", "item_ids")
        lookup = self._catalogue.lookup([item_id for _, item_id in asked])
        found = {}
        for (place, _), vectors, status in zip(asked, lookup.vectors, lookup.status, strict=True):
            if vectors is not None:
                found[place] = vectors
            elif status != "found":
                prepared.status[place] = status
        return found

    def _check_misses(
        self,
        prepared: Prepared,
        ids: Sequence[str | None],
        missing: Sequence[int],
        texts: Sequence[str] | None,
        on_miss: OnMiss,
    ) -> None:
        nameless = [place for place in missing if ids[place] is None]
        if nameless and texts is None:
            raise invalid(f"items: item {nameless[0]} has no id and needs a text", "items")
        misses = [place for place in missing if ids[place] is not None]
        if not misses or on_miss == "skip" or (on_miss == "text" and texts is not None):
            return
        first, status = misses[0], prepared.status[misses[0]]
        wish = ", and there are no items' texts to score instead" if on_miss == "text" else ""
        raise ApiError(
            404,
            f"item_{status}",
            f"item_ids: {len(misses)} of {len(ids)} cannot be scored{wish}; the first is item {first}: {status}",
            param="item_ids",
        )

    def _add_texts(
        self, prepared: Prepared, query: str, texts: Mapping[int, str | Item], max_item_tokens: int | None, name: str
    ) -> None:
        """Adds rows of texts by place, but for those whose score is cached. `name`: what the client calls them."""
        for place, text in texts.items():
            if not (text if isinstance(text, str) else f"{text.title or ''}{text.text}").strip():
                raise invalid(f"{name}[{place}]: has no text", f"{name}[{place}]")
        if self._cache is not None:
            texts = {place: texts[place] for place in self._not_cached(prepared, query, texts, max_item_tokens)}
        if not texts:
            prepared.prefix_tokens = len(self._ranker.prompt.encode_query(query))
            return
        places = list(texts)
        encoded = self._ranker.prompt.encode(query, list(texts.values()), max_item_tokens, places)
        prepared.prefix_tokens = len(encoded.prefix_ids)
        prepared.add(PackRequest(encoded.prefix_ids, encoded.item_ids), places)
        for place, truncated in zip(places, encoded.truncated, strict=True):
            prepared.truncated[place] = truncated

    def _add_vectors(
        self, prepared: Prepared, query: str, vectors: dict[int, np.ndarray], texts: Sequence[str] | None
    ) -> None:
        """Adds rows of embedding tokens by place, but for those whose score is cached.

        Args:
            texts: of all places: what compressors with text fields read beside the vectors.
        """
        scorer = self._ranker.vector_scorer
        if scorer is None:
            raise invalid("item_embeddings: this checkpoint has no compressor, so it reads text alone")
        for place in vectors:
            prepared.status[place] = "embedding"
        beside = {place: texts[place] for place in vectors} if scorer.reads_texts and texts is not None else None
        prepared.prefix_tokens = len(self._ranker.prompt.encode_query(query))
        if self._cache is not None and beside is None:
            vectors = {place: vectors[place] for place in self._not_cached(prepared, query, vectors, None)}
        if vectors:
            places = list(vectors)
            request = VectorRequest(query, list(vectors.values()), list(beside.values()) if beside else None, places)
            for numbers, part in scorer.pack(request):
                prepared.add(part, [places[number] for number in numbers])

    def _not_cached(
        self, prepared: Prepared, query: str, items: Mapping[int, str | Item | np.ndarray], limit: int | None
    ) -> list[int]:
        """Fills in the scores that the cache holds; returns the other places and notes their keys."""
        assert self._cache is not None
        keys = {place: score_key(self._model, query, item, limit) for place, item in items.items()}
        others = []
        for (place, key), score in zip(keys.items(), self._cache.get(list(keys.values())), strict=True):
            if score is None:
                others.append(place)
                prepared.keys[place] = key
            else:
                prepared.logits[place] = score.no, score.yes
                prepared.tokens[place], prepared.truncated[place] = score.tokens, score.truncated
        self._metrics.cache.labels("hit").inc(len(keys) - len(others))
        self._metrics.cache.labels("miss").inc(len(others))
        return others

    def _rows(
        self, body: ScoreRequest, items: Sequence[str] | Sequence[list[int]], label_ids: tuple[int, ...]
    ) -> Prepared:
        """Rows of token ids, or of texts that are whole prompts together: nothing is added to either."""
        prepared = Prepared.of(len(items), len(label_ids))
        query = body.query
        if isinstance(query, str) and all(isinstance(item, str) for item in items):
            texts = [f"{item}{query}" if body.item_first else f"{query}{item}" for item in items]
            rows = self._ranker.prompt.raw_ids(texts)
            shared = _shared_length(rows)
        elif isinstance(query, list) and all(isinstance(item, list) for item in items):
            rows = [[*item, *query] if body.item_first else [*query, *item] for item in items]
            shared = 0 if body.item_first else len(query)
        else:
            raise invalid("query, items: both text or both token ids", "query")
        self._check_ids(rows)
        vectors, places = overrides_of(body, rows, self._ranker.config.model.width, self._overrides_per_item)
        shared = min(shared, min(map(len, rows)) - 1)
        if places is not None:
            shared = min(shared, int(places[places >= 0].min()))
            places = np.where(places < 0, places, places - shared)
            for number in np.flatnonzero((places >= 0).any(axis=1)).tolist():
                prepared.status[number] = "embedding"
        prepared.prefix_tokens = shared
        request = PackRequest(rows[0][:shared], [row[shared:] for row in rows], vectors, places, label_ids)
        prepared.add(request, list(range(len(rows))))
        return prepared

    def _check_ids(self, rows: Sequence[Sequence[int]]) -> None:
        vocab_size = self._ranker.config.model.vocab_size
        for number, row in enumerate(rows):
            if not row:
                raise invalid(f"items[{number}]: has no tokens", "items")
            if max(row) >= vocab_size:
                raise invalid(f"items[{number}]: a token id is outside 0..{vocab_size - 1}", "items")


def _check_query(query: str) -> None:
    if not query.strip():
        raise invalid("query: must not be empty", "query")


def _shared_length(rows: Sequence[list[int]]) -> int:
    """Returns how many tokens all rows begin with."""
    first, last = min(rows), max(rows)
    differing = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(differing, min(len(first), len(last)))
