"""Log-likelihood of continuations by the engine that generates: what requests have in common is read once, in blocks of
the cache. For models over several devices; `scoring` has MindSpore's own graphs for one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pangu.evaluation.requests import OnScored, ScoreRequest, scored_item, total
from pangu.generation import scheduler
from pangu.generation.backend import Backend
from pangu.generation.sampling import Sampler, SamplingRule
from pangu.generation.scheduler import Scheduler, TokenLogprob

_AT_ONCE = 16
_WAITING = 4 * _AT_ONCE
_SURE = 1e9
_GREEDY = SamplingRule(temperature=0.0)


class _Scored(scheduler.Sequence):
    """A request: all its ids but the last are read, and the last is what comes next."""

    def __init__(self, number: int, ids: Sequence[int], first: int) -> None:
        last = int(ids[-1])
        super().__init__(ids[:-1], Sampler(_GREEDY, np.random.default_rng(0), {last: _SURE}), 0, 0, first)
        self.request, self.first = number, first
        self.last: TokenLogprob | None = None

    @property
    def done(self) -> bool:
        return self.last is not None

    def feed(self, token: int, logprob: TokenLogprob | None = None) -> None:
        self.last = logprob

    def answer(self) -> tuple[np.ndarray, np.ndarray]:
        """log p of each token of the continuation, and whether it is the likeliest one."""
        found = [*self.scores[self.first:], self.last]
        return np.array([item.logprob for item in found], np.float32), np.array([item.rank == 1 for item in found])


class SpanScorer:
    """`pangu.evaluation.scoring.Scorer` over a `Runner`.

    Args:
        backend: runs the model.
        chunk: tokens that are read in one step.
        share: whether equal beginnings are computed once.
    """

    def __init__(self, backend: Backend, chunk: int, share: bool = True) -> None:
        self.config, self.backend, self.chunk, self.share = backend.config, backend, chunk, share
        self._scheduler: Scheduler | None = None

    def loglikelihood(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """See `Scorer`."""
        return [score for score, _ in self.loglikelihood_and_greedy(requests)]

    def loglikelihood_and_greedy(self, requests: Sequence[ScoreRequest],
                                 on_scored: OnScored | None = None) -> list[tuple[float, bool]]:
        """See `Scorer`."""
        items = [scored_item(prefix, continuation, self.config, index)
                 for index, (prefix, continuation) in enumerate(requests)]
        # What begins alike comes together, so that it is in the cache while it is needed.
        order = sorted(range(len(items)), key=lambda index: items[index][0].tolist())
        waiting = [_Scored(number, items[number][0].tolist(), items[number][1]) for number in order][::-1]
        answers: list[Any] = [None] * len(items)
        engine = self._engine()
        while waiting or not engine.idle:
            while waiting and len(engine.waiting) < _WAITING:
                engine.add(waiting.pop())
            done = [sequence for sequence in engine.step() if sequence.done]
            for sequence in done:
                answers[sequence.request] = total(*sequence.answer())
            if done and on_scored is not None:
                numbers = [sequence.request for sequence in done]
                on_scored(numbers, [answers[number] for number in numbers])
        return answers

    def _engine(self) -> Scheduler:
        runner = self.backend.runner(_AT_ONCE, self.config.sequence_length, self.chunk)
        if self._scheduler is None or self._scheduler.runner is not runner:
            self._scheduler = Scheduler(runner, _AT_ONCE, self.chunk, self.share)
        return self._scheduler
