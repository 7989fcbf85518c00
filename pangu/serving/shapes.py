"""The JSON of answers, as OpenAI's clients read it.

Source: the OpenAI API reference and the classes of openai-python; where it leaves room (token strings, -9999 for minus
infinity, null for the first token of a prompt), as vLLM's server does.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pangu.serving.choices import Entry, TextDelta


@dataclass
class Usage:
    """Tokens of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def json(self) -> dict[str, Any]:
        """As `usage`."""
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": self.cached_tokens}}


@dataclass
class CompletionShape:
    """Answers of /v1/completions.

    Args:
        model: its name.
        fingerprint: of the model behind it, which seeds depend on.
        logprobs: whether they are shown.
        as_ids: whether tokens in them are called "token_id:N".
    """

    model: str
    fingerprint: str
    logprobs: bool = False
    as_ids: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    object = chunk_object = "text_completion"

    def answer(self, choices: Sequence[TextDelta], usage: Usage) -> dict[str, Any]:
        """The answer that is not streamed."""
        return self._with([self._choice(index, delta) for index, delta in enumerate(choices)], usage.json(),
                          self.object)

    def first(self, index: int) -> list[dict[str, Any]]:
        """Choices that begin a stream of one sequence."""
        return []

    def chunks(self, index: int, delta: TextDelta) -> list[dict[str, Any]]:
        """The choices of a delta, one an event."""
        return [self._choice(index, delta)]

    def event(self, choices: list[dict], usage: Usage | None = None, include_usage: bool = False) -> dict[str, Any]:
        """One event of a stream."""
        made = self._with(choices, None, self.chunk_object)
        if include_usage:
            made["usage"] = None if usage is None else usage.json()
        return made

    def _with(self, choices: list[dict], usage: dict | None, kind: str) -> dict[str, Any]:
        made = {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "system_fingerprint": self.fingerprint, "choices": choices}
        return made if usage is None else {**made, "usage": usage}

    def _choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        return {"index": index, "text": delta.text, "finish_reason": delta.finish_reason,
                "logprobs": self._logprobs(delta.entries) if self.logprobs else None}

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, list]:
        return {"tokens": [self._token(entry.id, entry.text) for entry in entries],
                "token_logprobs": [entry.logprob for entry in entries],
                "top_logprobs": [None if entry.logprob is None else self._top(entry) for entry in entries],
                "text_offset": [entry.offset for entry in entries]}

    def _top(self, entry: Entry) -> dict[str, float]:
        """Log-probabilities by text, the token's own among them. Where ids share a text the likeliest counts, so that a
        token is the greedy one just if its value is the highest."""
        best: dict[str, float] = {}
        for number, text, logprob in ((entry.id, entry.text, entry.logprob), *entry.top):
            name = self._token(number, text)
            best[name] = max(best.get(name, logprob), logprob)
        return best

    def _token(self, number: int, text: str) -> str:
        return f"token_id:{number}" if self.as_ids else text


@dataclass
class ChatShape(CompletionShape):
    """Answers of /v1/chat/completions; the same arguments."""

    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> list[dict[str, Any]]:
        """The role."""
        return [{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                 "finish_reason": None}]

    def chunks(self, index: int, delta: TextDelta) -> list[dict[str, Any]]:
        """Text first; the end in an event of its own."""
        made = []
        if delta.text or delta.entries:
            logprobs = self._logprobs(delta.entries) if self.logprobs else None
            made.append({"index": index, "delta": {"content": delta.text}, "logprobs": logprobs, "finish_reason": None})
        if delta.finish_reason is not None:
            made.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": delta.finish_reason})
        return made

    def _choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        return {"index": index, "message": {"role": "assistant", "content": delta.text, "refusal": None},
                "logprobs": self._logprobs(delta.entries) if self.logprobs else None,
                "finish_reason": delta.finish_reason}

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {"content": [{**self._scored(entry.id, entry.text, entry.logprob),
                             "top_logprobs": [self._scored(*one) for one in entry.top]} for entry in entries],
                "refusal": None}

    def _scored(self, number: int, text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": self._token(number, text), "logprob": logprob, "bytes": list(text.encode())}
