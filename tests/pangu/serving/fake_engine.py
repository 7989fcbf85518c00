"""An engine without a model, for tests of the server: the next token is a fixed function of the ids before it.

It keeps the contract of `pangu.serving.engine_api`: order of events, limits, stop ids, seeds, biases, cancellation.
"""

from __future__ import annotations

import threading
import time
import zlib
from dataclasses import replace

import numpy as np

from pangu.generation.scheduler import TokenLogprob
from pangu.serving.engine_api import (
    Draining,
    EngineRequest,
    EngineStats,
    Handle,
    PromptEvent,
    QueueFull,
    SamplingParams,
    TokenEvent,
)
from parallel.common.errors import UserError


class FakeEngine:
    """Args:
        vocabulary_size: ids are below it.
        context: positions.
        script: ids that are generated one after the other, whatever the prompt; None = drawn from `logits`.
        seconds_per_token: how long a token takes.
        queue: requests at once at most; the next is refused.
    """

    def __init__(self, vocabulary_size=300, context=64, eot_id=9, script=None, seconds_per_token=0.0, queue=256):
        self.vocabulary_size, self.context, self.eot_id = vocabulary_size, context, eot_id
        self.script, self.seconds_per_token, self.queue = script, seconds_per_token, queue
        self._lock, self._idle = threading.Lock(), threading.Condition()
        self._open, self._cancelled, self._draining = set(), set(), False
        self._stats = EngineStats(blocks_total=64, checkpoint="fake")

    def submit(self, request: EngineRequest) -> Handle:
        ids, params = list(request.prompt_ids), request.params
        if not ids or len(ids) > self.context:
            raise UserError("empty or longer than the context", where="prompt", value=len(ids))
        if min(ids) < 0 or max(ids) >= self.vocabulary_size:
            raise UserError("id outside the vocabulary", where="prompt", value=max(ids))
        with self._lock:
            if self._draining:
                raise Draining
            if len(self._open) >= self.queue:
                raise QueueFull(len(self._open))
            handle = Handle(request, self._cancelled.add)
            self._open.add(handle)
            self._count(requests_total=1, prompt_tokens_total=len(ids))
        threading.Thread(target=self._work, args=(handle, ids, params), daemon=True).start()
        return handle

    def _count(self, **more):
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + by for name, by in more.items()})

    def _work(self, handle, ids, params):
        try:
            for event in self._events(handle, ids, params):
                handle.push(event)
                if handle.finished:
                    break
        finally:
            with self._lock:
                self._open.discard(handle)
                self._count(finished_total=1, cancelled_total=int(handle in self._cancelled))
                self._cancelled.discard(handle)
            with self._idle:
                self._idle.notify_all()

    def _events(self, handle, ids, params: SamplingParams):
        stops = (self.eot_id,) if params.stop_ids is None else params.stop_ids
        seed = int(time.time_ns()) if params.seed is None else params.seed
        stream = np.random.default_rng((seed, zlib.crc32(repr(ids).encode()), params.sample))
        scored = None
        if params.prompt_logprobs is not None:
            scored = (None, *(logprob(self.logits(ids[:place]), ids[place], params.prompt_logprobs)
                              for place in range(1, len(ids))))
        yield PromptEvent(len(ids), 0, scored)
        room = min(params.max_tokens, self.context - len(ids) + 1)
        if room == 0:
            yield TokenEvent(None, None, "length")
        made = []
        while len(made) < room:
            time.sleep(self.seconds_per_token)
            if handle in self._cancelled:
                yield TokenEvent(None, None, "cancelled")
                return
            logits = self.logits([*ids, *made])
            token = self._next(logits, made, params, stream)
            made.append(token)
            with self._lock:
                self._count(generation_tokens_total=1, steps_total=1)
            reason = "stop" if token in stops else "length" if len(made) == room else None
            yield TokenEvent(token, logprob(logits, token, params.logprobs), reason)

    def logits(self, ids):
        """float32 [V], a function of the last three ids."""
        digest = zlib.crc32(repr(list(ids[-3:])).encode())
        return np.random.default_rng(digest).normal(0, 3, self.vocabulary_size).astype(np.float32)

    def _next(self, logits, made, params, stream):
        logits = logits.astype(np.float64)
        for token, bias in params.logit_bias.items():
            logits[token] += bias
        for token in set(made):
            logits[token] -= params.presence_penalty + params.frequency_penalty * made.count(token)
        if self.script is not None:
            return self.script[len(made) % len(self.script)]
        if params.temperature == 0 or params.top_k == 1:
            return int(logits.argmax())
        weights = np.exp((logits - logits.max()) / params.temperature)
        return int(stream.choice(len(weights), p=weights / weights.sum()))

    def stats(self):
        return replace(self._stats, running=len(self._open), blocks_used=len(self._open))

    def reload(self, checkpoint=None):
        if checkpoint is not None and "missing" in checkpoint:
            raise UserError("no checkpoint", where=checkpoint)
        with self._lock:
            self._stats = replace(self._stats, version=self._stats.version + 1,
                                  checkpoint=checkpoint or self._stats.checkpoint)
        return self._stats.version

    def drain(self, timeout=None):
        self._draining = True
        with self._idle:
            return self._idle.wait_for(lambda: not self._open, timeout)

    def close(self):
        self._draining = True
        with self._lock:
            self._cancelled |= self._open


def logprob(logits, token, count):
    """A `TokenLogprob` of float32 logits [V]; None where none is wanted."""
    if count is None:
        return None
    log_p = logits - np.float32(np.log(np.exp(logits.astype(np.float64)).sum()))
    order = np.argsort(-log_p, kind="stable")
    return TokenLogprob(int(token), float(log_p[token]), int((log_p > log_p[token]).sum()) + 1,
                        tuple((int(k), float(log_p[k])) for k in order[:count]))
