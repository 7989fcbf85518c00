"""What the HTTP server and the engine know of each other: ids go in, tokens come out. Needs no MindSpore.

A request is ids and sampling settings; text, templates and stop strings are the server's. The answer is a `Handle`: a
stream of events that begins with one `PromptEvent`, goes on with a `TokenEvent` a token and ends with an event whose
`finish_reason` is set. Handles may be read from any thread, or from an event loop with `async for`. What is known of a
token's probability is a `pangu.generation.scheduler.TokenLogprob`.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pangu.generation.scheduler import TokenLogprob
from parallel.common.errors import UserError

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued.

    Args:
        max_tokens: tokens generated at most; 0 = only the prompt is read. The context is a limit too.
        temperature: logits are divided by it; 0 = greedy.
        top_p: only the fewest tokens whose probability reaches p may be drawn; 1 = all.
        top_k: only the k likeliest may be drawn; 0 = all.
        stop_ids: tokens that end the request; None = the model's end of document.
        seed: of the request's random stream; None = another one for every request.
        sample: the number of this one among requests with equal prompt and seed (n > 1, best_of), which draw
            differently. Seed and sample give what `pangu generate` gives to the prompt's n-th repetition.
        logit_bias: added to the logits of these ids before everything else.
        presence_penalty: taken once from the logits of tokens that were generated.
        frequency_penalty: taken for every time they were.
        logprobs: None = no log-probabilities; k = that of each generated token, and the k likeliest ones there.
        prompt_logprobs: the same for the tokens of the prompt ("echo").

    Log-probabilities are those of the model, before temperature, penalties and bias.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] | None = None
    seed: int | None = None
    sample: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class EngineRequest:
    """The ids of a prompt, and how it is continued. `id` is for logs only."""

    prompt_ids: Sequence[int]
    params: SamplingParams = SamplingParams()
    id: str = ""


@dataclass(frozen=True)
class PromptEvent:
    """The prompt has been read: the first event of every request that is not cancelled before.

    Args:
        prompt_tokens: its length.
        cached_tokens: of those, how many were not computed, since a request before had them in common.
        logprobs: with `prompt_logprobs`, one for each token of the prompt; the first is None, nothing precedes it.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: None = None


@dataclass(frozen=True)
class TokenEvent:
    """One step of a request.

    Args:
        id: the token; None where the end came without one (max_tokens 0, or cancelled). A stop id that ended the
            request is given and is not part of the text.
        logprob: with `logprobs`.
        finish_reason: None but for the last event. "stop": a stop id; "length": max_tokens or the context's end.
    """

    id: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None


Event = PromptEvent | TokenEvent


class QueueFull(UserError):
    """The queue is full; to be tried again after `retry_after` seconds (HTTP 429)."""

    def __init__(self, waiting: int, retry_after: float = 1.0) -> None:
        super().__init__("the queue is full", value=waiting)
        self.retry_after = retry_after


class Draining(UserError):
    """The engine accepts nothing more, for it is about to stop (HTTP 503)."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class EngineFailure(RuntimeError):
    """The engine itself failed; its requests cannot be answered (HTTP 500)."""


class Handle:
    """The answer to one request, as it comes. Made by the engine.

    Args:
        request: what was asked.
        cancel: called once, from the thread that cancels.
    """

    def __init__(self, request: EngineRequest, cancel: Callable[[Handle], None]) -> None:
        self.request, self._cancel = request, cancel
        self._events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._wake: Callable[[], None] | None = None
        self.finished = False
        """Whether the engine is done with it; events may still wait to be read."""

    def cancel(self) -> None:
        """Ends the request and frees what it holds, at the next step at the latest; a finished one is left alone.

        The stream ends with finish_reason "cancelled". May be called more than once and from any thread.
        """
        if not self.finished:
            self._cancel(self)

    def push(self, event: Event | Exception) -> None:
        """For the engine: the next event, or what is to be raised instead. Nothing comes after an end."""
        if self.finished:
            return
        self.finished = isinstance(event, Exception) or event.finish_reason is not None
        self._events.put(event)
        if (wake := self._wake) is not None:
            wake()

    def __iter__(self) -> Iterator[Event]:
        """Events until the end, waiting for each.

        Raises:
            EngineFailure: the engine failed.
        """
        while True:
            event = self._read(self._events.get())
            yield event
            if event.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The same for an event loop, which is not kept waiting. Leaving the loop early does not cancel."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(ready.set)
            except RuntimeError:  # the loop is closed: nobody reads any more
                self._wake = None

        self._wake = wake
        while True:
            ready.clear()
            while not self._events.empty():
                event = self._read(self._events.get())
                yield event
                if event.finish_reason is not None:
                    return
            await ready.wait()

    @staticmethod
    def _read(event: Event | Exception) -> Event:
        if isinstance(event, Exception):
            raise event
        return event


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and what holds at this moment. Totals only rise."""

    running: int = 0
    """Requests in the batch."""
    waiting: int = 0
    """Requests that wait for a slot or for blocks."""
    blocks_total: int = 0
    """Blocks of the key and value cache."""
    blocks_used: int = 0
    """Blocks that requests hold; what is only kept for a prefix that may come again is free."""
    blocks_cached: int = 0
    """Free blocks whose content is kept for a prefix that may come again."""
    version: int = 1
    """Rises with every reload."""
    checkpoint: str = ""
    """The folder that is served."""
    prompt_tokens_total: int = 0
    """Tokens of prompts, the cached ones included."""
    cached_tokens_total: int = 0
    """Tokens of prompts that were not computed, since the prefix was there."""
    generation_tokens_total: int = 0
    """Tokens generated."""
    requests_total: int = 0
    """Requests accepted."""
    finished_total: int = 0
    """Requests that came to their end."""
    cancelled_total: int = 0
    """Requests that were cancelled."""
    preemptions_total: int = 0
    """Times a request lost its blocks to an older one, to be computed again."""
    steps_total: int = 0
    """Steps of the model."""


class Engine(Protocol):
    """What the server needs of an engine. All methods may be called from any thread."""

    context: int
    """Positions of the model: a prompt and what is generated fit into them."""
    vocabulary_size: int
    """Ids are below it."""
    eot_id: int
    """End of document."""

    def submit(self, request: EngineRequest) -> Handle:
        """Queues a request.

        A prompt may be as long as the context, and one token more than there are positions can be generated, since
        the last need not be read: min(max_tokens, context - len(prompt) + 1) tokens come.

        Raises:
            UserError: an empty prompt, a prompt longer than the context, an id outside the vocabulary, or settings
                that cannot be.
            QueueFull: to be tried again.
            Draining: `drain` or `close` was called.
        """

    def stats(self) -> EngineStats:
        """For /health and /metrics; waits for nothing."""

    def reload(self, checkpoint: str | None = None) -> int:
        """Loads another checkpoint and replaces the model by it; returns the new version. Blocks the caller.

        What runs is finished with the parameters it began with; what waits gets the new ones. None = the newest of
        the folder that is served.

        Raises:
            UserError: no checkpoint, or it belongs to another model; the old parameters stay.
        """

    def drain(self, timeout: float | None = None) -> bool:
        """Accepts nothing more and waits until all that was accepted is done; False if `timeout` (s) came first."""

    def close(self) -> None:
        """Stops at once; what still runs ends as cancelled."""
