"""Refusals: what a request gets that is not answered, in one class that every server shows in its own shape."""

from __future__ import annotations

from typing import Any

TOO_SLOW, TOO_LONG, TOO_MANY, UNAVAILABLE = 408, 413, 429, 503


class Refusal(Exception):
    """A request that is answered by an error.

    Args:
        status: HTTP status.
        message: one line for people.
        kind: OpenAI's `error.type`.
        param: the field at fault.
        code: a word for programs, as `context_length_exceeded`.
        retry_after: seconds after which the client may try again.
    """

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        if self.retry_after is None:
            return {}
        return {"retry-after": str(max(1, round(self.retry_after)))}


class ClientGone(Exception):
    """The client hung up; nobody reads an answer."""


def one_line(refusal: Refusal) -> dict[str, Any]:
    """{"error": "one line"}."""
    return {"error": refusal.message}


def openai_shape(refusal: Refusal) -> dict[str, Any]:
    """{"error": {message, type, param, code}}, as OpenAI's clients parse it."""
    return {"error": {"message": refusal.message, "type": refusal.kind, "param": refusal.param, "code": refusal.code}}
