"""How the engine runs requests. Needs no MindSpore."""

from __future__ import annotations

from pydantic import Field

from parallel.common.settings import Settings


class EngineSettings(Settings):
    """Batch, cache and queue of the engine. No setting changes what a request gets, only when."""

    running: int = Field(32, ge=1, le=1024)
    """Requests in the batch at most; more wait."""
    queue: int = Field(256, ge=1)
    """Requests that may wait; beyond that the answer is 429."""
    prefill_chunk: int = Field(64, ge=1)
    """Tokens of prompts that are read in one step, between two tokens of those that generate."""
    cache_bytes: int = Field(1 << 30, ge=1)
    """Memory for keys and values, taken as it is first used. It holds one request of full length in any case."""
    share_prefixes: bool = True
    """Whether the beginnings that requests have in common are computed once."""
