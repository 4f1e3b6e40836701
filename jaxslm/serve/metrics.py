"""Prometheus metrics of one server. Names follow vLLM's and SGLang's where they mean the same."""

from collections.abc import Callable, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxslm.items.lookup import Status
from jaxslm.serve.errors import REASONS

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """Everything that the server counts, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("num_requests", "Requests answered.", "route", "status")
        self.rejected = self._counter("num_rejected_requests", "Requests refused or failed.", "reason")
        self.cancelled = self._counter("num_aborted_requests", "Requests whose client went away.")
        self.items = self._counter("items", "Items scored on the device.")
        self.tokens = self._counter("prompt_tokens", "Tokens that the device read, prefixes included.")
        self.places = self._counter("token_places", "Token places of the passes, padding included.")
        self.passes = self._counter("bucket_passes", "Forward passes by compiled shape.", "bucket")
        self.reloads = self._counter("reloads", "Checkpoints asked to be put into service.", "result")
        self.busy_s = self._counter("device_busy_seconds", "Time in which the device had a batch.")
        self.lookups = self._counter("item_lookups", "Items asked of the store.", "result")
        self.cache = self._counter("score_cache", "Items asked of the score cache.", "result")
        self.request_items = self._histogram("request_items", "Items of a request.", _COUNTS)
        self.padding = self._histogram("padding_fraction", "Share of a pass that holds no token.", _FRACTIONS)
        self.total_s = self._histogram("e2e_request_latency_seconds", "Request received to answer sent.", _SECONDS)
        self.tokenise_s = self._histogram("request_tokenization_time_seconds", "Parse, look up, tokenise.", _SECONDS)
        self.queue_s = self._histogram("request_queue_time_seconds", "Waiting for the device.", _SECONDS)
        self.device_s = self._histogram("request_inference_time_seconds", "Dispatched to scored.", _SECONDS)
        self.respond_s = self._histogram("request_response_time_seconds", "Scored to answer written.", _SECONDS)

        self.model_info = Gauge(
            "jaxslm_model_info", "The model in service: always 1.", ("model", "dtype", "device"), registry=self.registry
        )
        # A series that has no sample before its first event has no rate when it matters.
        known = {self.rejected: REASONS, self.lookups: get_args(Status), self.cache: ("hit", "miss")}
        for counter, labels in {**known, self.reloads: ("done", "refused")}.items():
            for label in labels:
                counter.labels(label)

    def serves(self, model: str, dtype: str, device: str) -> None:
        """Says which model is in service."""
        self.model_info.clear()
        self.model_info.labels(model, dtype, device).set(1)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"jaxslm_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float | int]) -> Histogram:
        return Histogram(f"jaxslm_{name}", text, buckets=buckets, registry=self.registry)

    def watch(self, name: str, text: str, value: Callable[[], float | int]) -> None:
        """Adds a gauge that is read when the metrics are."""
        Gauge(f"jaxslm_{name}", text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """Returns the metrics in Prometheus' text format."""
        return generate_latest(self.registry)
