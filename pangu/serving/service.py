"""A language model behind HTTP: what each path does, over an engine and a tokenizer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from pangu.serving.choices import Choice, TextDelta, Texts
from pangu.serving.engine_api import (
    Draining,
    Engine,
    EngineFailure,
    EngineRequest,
    Handle,
    PromptEvent,
    QueueFull,
)
from pangu.serving.metrics import Metrics
from pangu.serving.requests import Ask, Prompt, Reader
from pangu.serving.settings import ServeSettings
from pangu.serving.shapes import ChatShape, CompletionShape, Usage
from parallel.common.errors import UserError
from parallel.serving.application import Front, Reloader
from parallel.serving.errors import TOO_MANY, UNAVAILABLE, Refusal, openai_shape

_SHORT_BYTES = 1 << 12  # what is segmented in well under a millisecond


class Service:
    """One model.

    Args:
        engine: warm.
        tokenizer: of the model.
        settings: bounds.
        name: what clients call the model.
    """

    def __init__(self, engine: Engine, tokenizer: Any, settings: ServeSettings, name: str) -> None:
        self.engine, self.tokenizer, self.settings, self.name = engine, tokenizer, settings, name
        self.texts, self.created = Texts(tokenizer), int(time.time())
        self.reader = Reader(tokenizer, settings, name, engine.context)
        self.metrics = Metrics(engine)
        self.front = Front(settings, self.metrics, openai_shape)
        self.reload = Reloader(self._reload, self.metrics)
        self._threads = ThreadPoolExecutor(2, "requests")

    def _reload(self) -> dict[str, Any]:
        return {"version": self.engine.reload(), "checkpoint": self.engine.stats().checkpoint}

    async def read(self, request: Any, read: Callable[[Any], Any]) -> Any:
        """`read` of the JSON of a request; a long one is read in a thread, since segmenting text takes time.

        Raises:
            Refusal: 400 and others.
            ClientGone: the client hung up.
        """
        body = await self.front.json(request)
        if int(request.headers.get("content-length", _SHORT_BYTES)) < _SHORT_BYTES:
            return read(body)
        return await asyncio.get_running_loop().run_in_executor(self._threads, read, body)

    def begin(self, ask: Ask) -> Answer:
        """Queues the sequences of a request.

        Raises:
            Refusal: 429 the queue is full, 503 the server ends, 400 what the engine refuses.
        """
        kind = ChatShape if ask.chat else CompletionShape
        shape = kind(self.name, f"v{self.engine.stats().version}", ask.logprobs is not None, ask.as_ids)
        answer = Answer(ask, shape, self.texts, self.metrics)
        try:
            for prompt in ask.prompts:
                for sample in range(ask.best_of):
                    answer.add(prompt, self.engine.submit(_request(prompt, ask, sample, shape.id)))
        except BaseException as error:
            answer.cancel()
            raise _refusal(error) from None
        return answer

    def models(self) -> list[dict[str, Any]]:
        """The one model, as /v1/models lists it."""
        return [{"id": self.name, "object": "model", "created": self.created, "owned_by": "local", "root": self.name,
                 "parent": None, "max_model_len": self.engine.context}]

    def tokenizer_info(self) -> dict[str, Any]:
        """What evaluation clients ask before they tokenize here."""
        return {"tokenizer_class": "PanGuTokenizer", "vocab_size": self.tokenizer.vocabulary_size,
                "model_max_length": self.engine.context, "bos_token": None, "eos_token": self.reader.eos_token,
                "pad_token": "<pad>", "unk_token": "<unk>", "eos_token_id": self.tokenizer.eot_id,
                "pad_token_id": self.tokenizer.pad_id, "add_bos_token": False, "add_eos_token": False,
                "chat_template": self.reader.template.text}

    def health(self) -> dict[str, Any]:
        """State of the server, whose graphs are warm."""
        stats = self.engine.stats()
        return {"status": "ok", "model": self.name, "version": stats.version, "checkpoint": stats.checkpoint,
                "context": self.engine.context, "running": stats.running, "waiting": stats.waiting}


def _request(prompt: Prompt, ask: Ask, sample: int, number: str) -> EngineRequest:
    params = replace(ask.params, sample=sample)
    if ask.best_of > ask.n and params.logprobs is None:
        params = replace(params, logprobs=0)
    return EngineRequest(prompt.ids, params, f"{number}-{sample}")


def _refusal(error: BaseException) -> BaseException:
    """What a client is sent about an error of the engine; anything else unchanged."""
    if isinstance(error, QueueFull):
        return Refusal(TOO_MANY, f"{error.what}: {error.value} requests wait", kind="rate_limit_error",
                       code="queue_full", retry_after=error.retry_after)
    if isinstance(error, Draining):
        return Refusal(UNAVAILABLE, error.what, kind="server_error", code="shutting_down", retry_after=5.0)
    if isinstance(error, EngineFailure):
        return Refusal(500, str(error) or "the engine failed", kind="server_error", code="engine_failure")
    if isinstance(error, UserError):
        return Refusal(400, str(error), code="invalid_value")
    return error


class Answer:
    """The sequences of one request while they are generated.

    Args:
        ask: the request.
        shape: of its JSON.
        texts: of ids.
        metrics: counts every sequence.
    """

    def __init__(self, ask: Ask, shape: CompletionShape, texts: Texts, metrics: Metrics) -> None:
        self.ask, self.shape, self.texts, self.metrics = ask, shape, texts, metrics
        self.usage = Usage(sum(len(prompt.ids) for prompt in ask.prompts))
        self._sequences: list[tuple[Prompt, Handle, Choice]] = []
        self._begun = time.perf_counter()

    def add(self, prompt: Prompt, handle: Handle) -> None:
        """One more sequence, prompt after prompt."""
        offset = 0
        if self.ask.echo:
            offset = sum(len(self.texts(number)) for number in prompt.ids)
        self._sequences.append((prompt, handle, Choice(self.texts, self.ask.stops, self.ask.params.stop_ids, offset)))

    def cancel(self) -> None:
        """Frees what the sequences hold; those that are done are left alone."""
        for _, handle, _ in self._sequences:
            handle.cancel()

    async def complete(self) -> dict[str, Any]:
        """The answer that is not streamed.

        Raises:
            Refusal: the engine failed or was stopped.
        """
        made: list[list[TextDelta]] = [[] for _ in self._sequences]
        tasks = [asyncio.ensure_future(self._drive(index, lambda index, delta: made[index].append(delta)))
                 for index in range(len(self._sequences))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            self.cancel()
        joined = [TextDelta("".join(delta.text for delta in deltas),
                            tuple(entry for delta in deltas for entry in delta.entries), deltas[-1].finish_reason)
                  for deltas in made]
        return self.shape.answer([joined[index] for index in self._best()], self.usage)

    def _best(self) -> list[int]:
        """Of each prompt's sequences the `n` to be given, the best first where there are more."""
        n, best_of = self.ask.n, self.ask.best_of
        chosen = []
        for first in range(0, len(self._sequences), best_of):
            group = list(range(first, first + best_of))
            if best_of > n:
                group.sort(key=lambda index: -self._sequences[index][2].mean_logprob)
            chosen += group[:n]
        return chosen

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """Events of a stream.

        Raises:
            Refusal: the engine failed or was stopped.
        """
        arriving: asyncio.Queue = asyncio.Queue()
        tasks = [asyncio.ensure_future(self._drive(index, lambda *pair: arriving.put_nowait(pair)))
                 for index in range(len(self._sequences))]
        for task in tasks:
            task.add_done_callback(lambda task: arriving.put_nowait((-1, task)))
        try:
            for index in range(len(tasks)):
                for choice in self.shape.first(index):
                    yield self._event([choice])
            left = len(tasks)
            while left:
                index, delta = await arriving.get()
                if isinstance(delta, asyncio.Future):
                    left -= 1
                    if not delta.cancelled():
                        delta.result()  # raises what ended it
                    continue
                for choice in self.shape.chunks(index, delta):
                    yield self._event([choice])
            if self.ask.include_usage:
                yield self.shape.event([], self.usage, True)
        finally:
            for task in tasks:
                task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody else asks for it
                task.cancel()
            self.cancel()

    def _event(self, choices: list[dict]) -> dict[str, Any]:
        return self.shape.event(choices, None, self.ask.include_usage)

    async def _drive(self, index: int, give: Callable[[int, TextDelta], None]) -> None:
        """Reads one sequence to its end and gives its deltas."""
        prompt, handle, choice = self._sequences[index]
        times = self.metrics.sequence(self._begun)
        try:
            async for event in handle:
                if isinstance(event, PromptEvent):
                    if index % self.ask.best_of == 0:
                        self.usage.cached_tokens += event.cached_tokens
                    if self.ask.echo:
                        give(index, TextDelta(prompt.text, self.texts.prompt_entries(prompt.ids, event.logprobs)))
                    continue
                if event.finish_reason == "cancelled":
                    raise Refusal(UNAVAILABLE, "the server ended before the answer", kind="server_error",
                                  code="shutting_down")
                times.token(event.id is not None)
                delta = choice.feed(event)
                if delta.text or delta.entries or delta.finish_reason is not None:
                    give(index, delta)
                if choice.finish_reason is not None:
                    break
        except (EngineFailure, UserError) as error:
            raise _refusal(error) from None
        handle.cancel()  # a stop string ends it before the engine does
        self.usage.completion_tokens += choice.tokens
        times.end(len(prompt.ids), choice.tokens, choice.finish_reason or "")
