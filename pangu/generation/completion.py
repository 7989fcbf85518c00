"""One request while it is generated: its tokens, its text as far as it is certain, and why it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pangu.generation import scheduler
from pangu.generation.sampling import Sampler


@dataclass
class Completion:
    """What one prompt became.

    Args:
        text: the continuation, truncated before the stop string.
        ids: the generated ids, without the stop id; those of a stop string are still in it.
        reason: "stop_id", "stop", "max_new_tokens", or "context" (the model's positions are used up).
        prompt_tokens: ids of the prompt that were read.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    reason: str = ""
    prompt_tokens: int = 0


class StopScanner:
    """Finds stop strings in text that arrives in parts; hands out what can no longer be part of one.

    Args:
        stops: non-empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = list(stops)
        self.found = False
        self._held = ""

    def feed(self, piece: str) -> str:
        """The text that has become certain. After a stop string was found everything else is dropped."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[:min(places)]
        held = max((self._overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held:]
        return text[:len(text) - held]

    def finish(self) -> str:
        """What was still held back."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that is a beginning of `stop`."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0


class GenerationState(scheduler.Sequence):
    """One prompt on its way.

    Args:
        prompt: its ids.
        sampler: chooses its tokens.
        limit: tokens to generate at most, and why it ends there.
        stop_ids: tokens that end it.
        stops: strings that end it.
        decoder: a `StreamDecoder`, or None where no text is wanted.
        on_text: called with each part of the text that has become certain.
    """

    def __init__(self, prompt: list[int], sampler: Sampler, limit: tuple[int, str], stop_ids: frozenset[int],
                 stops: Sequence[str], decoder: Any = None, on_text: Callable[[str], None] | None = None) -> None:
        super().__init__(prompt, sampler)
        self.stop_ids = stop_ids
        self.room, self._at_limit = limit
        self._decoder, self._scanner, self._on_text = decoder, StopScanner(stops), on_text
        self._pieces: list[str] = []
        self.ids: list[int] = []
        self.generated = 0
        self.reason = ""

    @property
    def done(self) -> bool:
        return bool(self.reason)

    def feed(self, token: int, logprob: scheduler.TokenLogprob | None = None) -> None:
        self.generated += 1
        if token in self.stop_ids:
            self._finish("stop_id")
            return
        self.ids.append(token)
        if self._decoder is not None:
            self._add(self._scanner.feed(self._decoder.feed(token)))
            if self._scanner.found:
                self._finish("stop")
                return
        if len(self.ids) >= self.room:
            self._finish(self._at_limit)

    def _finish(self, reason: str) -> None:
        self.reason = reason
        if self._decoder is not None:
            self._add(self._scanner.feed(self._decoder.finish()))
            self._add(self._scanner.finish())

    def _add(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._on_text is not None:
                self._on_text(piece)

    def completion(self) -> Completion:
        """The result so far."""
        return Completion("".join(self._pieces), list(self.ids), self.reason, len(self.prompt))
