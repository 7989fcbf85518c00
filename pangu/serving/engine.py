"""The engine: one thread that runs all requests in one batch, step by step (see `pangu.generation.scheduler`).

Other threads put requests and cancellations into its inbox and read the events of their handles. A reload leaves what
runs with the model it began with: for a while two models take turns, step by step.
"""

from __future__ import annotations

import secrets
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from pangu.generation.backend import Backend, load_backend
from pangu.generation.runner import Runner, cache_bytes_per_token
from pangu.generation.sampling import Sampler, SamplingRule, request_stream
from pangu.generation.scheduler import Counters, Scheduler, Scores, Sequence, TokenLogprob
from pangu.serving.engine_api import (
    Draining,
    EngineFailure,
    EngineRequest,
    EngineStats,
    Event,
    FinishReason,
    Handle,
    PromptEvent,
    QueueFull,
    SamplingParams,
    TokenEvent,
)
from pangu.serving.engine_settings import EngineSettings
from parallel.common.errors import UserError

if TYPE_CHECKING:
    from pangu.generation.sharded.model import ShardedModel
    from pangu.settings import Run

_MOST_TOP_LOGPROBS = 1000
_SEED_BITS = 64


class _Running(Sequence):
    """A request in the scheduler, which informs its handle of what happens."""

    def __init__(self, handle: Handle, stop_ids: frozenset[int], room: int, sampler: Sampler) -> None:
        params = handle.request.params
        super().__init__(handle.request.prompt_ids, sampler, params.logprobs, params.prompt_logprobs)
        self.handle, self.stop_ids, self.room = handle, stop_ids, room
        self.events: list[Event] = []
        """What the handle is given once the step is over, when its blocks are free if this is the end."""
        self.generated = 0
        self.reason: FinishReason | None = None

    @property
    def done(self) -> bool:
        return self.reason is not None

    def read(self, cached: int, scores: Scores | None) -> None:
        self.events.append(PromptEvent(len(self.prompt), cached, None if scores is None else tuple(scores)))
        if self.room == 0:
            self.reason = "length"
            self.events.append(TokenEvent(None, None, "length"))

    def feed(self, token: int, logprob: TokenLogprob | None = None) -> None:
        self.generated += 1
        if token in self.stop_ids:
            self.reason = "stop"
        elif self.generated >= self.room:
            self.reason = "length"
        self.events.append(TokenEvent(token, logprob, self.reason))

    def deliver(self) -> None:
        """Hands the events over."""
        for event in self.events:
            self.handle.push(event)
        self.events.clear()


class BatchingEngine:
    """An `engine_api.Engine` over a model.

    Args:
        backend: the model.
        checkpoint: where it came from.
        settings: batch, cache, queue.
        load: a checkpoint's folder, or None for the newest -> its backend and its path; for `reload`.

    Raises:
        UserError: the cache is larger than the memory that is left.
    """

    def __init__(self, backend: Backend, checkpoint: str, settings: EngineSettings,
                 load: Callable[[str | None], tuple[Backend, str]] | None = None) -> None:
        config = backend.config
        self.context, self.vocabulary_size, self.eot_id = config.sequence_length, config.vocabulary_size, config.eot_id
        self.settings, self.version, self.checkpoint = settings, 1, checkpoint
        self._config, self._load, self._load_lock = config, load, threading.Lock()
        self._wake = threading.Condition()
        self._inbox: deque[_Running] = deque()
        self._cancelled: set[Handle] = set()
        self._open: dict[Handle, _Running] = {}
        self._replacement: tuple[Scheduler, Backend, str] | None = None
        self._unused: list[Backend] = []
        self._draining = self._closed = False
        self._past, self._requests, self._finished, self._cancellations = Counters(), 0, 0, 0
        self._schedulers = [self._scheduler(backend)]
        self._backends = {self._schedulers[0]: backend}
        self._thread = threading.Thread(target=self._work, name="generating", daemon=True)
        self._thread.start()

    # -- for other threads --------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> Handle:
        """See `Engine`."""
        running = self._prepared(request)
        with self._wake:
            if self._draining or self._closed:
                raise Draining
            waiting = len(self._inbox) + sum(len(scheduler.waiting) for scheduler in self._schedulers)
            if waiting >= self.settings.queue:
                raise QueueFull(waiting)
            self._requests += 1
            self._open[running.handle] = running
            self._inbox.append(running)
            self._wake.notify_all()
        return running.handle

    def stats(self) -> EngineStats:
        """See `Engine`."""
        with self._wake:
            schedulers = list(self._schedulers)
            counters = [self._past, *(scheduler.counters for scheduler in schedulers)]
            pools = [scheduler.pool for scheduler in schedulers]
            return EngineStats(
                running=sum(len(scheduler.running) for scheduler in schedulers),
                waiting=len(self._inbox) + sum(len(scheduler.waiting) for scheduler in schedulers),
                blocks_total=sum(pool.blocks for pool in pools), blocks_used=sum(pool.used for pool in pools),
                blocks_cached=sum(pool.kept for pool in pools), version=self.version, checkpoint=self.checkpoint,
                prompt_tokens_total=sum(item.prompt_tokens for item in counters),
                cached_tokens_total=sum(item.cached_tokens for item in counters),
                generation_tokens_total=sum(item.generated for item in counters), requests_total=self._requests,
                finished_total=self._finished, cancelled_total=self._cancellations,
                preemptions_total=sum(item.preemptions for item in counters),
                steps_total=sum(item.steps for item in counters))

    def reload(self, checkpoint: str | None = None) -> int:
        """See `Engine`."""
        if self._load is None:
            raise UserError("this engine was made without a way to load", where="reload")
        with self._load_lock:
            backend, place = self._load(checkpoint)
            try:
                scheduler = self._scheduler(backend)
            except BaseException:
                backend.close()
                raise
            with self._wake:
                if self._closed:
                    raise Draining
                self._replacement = scheduler, backend, place
                self._wake.notify_all()
                self._wake.wait_for(lambda: self._replacement is None or self._closed)
                return self.version

    def drain(self, timeout: float | None = None) -> bool:
        """See `Engine`."""
        with self._wake:
            self._draining = True
            return self._wake.wait_for(lambda: not self._open, timeout)

    def close(self) -> None:
        """See `Engine`."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _cancel(self, handle: Handle) -> None:
        with self._wake:
            if handle in self._open:
                self._cancelled.add(handle)
                self._wake.notify_all()

    def _prepared(self, request: EngineRequest) -> _Running:
        ids, params = list(request.prompt_ids), request.params
        if not ids:
            raise UserError("the prompt is empty", where="prompt", hint="give at least one token")
        if len(ids) > self.context:
            raise UserError(f"the prompt is longer than the model's context of {self.context} tokens", where="prompt",
                            value=f"{len(ids)} tokens")
        if min(ids) < 0 or max(ids) >= self.vocabulary_size:
            raise UserError(f"id outside the vocabulary of {self.vocabulary_size}", where="prompt", value=max(ids))
        check_params(params, self.vocabulary_size)
        seed = secrets.randbits(32) if params.seed is None else params.seed % (1 << _SEED_BITS)
        rule = SamplingRule(params.temperature, params.top_k, params.top_p, params.frequency_penalty,
                            params.presence_penalty)
        stop_ids = frozenset([self.eot_id] if params.stop_ids is None else params.stop_ids)
        # The last token need not be read, so one more than there are positions can be generated.
        room = min(params.max_tokens, self.context - len(ids) + 1)
        sampler = Sampler(rule, request_stream(ids, seed, params.sample), dict(params.logit_bias))
        return _Running(Handle(request, self._cancel), stop_ids, room, sampler)

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _scheduler(self, backend: Backend) -> Scheduler:
        """A scheduler over the model, which has been run once, so that all is compiled."""
        scheduler = Scheduler(self._runner(backend), self.settings.running, self.settings.prefill_chunk,
                              self.settings.share_prefixes)
        for ids, scored in (([self.eot_id] * 2, None), ([self.eot_id] * 3, 0)):
            request = EngineRequest(ids[:self.context], SamplingParams(2, 0.0, prompt_logprobs=scored))
            scheduler.add(self._prepared(request))
        while not scheduler.idle:
            scheduler.step()
        scheduler.counters = Counters()
        return scheduler

    def _runner(self, backend: Backend) -> Runner:
        if backend.has_cache:
            return backend.runner(self.settings.running, self.context, self.settings.prefill_chunk)
        bytes_per_token = cache_bytes_per_token(self._config)
        tokens = max(self.context, self.settings.cache_bytes // bytes_per_token)
        tokens = min(tokens, self.settings.running * self.context)
        check_memory(tokens * bytes_per_token)
        # For kernels without blocks this is the number of sequences of full length.
        sequences = max(1, tokens // self.context)
        return backend.runner(sequences, -(-tokens // sequences), self.settings.prefill_chunk)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
                if self._closed:
                    self._end_all(TokenEvent(None, None, "cancelled"))
                    return
                self._take_in()
                schedulers = list(self._schedulers)
                unused, self._unused = self._unused, []
            for backend in unused:
                backend.close()
            for scheduler in schedulers:
                self._step(scheduler)

    def _has_work(self) -> bool:
        # An old model that nobody uses is let go at once.
        return bool(self._closed or self._inbox or self._cancelled or self._replacement or len(self._schedulers) > 1
                    or not self._schedulers[0].idle)

    def _take_in(self) -> None:
        """New requests, cancellations and a new model; with the lock held."""
        for handle in self._cancelled:
            running = self._open.get(handle)
            if running is not None:
                self._leave(running, TokenEvent(None, None, "cancelled"))
                self._cancellations += 1
        self._cancelled.clear()
        if self._replacement is not None:
            old = self._schedulers[-1]
            scheduler, backend, self.checkpoint = self._replacement
            self._backends[scheduler] = backend
            self._replacement, self.version = None, self.version + 1
            self._schedulers.append(scheduler)
            for sequence in old.take_unstarted():
                scheduler.add(sequence)
        while self._inbox:
            running = self._inbox.popleft()
            if running.handle in self._open:
                self._schedulers[-1].add(running)
        for scheduler in self._schedulers[:-1]:
            if scheduler.idle:
                self._schedulers.remove(scheduler)
                self._unused.append(self._backends.pop(scheduler))
                _add(self._past, scheduler.counters)
        self._wake.notify_all()

    def _step(self, scheduler: Scheduler) -> None:
        if scheduler.idle:
            return
        try:
            went_on = scheduler.step()
        except Exception as error:  # a defect must not end the thread: those it holds are informed
            traceback.print_exc()
            with self._wake:
                for sequence in [*scheduler.running, *scheduler.waiting]:
                    scheduler.abort(sequence)
                    self._leave(sequence, EngineFailure(f"the engine failed: {error!r}"))
            return
        ended = [sequence for sequence in went_on if sequence.done]
        for sequence in went_on:
            sequence.deliver()
        if ended:
            with self._wake:
                for sequence in ended:
                    if self._open.pop(sequence.handle, None) is not None:
                        self._finished += 1
                self._wake.notify_all()

    def _leave(self, running: _Running, last: Event | Exception) -> None:
        """Ends a request before its end; with the lock held."""
        for scheduler in self._schedulers:
            scheduler.abort(running)
        running.deliver()
        running.handle.push(last)
        if self._open.pop(running.handle, None) is not None:
            self._finished += 1
        self._wake.notify_all()

    def _end_all(self, last: Event | Exception) -> None:
        for running in list(self._open.values()):
            self._leave(running, last)
        self._inbox.clear()


def check_params(params: SamplingParams, vocabulary_size: int) -> None:
    """Raises a `UserError` that names the setting that cannot be."""
    for name, low, high in (("max_tokens", 0, None), ("temperature", 0, None), ("top_k", 0, None), ("sample", 0, None),
                            ("logprobs", 0, _MOST_TOP_LOGPROBS), ("prompt_logprobs", 0, _MOST_TOP_LOGPROBS)):
        value = getattr(params, name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            raise UserError(f"must be at least {low}" + (f" and at most {high}" if high else ""), where=name,
                            value=value)
    if not 0 < params.top_p <= 1:
        raise UserError("must be above 0 and at most 1", where="top_p", value=params.top_p)
    for name in ("stop_ids", "logit_bias"):
        for token in getattr(params, name) or ():
            if not 0 <= token < vocabulary_size:
                raise UserError(f"id outside the vocabulary of {vocabulary_size}", where=name, value=token)
    for value in (*params.logit_bias.values(), params.presence_penalty, params.frequency_penalty, params.temperature):
        if not abs(value) < float("inf"):
            raise UserError("must be finite", where="sampling", value=value)


def check_memory(needed: int) -> None:
    """Raises a `UserError` when a cache is larger than the memory that the machine has left."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return
    if needed > free:
        raise UserError(f"the cache needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB of memory are left",
                        where="engine.cache_bytes", value=needed, hint=f"at most {free} fits")


def _add(total: Counters, more: Counters) -> None:
    for name, value in vars(more).items():
        setattr(total, name, getattr(total, name) + value)


def start_engine(settings: Run, checkpoint: str | None, engine_settings: EngineSettings,
                 int8: bool = False, sharded: ShardedModel | None = None) -> BatchingEngine:
    """An engine with a run's model, ready: all is compiled.

    Args:
        settings: a `pangu.settings.Run`.
        checkpoint: float or int8; None = the newest of `output.directory`. `reload` takes the newest of the same
            folder.
        engine_settings: batch, cache, queue.
        int8: whether float checkpoints are quantized when they are loaded.
        sharded: this process's part of a model over several, which has been opened.

    Raises:
        UserError: no checkpoint, or one of another model; too large a cache.
    """
    from parallel.checkpoint.folder import resolve_checkpoint

    place = checkpoint or settings.output.directory
    if sharded is not None:
        return BatchingEngine(sharded.backend, str(sharded.checkpoint), engine_settings,
                              lambda path: sharded.load(path or place))

    def load(path: str | None) -> tuple[Backend, str]:
        found = resolve_checkpoint(path or place)
        return load_backend(settings, found, int8), str(found)

    return BatchingEngine(*load(None), engine_settings, load)
