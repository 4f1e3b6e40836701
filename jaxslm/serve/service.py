"""What the routes call: admission, preparation, waiting, answers. Knows nothing of HTTP but its status codes."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from jaxslm.compress.catalogue import Summary
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.items.store import StoreUnavailable
from jaxslm.score.scorer import Scores
from jaxslm.serve.admission import Admission
from jaxslm.serve.batcher import Batcher, DeadlineError, DeviceError
from jaxslm.serve.catalogue import Catalogue
from jaxslm.serve.engine import Engine
from jaxslm.serve.errors import ApiError, invalid
from jaxslm.serve.jobs import Job
from jaxslm.serve.prepare import Prepared
from jaxslm.serve.schemas import (
    DeleteItemsRequest,
    DeleteItemsResponse,
    FailedItems,
    PutItemsRequest,
    PutItemsResponse,
    ReloadRequest,
    ReloadResponse,
    RerankDocument,
    RerankRequest,
    RerankResponse,
    RerankResult,
    ScoreRequest,
    ScoreResponse,
    ScoreUsage,
)
from jaxslm.serve.served import ServedModel

Result = TypeVar("Result")
Disconnected = Callable[[], Awaitable[None]]
"""Returns when the client has gone."""

SAMPLED_ITEMS = 100
"""Records of the store that a reload looks at."""

ADMITTED_SHARE = 0.8
"""A request is admitted if by the speed of late it is scored in this share of the time that it has."""


class ClientGoneError(Exception):
    """The client went away before its answer was there."""


@dataclass
class Call:
    """One HTTP request on its way: when it must be answered and what its parts took, in seconds of the monotonic clock.

    Attributes:
        route: the path, or "unknown" if there is no such route, for metrics. deadline, received: `time.monotonic()`.
        refusal: the reason, if the answer is one.
        receive_s: from the head to the end of the body. tokenise_s: from there to rows for the device.
    """

    request_id: str
    route: str
    received: float
    deadline: float
    refusal: str | None = None
    items: int = 0
    tokens: int = 0
    receive_s: float = 0.0
    tokenise_s: float = 0.0
    queue_s: float = 0.0
    device_s: float = 0.0
    respond_s: float = 0.0
    scored: float | None = None


class Service:
    """The model in service behind admission control. Methods raise ApiError, or ClientGoneError if nobody waits.

    Attributes:
        out_of_time: draining has taken as long as it may: whoever encodes items stops after the pass that runs.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.settings = engine.settings
        self.admission = Admission(engine)
        # Tokenisation leaves the interpreter's lock alone, so threads help; more than a few only queue for it.
        self._threads = ThreadPoolExecutor(4, "prepare")
        self._encoding = asyncio.Lock()
        self.out_of_time = False

    def close(self) -> None:
        """Ends the threads of requests: what waits for one is cancelled, and nobody waits for those at work."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def score(self, call: Call, parse: Callable[[], ScoreRequest], gone: Disconnected) -> ScoreResponse:
        """Answers `/v1/score`. `parse` checks the body, off the event loop."""
        with self.engine.using() as model:

            def prepare() -> tuple[ScoreRequest, Prepared]:
                body = parse()
                return body, model.preparer.score(body)

            body, prepared = await self._run(model.batcher, call, prepare, gone)
            return _score_response(model, body, prepared)

    async def rerank(
        self, call: Call, parse: Callable[[], RerankRequest], gone: Disconnected, *, return_documents: bool
    ) -> RerankResponse:
        """Answers the rerank routes. `return_documents`: where the body does not say."""

        with self.engine.using() as model:

            def prepare() -> tuple[RerankRequest, Prepared]:
                body = parse()
                return body, model.preparer.rerank(body)

            body, prepared = await self._run(model.batcher, call, prepare, gone)
            return _rerank_response(model, call, body, prepared, return_documents)

    async def put_items(self, call: Call, parse: Callable[[], PutItemsRequest]) -> PutItemsResponse:
        """Answers `PUT /v1/items`."""

        def put(catalogue: Catalogue) -> PutItemsResponse:
            body = parse()
            if len({item.id for item in body.items}) != len(body.items):
                raise invalid("items: ids must not repeat", "items")
            self._check_number(len(body.items))
            k = body.vectors_per_item or catalogue.ks[-1]
            if k not in catalogue.ks:
                raise invalid(f"vectors_per_item: must be one of {catalogue.ks}", "vectors_per_item")
            call.items = len(body.items)
            items = [Item(id=item.id, title=item.title, text=item.text) for item in body.items]
            summary = catalogue.put(items, k, self._check_time)
            reasons = summary.reasons.items()
            failed = [FailedItems(reason=why, items=number, first_id=first) for why, (number, first) in reasons]
            return PutItemsResponse(
                encoded=summary.encoded, unchanged=summary.unchanged, failed=failed, vectors_per_item=k
            )

        return await self._with_catalogue(put)

    async def delete_items(self, call: Call, parse: Callable[[], DeleteItemsRequest]) -> DeleteItemsResponse:
        """Answers `DELETE /v1/items`."""

        def delete(catalogue: Catalogue) -> DeleteItemsResponse:
            body = parse()
            self._check_number(len(body.ids))
            call.items = len(body.ids)
            return DeleteItemsResponse(deleted=catalogue.delete(body.ids))

        return await self._with_catalogue(delete)

    def _check_time(self, _: Summary) -> None:
        if self.out_of_time:
            raise self.admission.not_ready("draining")

    def _check_number(self, items: int) -> None:
        if items > self.settings.max_items:
            raise ApiError(413, "too_many_items", f"{items} items: at most {self.settings.max_items}")

    async def _with_catalogue(self, work: Callable[[Catalogue], Result]) -> Result:
        """Returns what `work` does to the items of the store, one call after another."""
        with self.engine.using() as model:
            if model.catalogue is None:
                raise invalid("this server has no item store for its checkpoint")
            async with self._encoding:
                done = self.engine.in_background("encode", partial(work, model.catalogue))
                return await self._result(asyncio.wrap_future(done))

    async def reload(self, parse: Callable[[], ReloadRequest]) -> ReloadResponse:
        """Answers `POST /v1/reload`."""
        start = time.monotonic()
        results = self.engine.metrics.reloads
        try:
            body = await self._in_thread(parse)
            model = await self.engine.reload(body.model)
        except ApiError:
            results.labels("refused").inc()
            raise
        results.labels("done").inc()
        stored = None
        if model.catalogue is not None:
            stored = await self._in_thread(partial(model.catalogue.sample, SAMPLED_ITEMS))
        return ReloadResponse(
            model=model.name,
            params_sha256=model.ranker.manifest.params_sha256,
            seconds=round(time.monotonic() - start, 3),
            stored_items=None if stored is None else {str(status): number for status, number in stored.items()},
        )

    async def _run(
        self, batcher: Batcher, call: Call, prepare: Callable[[], tuple[Result, Prepared]], gone: Disconnected
    ) -> tuple[Result, Prepared]:
        """Prepares a request in a thread, has it scored and returns both."""
        body, prepared = await self._in_thread(prepare)
        call.tokenise_s = time.monotonic() - call.received - call.receive_s
        call.items, call.tokens = len(prepared.status), prepared.num_tokens
        if prepared.work:
            await self._score(batcher, call, prepared, gone)
        call.scored = time.monotonic()
        return body, prepared

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await self._result(asyncio.get_running_loop().run_in_executor(self._threads, work))

    async def _result(self, work: asyncio.Future[Result]) -> Result:
        """Returns what a thread did; what input and store did wrong becomes a refusal."""
        try:
            return await work
        except InputError as error:
            raise invalid(str(error)) from None
        except StoreUnavailable:
            raise ApiError(503, "store_unavailable", "the item store cannot be reached", retry_after_s=1.0) from None

    async def _score(self, batcher: Batcher, call: Call, prepared: Prepared, gone: Disconnected) -> None:
        """Has the prepared rows scored and fills in their logits."""
        left = call.deadline - time.monotonic()
        tokens = sum(request.num_tokens for request, _ in prepared.work)  # what is cached costs the device nothing
        if batcher.wait_s(tokens) > ADMITTED_SHARE * left and batcher.queued_tokens:
            self.admission.refuse_load("overloaded", "it would not be scored by its deadline", tokens)
        jobs = [batcher.submit(request, call.deadline) for request, _ in prepared.work]
        try:
            results = await self._wait(jobs, left, gone)
        except BaseException:
            for job in jobs:
                batcher.drop(job)
            raise
        for (_, places), logits in zip(prepared.work, results, strict=True):
            prepared.fill_in(places, logits)
        if not np.isfinite(prepared.logits[[place for _, places in prepared.work for place in places]]).all():
            self.engine.health.suspect()
            raise ApiError(503, "device_failed", "the device returned no numbers", retry_after_s=1.0)
        if self.engine.cache is not None:
            self._threads.submit(self.engine.cache.put, prepared.scored())
        call.queue_s = max((job.started or job.submitted) - job.submitted for job in jobs)
        call.device_s = max((job.finished or 0.0) - (job.started or 0.0) for job in jobs)

    async def _wait(self, jobs: Sequence[Job], seconds: float, gone: Disconnected) -> list[np.ndarray]:
        """Returns the logits of all jobs; gives up when the time is over or the client has gone."""

        async def all_logits() -> list[np.ndarray]:
            return [await asyncio.wrap_future(job.future) for job in jobs]

        scored = asyncio.ensure_future(all_logits())
        left = asyncio.ensure_future(gone())
        either: set[asyncio.Future[Any]] = {scored, left}
        try:
            done, _ = await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if scored in done:
                return scored.result()
            if left in done:
                raise ClientGoneError
            raise DeadlineError
        except DeadlineError:
            raise ApiError(504, "deadline", "not scored by its deadline") from None
        except DeviceError:
            raise ApiError(503, "device_failed", "the device failed", retry_after_s=1.0) from None
        except InputError as error:
            raise invalid(str(error)) from None
        finally:
            left.cancel()
            scored.cancel()


def _score_response(model: ServedModel, body: ScoreRequest, prepared: Prepared) -> ScoreResponse:
    no_yes = model.ranker.label_token_ids
    labels = tuple(body.label_token_ids or no_yes)
    known = ~np.isnan(prepared.logits[:, 0])
    calibration = model.ranker.manifest.calibration
    scored = Scores(prepared.logits, prepared.truncated, calibration)
    if prepared.log_probs is None:
        scores = _among_labels(scored.probabilities, [no_yes.index(label) for label in labels])
    else:
        chosen = prepared.log_probs.astype(np.float64)
        if body.apply_softmax:
            chosen -= np.logaddexp.reduce(chosen, axis=1, keepdims=True)
        scores = np.exp(chosen)
    return ScoreResponse(
        scores=_or_none(scores, known),
        model=model.name,
        usage=ScoreUsage(prompt_tokens=prepared.num_tokens, total_tokens=prepared.num_tokens),
        label_token_ids=list(labels),
        logits=_or_none(scored.log_odds, known),
        calibrated=None if calibration is None else _or_none(scored.calibrated, known),
        truncated=prepared.truncated,
        status=prepared.status,
    )


def _among_labels(yes: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Returns the probabilities of labels among themselves, [J, labels].

    Args:
        yes: P(yes) as the ranker and every other route have it. places: 0 for no, 1 for yes, per label.
    """
    if len(set(places)) == 1:
        return np.full((len(yes), len(places)), 1 / len(places))
    both = np.stack([1 - yes.astype(np.float64), yes], axis=1)[:, places]
    return both / both.sum(axis=1, keepdims=True)


def _rerank_response(
    model: ServedModel, call: Call, body: RerankRequest, prepared: Prepared, return_documents: bool
) -> RerankResponse:
    if body.return_documents is not None:
        return_documents = body.return_documents
    documents = body.every_document if return_documents else []
    scored = Scores(prepared.logits, prepared.truncated)
    log_odds = scored.log_odds
    relevance = log_odds if body.use_activation is False else scored.probabilities
    results = [
        RerankResult(
            index=place,
            relevance_score=float(relevance[place]),
            logit=float(log_odds[place]),
            truncated=prepared.truncated[place],
            document=RerankDocument(text=documents[place].text) if return_documents else None,
        )
        for place in np.argsort(-log_odds, kind="stable")[: body.top_n or None].tolist()
    ]
    tokens = prepared.num_tokens
    return RerankResponse(
        id=call.request_id,
        created=int(time.time()),
        model=model.name,
        results=results,
        usage={"prompt_tokens": tokens, "total_tokens": tokens},
        meta={
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": tokens, "output_tokens": 0},
        },
    )


def _or_none(values: np.ndarray, known: np.ndarray) -> list[Any]:
    return [value if there else None for value, there in zip(values.tolist(), known.tolist(), strict=True)]
