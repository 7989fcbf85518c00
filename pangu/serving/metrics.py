"""Metrics of the language model's server for Prometheus: the names are vLLM's, with another prefix."""

from __future__ import annotations

import time
from typing import Any

from pangu.serving.engine_api import Engine
from parallel.serving.metrics import HttpMetrics

PREFIX = "pangu"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 1.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


class Metrics(HttpMetrics):
    """Of one engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(PREFIX, _SECONDS)
        from prometheus_client import Counter, Histogram

        kept = {"registry": self.registry}
        self.first_token = Histogram(f"{PREFIX}_time_to_first_token_seconds", "From a request to its first token",
                                     buckets=_SECONDS, **kept)
        self.per_token = Histogram(f"{PREFIX}_inter_token_latency_seconds", "From a token to the next",
                                   buckets=_TOKEN_SECONDS, **kept)
        self.latency = Histogram(f"{PREFIX}_e2e_request_latency_seconds", "From a request to the end of a sequence",
                                 buckets=_SECONDS, **kept)
        self.prompt_sizes = Histogram(f"{PREFIX}_request_prompt_tokens", "Tokens of a prompt", buckets=_TOKENS, **kept)
        self.sizes = Histogram(f"{PREFIX}_request_generation_tokens", "Tokens generated for a sequence",
                               buckets=_TOKENS, **kept)
        self.finished = Counter(f"{PREFIX}_request_success", "Sequences by why they ended", ["finished_reason"], **kept)
        self._of_engine(engine)

    def _of_engine(self, engine: Engine) -> None:
        def value(name: str) -> Any:
            return lambda: getattr(engine.stats(), name)

        for name, what, read in (
                ("num_requests_running", "Sequences in the batch", value("running")),
                ("num_requests_waiting", "Sequences that wait", value("waiting")),
                ("kv_cache_usage_perc", "Blocks in use, 1 = all",
                 lambda: engine.stats().blocks_used / max(1, engine.stats().blocks_total)),
                ("model_version", "Rises with every reload", value("version"))):
            self.gauge(name, what, read)
        for name, what, field in (
                ("prompt_tokens", "Tokens of prompts", "prompt_tokens_total"),
                ("prompt_tokens_cached", "Of those, not computed", "cached_tokens_total"),
                ("generation_tokens", "Tokens generated", "generation_tokens_total"),
                ("num_preemptions", "Sequences put back for others", "preemptions_total"),
                ("sequences", "Sequences accepted", "requests_total"),
                ("sequences_cancelled", "Sequences given up", "cancelled_total"),
                ("engine_steps", "Steps of the model", "steps_total")):
            self.counter(name, what, value(field))

    def sequence(self, begun: float) -> SequenceTimes:
        """Times of one sequence; `begun` by `time.perf_counter`."""
        return SequenceTimes(self, begun)


class SequenceTimes:
    """Of one sequence."""

    def __init__(self, metrics: Metrics, begun: float) -> None:
        self._metrics, self._begun, self._last = metrics, begun, None

    def token(self, is_token: bool) -> None:
        """A token has come (or the end without one)."""
        if not is_token:
            return
        now = time.perf_counter()
        if self._last is None:
            self._metrics.first_token.observe(now - self._begun)
        else:
            self._metrics.per_token.observe(now - self._last)
        self._last = now

    def end(self, prompt_tokens: int, tokens: int, reason: str) -> None:
        """The sequence is done."""
        metrics = self._metrics
        metrics.latency.observe(time.perf_counter() - self._begun)
        metrics.prompt_sizes.observe(prompt_tokens)
        metrics.sizes.observe(tokens)
        metrics.finished.labels(reason).inc()
