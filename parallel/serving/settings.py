"""Keys that every HTTP server has. Needs no web framework."""

from __future__ import annotations

from pydantic import Field

from parallel.common.settings import Settings


class HttpSettings(Settings):
    """Where a server listens, and what it puts up with."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = all of the machine's."""
    port: int = Field(8000, ge=0, le=65535)
    """Port; 0 = any free one (printed on stderr)."""
    api_key_variable: str = "SERVE_API_KEY"
    """Environment variable that holds the API key. Where it is set, every request but GET / and GET /health must carry
    it as `Authorization: Bearer KEY`."""
    cors_origins: list[str] = []
    """Origins (https://example.org) whose pages may call this server from a browser, or ["*"]; none = no page but the
    server's own."""
    max_body_bytes: int = Field(4 << 20, ge=1024)
    """Longest request that is read."""
    bodies: int = Field(64, ge=1)
    """Bodies that are read at the same time. When another one comes, the one that has been coming the longest is turned
    away (408), so that slow clients never keep out good ones."""
    body_rate: int = Field(4096, ge=0)
    """Bytes a second that a body must come with, after its first `body_grace_seconds`; else 408."""
    body_grace_seconds: float = Field(2.0, gt=0.0)
    """How long a body may come slower than `body_rate`."""
    body_seconds: float = Field(30.0, gt=0.0)
    """Longest time for a body at any rate; else 408."""
    header_seconds: float = Field(10.0, gt=0.0)
    """A connection that has not sent the head of a request after this long is closed (408 where it has begun)."""
    idle_seconds: float = Field(75.0, gt=0.0)
    """A connection without a request is kept open for so long."""
    write_seconds: float = Field(30.0, gt=0.0)
    """A client that reads nothing of its answer for this long is disconnected."""
    connections: int = Field(1024, ge=1)
    """Connections at the same time. When another one comes, the idle or half-open one that has waited the longest is
    closed; where all are busy, the new one."""
    drain_seconds: float = Field(120.0, gt=0.0)
    """After SIGTERM or SIGINT, what was accepted is finished for at most so long."""
