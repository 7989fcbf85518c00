"""Keys of `python -m recsys serve`. Needs no MindSpore."""

from __future__ import annotations

from typing import Literal

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

    cache_mb: int = Field(256, ge=1)
    """Megabytes of user states (and their keys) at most."""
    cache_seconds: float | None = Field(None, gt=0.0)
    """How long a user's state is used after it was computed; null = until the model changes or it makes room."""

    @field_validator("candidates")
    @classmethod
    def _rising(cls, value: list[int]) -> list[int]:
        if value != sorted(set(value)) or value[0] < 1:
            raise UserError("sizes are above 0 and rise", where="engine.candidates", value=value)
        return value


class RedisFeatures(Settings):
    """Features in Redis, by id."""

    url: str = "redis://127.0.0.1:6379/0"
    """Of the server; rediss:// for TLS, unix:///path for a socket."""
    user: str = "user:{}"
    """Key of a user's features; {} is the id."""
    item: str = "item:{}"
    """Key of an item's features."""
    user_id: str | None = None
    """Feature of a request that holds the user's id; null = the run's data.user."""
    item_id: str | None = None
    """Feature of a candidate that holds the item's id; null = the first id among the item's features."""
    form: Literal["json", "hash"] = "json"
    """json: the value is a JSON object of features; hash: a Redis hash, lists in it as JSON or with their separator."""
    timeout_seconds: float = Field(0.2, gt=0.0)
    """A request whose features have not come after this is answered with 503."""
    item_seconds: float = Field(60.0, ge=0.0)
    """How long an item's features are kept in the server; 0 = they are asked for at every request."""
    items: int = Field(100_000, ge=0)
    """Items whose features are kept at most."""
    unknown: Literal["missing", "refuse"] = "missing"
    """An id that Redis does not know: its features count as missing, or the request is refused (422)."""

    @field_validator("user", "item")
    @classmethod
    def _pattern(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise UserError("needs one {} for the id", where="features.redis", value=value)
        return value


class FeatureStores(Settings):
    """OutputLayout that know features by id."""

    redis: RedisFeatures | None = None
    """A Redis server (needs the extra `stream`); null = a request gives all features."""


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
    features: FeatureStores = FeatureStores()
    """Where features of users and items are looked up that a request does not give."""
    workers: int = Field(1, ge=1, le=256)
    """Processes that serve on the port, each with the model. A request is scored by the one that its user belongs to,
    so that a user's state is kept once."""
    follow: bool = False
    """Serve the versions that a run publishes (block `publish`) as they come: --checkpoint names the run's folder."""
    follow_seconds: float = Field(0.2, gt=0.0)
    """Between two looks for a new version."""
