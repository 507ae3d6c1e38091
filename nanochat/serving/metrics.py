"""What Prometheus may scrape. One registry per server: nothing global, so that tests may run many.

Latencies are measured at the front, where a client would feel them, the engine's own numbers are those of its last
report. Tokens per second are the rate of `nanochat_generated_tokens_total`; the gauge is a convenience for people.
"""

import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 5)
GAUGES = {
    "waiting": "answers that wait for a place in the batch",
    "running": "answers in the batch",
    "blocks_used": "blocks of the key/value cache that running answers hold",
    "blocks_total": "blocks of the key/value cache",
    "blocks_cached": "blocks that hold reusable beginnings",
    "prompt_tokens": "prompt tokens since the engine's start",
    "cached_prompt_tokens": "prompt tokens whose keys were found in the cache",
    "preemptions": "answers put back to make room",
    "steps": "steps since the engine's start",
}


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("nanochat_requests", "HTTP requests answered", ["path", "status"], registry=registry)
        self.refused = Counter("nanochat_refused", "requests refused because too much waited", registry=registry)
        self.cancelled = Counter("nanochat_cancelled", "answers given up before their end", registry=registry)
        self.restarts = Counter("nanochat_engine_restarts", "engines replaced after their death", registry=registry)
        self.generated = Counter("nanochat_generated_tokens", "tokens sent to clients", registry=registry)
        self.prompted = Counter("nanochat_prompt_tokens", "prompt tokens of accepted requests", registry=registry)
        self.first = Histogram(
            "nanochat_time_to_first_token_seconds", "from the request to its first token", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.between = Histogram(
            "nanochat_inter_token_seconds", "between tokens of one answer", buckets=STEP_SECONDS, registry=registry
        )
        self.whole = Histogram(
            "nanochat_request_seconds", "from the request to the end of its answers", buckets=SECONDS, registry=registry
        )
        self.rate = Gauge("nanochat_tokens_per_second", "generated, over the last ten seconds", registry=registry)
        self.gauges = {
            name: Gauge(f"nanochat_engine_{name}", about, ["engine"], registry=registry)
            for name, about in GAUGES.items()
        }
        self._recent: list[tuple[float, int]] = []
        self._mean = 1.0

    def engine(self, index: int, stats: Mapping[str, Any]) -> None:
        """An engine's report; an empty one for an engine that has died."""
        for name, gauge in self.gauges.items():
            value = stats.get(name, 0)
            gauge.labels(str(index)).set(sum(value) if isinstance(value, list | tuple) else value)

    def tokens(self, count: int) -> None:
        """Tokens that have just been taken from an engine."""
        self.generated.inc(count)
        now = time.monotonic()
        second = float(int(now))
        if self._recent and self._recent[-1][0] == second:
            self._recent[-1] = (second, self._recent[-1][1] + count)
        else:
            self._recent = [entry for entry in self._recent if entry[0] >= second - 10] + [(second, count)]

    def finished(self, seconds: float) -> None:
        """A request's answers are all over."""
        self.whole.observe(seconds)
        self._mean += 0.1 * (seconds - self._mean)

    def mean_seconds(self) -> float:
        """Of recent requests: what a Retry-After is reckoned from."""
        return self._mean

    def render(self) -> bytes:
        now = int(time.monotonic())
        self.rate.set(sum(count for second, count in self._recent if now - 10 <= second < now) / 10)
        return generate_latest(self.registry)
