"""What a server has done, for Prometheus: GET /metrics, in its text format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

POSTED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
PATHS = frozenset(("/health", "/metrics", "/v1/models", *POSTED))
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # upper bounds of the histograms' buckets


class Metrics:
    """Counters of one server.

    Args:
        engine: whose requests are counted at each reading.
    """

    def __init__(self, engine: Any):
        self.registry = CollectorRegistry()
        self.requests = self.make(Counter, "onecard_requests", "Requests by path and status", ["path", "status"])
        self.prompt_tokens = self.make(Counter, "onecard_prompt_tokens", "Tokens of prompts")
        self.cached_tokens = self.make(Counter, "onecard_cached_tokens", "Prompts' tokens from the prefix cache")
        self.answer_tokens = self.make(Counter, "onecard_answer_tokens", "Tokens of answers")
        times = {"buckets": SECONDS}
        self.first_token = self.make(
            Histogram, "onecard_first_token_seconds", "Time to an answer's first text", **times
        )
        self.whole = self.make(Histogram, "onecard_answer_seconds", "Time to an answer's end", **times)
        active = self.make(Gauge, "onecard_active_requests", "Requests that are answered now")
        active.set_function(lambda: len(engine.active))
        waiting = self.make(Gauge, "onecard_waiting_requests", "Requests in the queue")
        waiting.set_function(lambda: len(engine.waiting))
        batched = self.make(Gauge, "onecard_batch_size", "Answers in the last forward pass")
        batched.set_function(lambda: engine.batch_size)

    def make(self, kind: Any, name: str, what: str, labels: Any = (), **more: Any) -> Any:
        return kind(name, what, labels, registry=self.registry, **more)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware that counts requests by path and status. A path that is not served counts as other."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in PATHS else "other"
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
