"""One sequence on its way from the engine's tokens to text: decoded, stopped by strings, with its log-probabilities."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pangu.generation.completion import StopScanner
from pangu.serving.engine_api import TokenEvent, TokenLogprob

LOWEST = -9999.0  # what minus infinity becomes, which JSON has not


@dataclass(frozen=True)
class Entry:
    """A token with its log-probability.

    Args:
        id: the token.
        text: what it adds to the text; the name of a special one.
        logprob: None for the first token of a prompt.
        top: (id, text, log-probability) of the likeliest, best first.
        offset: where its text begins, in characters.
    """

    id: int
    text: str
    logprob: float | None
    top: tuple[tuple[int, str, float], ...]
    offset: int


@dataclass(frozen=True)
class TextDelta:
    """What has become certain of a sequence since the last delta."""

    text: str = ""
    entries: tuple[Entry, ...] = ()
    finish_reason: str | None = None


class Texts:
    """The text of single ids, remembered.

    Args:
        tokenizer: a `pangu.data.tokenizer.Tokenizer`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, number: int) -> str:
        text = self._known.get(number)
        if text is None:
            text = self._known[number] = self.tokenizer.decode([number])
        return text

    def entry(self, scored: TokenLogprob, offset: int) -> Entry:
        """A token's `Entry`."""
        top = tuple((number, self(number), max(logprob, LOWEST)) for number, logprob in scored.top)
        return Entry(scored.id, self(scored.id), max(scored.logprob, LOWEST), top, offset)

    def prompt_entries(self, ids: Sequence[int], scores: Sequence[TokenLogprob | None] | None) -> tuple[Entry, ...]:
        """Of the tokens of a prompt; nothing precedes the first."""
        entries, offset = [], 0
        for number, scored in zip(ids, scores or (), strict=False):
            entries.append(Entry(number, self(number), None, (), offset) if scored is None
                           else self.entry(scored, offset))
            offset += len(entries[-1].text)
        return tuple(entries)


@dataclass
class Choice:
    """A sequence.

    Args:
        texts: of ids.
        stops: strings that end it, in the tokenizer's normal form.
        stop_ids: ids that end it; they are no part of the text.
        offset: where its text begins (behind an echoed prompt).
    """

    texts: Texts
    stops: Sequence[str]
    stop_ids: Sequence[int]
    offset: int = 0
    finish_reason: str | None = None
    tokens: int = 0
    total_logprob: float = 0.0
    _open: deque[Entry] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._scanner, self._decoder = StopScanner(self.stops), self.texts.tokenizer.stream()
        self._decoded = self._released = 0  # characters

    @property
    def mean_logprob(self) -> float:
        """What `best_of` ranks by."""
        return self.total_logprob / max(1, self.tokens)

    def feed(self, event: TokenEvent) -> TextDelta:
        """Takes a token; where a stop string is found `finish_reason` is set, though the engine knows nothing of it."""
        delta = ""
        if event.id is not None:
            self.tokens += 1
            if event.logprob is not None:
                self.total_logprob += event.logprob.logprob
                self._open.append(self.texts.entry(event.logprob, self.offset + self._decoded))
            if not (event.finish_reason == "stop" and event.id in self.stop_ids):
                decoded = self._decoder.feed(event.id)
                self._decoded += len(decoded)
                delta = self._scanner.feed(decoded)
        if not self._scanner.found and event.finish_reason is not None:
            last = self._decoder.finish()
            self._decoded += len(last)
            delta += self._scanner.feed(last)
            delta += self._scanner.finish()
        self._released += len(delta)
        self.finish_reason = "stop" if self._scanner.found else event.finish_reason
        return TextDelta(delta, tuple(self._certain()), self.finish_reason)

    def _certain(self) -> list[Entry]:
        """Entries of the tokens whose text has been given out; at the end of all but those behind a stop string."""
        entries, end = [], self.offset + self._released
        at_end = self.finish_reason is not None and not self._scanner.found
        while self._open and (at_end or self._open[0].offset < end):
            entries.append(self._open.popleft())
        if self._scanner.found:
            self._open.clear()
        return entries
