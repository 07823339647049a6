"""What the server has done, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastvlm_mlx.serve.api import Record
from fastvlm_mlx.serve.exchange import Places

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
# Others are one, or every path that somebody tries would be kept.
PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/responses")


class Metrics:
    """Counts of one server; its names begin with fastvlm_."""

    def __init__(self, places: Places):
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "fastvlm_requests",
            "Requests by path and status.",
            ["path", "status"],
            registry=registry,
        )
        self._tokens = Counter(
            "fastvlm_tokens",
            "Tokens: of prompts (prompt), of those how many were kept from earlier ones (cached), "
            "and of answers (generated).",
            ["kind"],
            registry=registry,
        )
        self._took = Histogram(
            "fastvlm_request_seconds",
            "From a request's beginning to its answer's end.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "fastvlm_first_token_seconds",
            "From a request's beginning to the first piece of its answer, waiting included.",
            buckets=_SECONDS,
            registry=registry,
        )
        active = Gauge(
            "fastvlm_answers",
            "Answers that are computed or wait for a place.",
            registry=registry,
        )
        active.set_function(lambda: places.taken)

    def count(self, path: str, status: int, seconds: float, record: Record) -> None:
        path = path if path in PATHS else "other"
        self._requests.labels(path, str(status)).inc()
        self._took.labels(path).observe(seconds)
        if record.first_s is not None:
            self._first.observe(record.first_s)
        for result in record.results[:1]:
            self._tokens.labels("prompt").inc(result.prompt_tokens)
            self._tokens.labels("cached").inc(result.cached_tokens)
        for result in record.results:
            self._tokens.labels("generated").inc(result.generation_tokens)

    def text(self) -> bytes:
        return generate_latest(self._registry)
