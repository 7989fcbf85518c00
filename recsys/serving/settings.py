"""Keys of `python -m recsys serve`. Needs no MindSpore."""

from __future__ import annotations

from pydantic import Field, field_validator

from parallel.common.errors import UserError
from parallel.common.settings import Settings
from parallel.serving.settings import HttpSettings


class EngineSettings(Settings):
    """How requests are scored."""

    requests: int = Field(8, ge=1, le=1024)
    """Requests that are scored together at most."""
    candidates: list[int] = Field(default_factory=lambda: [64, 256, 1024], min_length=1)
    """Sizes, rising, that a batch of candidates is filled up to: one graph each, compiled when the server starts. A
    request with more candidates than the last is scored in several batches."""
    queue: int = Field(64, ge=1)
    """Requests that may wait; beyond that the answer is 503."""
    timeout_seconds: float = Field(2.0, gt=0.0)
    """A request that is not done after this is answered with 503, and not computed if its turn has not come."""
    cache_users: int = Field(10_000, ge=0)
    """User states kept across requests, the least recently used one leaving first; 0 = none (separated models only)."""

    @field_validator("candidates")
    @classmethod
    def _rising(cls, value: list[int]) -> list[int]:
        if value != sorted(set(value)) or value[0] < 1:
            raise UserError("sizes are above 0 and rise", where="engine.candidates", value=value)
        return value


class ServeSettings(HttpSettings):
    """The HTTP server."""

    max_candidates: int = Field(2000, ge=1)
    """Candidates of one request at most."""
    threads: int = Field(2, ge=1)
    """Threads that turn long requests (above 64 KB) into numbers; shorter ones are read at once."""
    fusion: str | None = None
    """Formula of one score out of the tasks' scores, by which candidates are ranked: "click ** 0.7 * (1 + watch)", say
    (+ - * / **, log, log1p, exp, sqrt, abs, min, max); null = the first task's score."""
    request_log: str | None = None
    """File to which every request is appended as it came, with its scores: `recsys evaluate --requests FILE` scores
    them again. It holds what users sent; null = nothing is kept."""
    request_log_mb: int = Field(1024, ge=1)
    """Megabytes after which nothing more is written to it."""
    engine: EngineSettings = EngineSettings()
    """How requests are scored."""
    follow: bool = False
    """Serve the versions that a run publishes (block `publish`) as they come: --checkpoint names the run's folder."""
    follow_seconds: float = Field(0.2, gt=0.0)
    """Between two looks for a new version."""
