"""Law: what a request gets depends on it alone, bit for bit: not on who shares its batch, when it came, in what parts
its prompt was read, which blocks it got, what it found in the cache, or whether it was computed again."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu.generation.runner import Span
from pangu.generation.sampling import Sampler, SamplingRule, request_stream
from pangu.generation.scheduler import Scheduler, Sequence
from tests.pangu.kernel_model import CONFIG, parameters, runner, widened
from tests.pangu.numpy_model import forward

RULES = (SamplingRule(0.0), SamplingRule(1.0), SamplingRule(0.8, top_k=20, top_p=0.9),
         SamplingRule(0.0, frequency_penalty=1.5, presence_penalty=0.3))
TRUNK = np.random.default_rng(7).integers(10, 97, 64).tolist()


class Listed(Sequence):
    """A request that keeps all it is reported; over after `limit` tokens."""

    def __init__(self, prompt, rule, seed, limit, logprobs, prompt_logprobs, bias):
        super().__init__(prompt, Sampler(rule, request_stream(prompt, seed), bias), logprobs, prompt_logprobs)
        self.limit, self.tokens, self.read_scores, self.reads = limit, [], None, 0

    @property
    def done(self):
        return self.reads > 0 and len(self.tokens) >= self.limit

    def read(self, cached, scores):
        self.reads += 1
        self.read_scores = None if scores is None else list(scores)

    def feed(self, token, logprob=None):
        self.tokens.append((token, logprob))


@functools.lru_cache(maxsize=8)
def shared_runner(blocks, int8):
    return runner(blocks, int8)


@functools.lru_cache(maxsize=4096)
def alone(int8, *what):
    """What a request gets from a batch of its own, its prompt read at once, nothing shared."""
    request = Listed(*unfrozen(what))
    scheduler = Scheduler(shared_runner(7, int8), 1, CONFIG.sequence_length, share=False)
    scheduler.add(request)
    while not scheduler.idle:
        scheduler.step()
    return request.read_scores, request.tokens


def unfrozen(what):
    prompt, rule, seed, limit, logprobs, prompt_logprobs, bias = what
    return list(prompt), RULES[rule], seed, limit, logprobs, prompt_logprobs, dict(bias)


@st.composite
def requests(draw):
    """A prompt with or without a beginning that others have too, and how it goes on."""
    trunk = draw(st.sampled_from([0, 0, 15, 16, 33, 48, 64]))
    own = draw(st.lists(st.integers(10, 14), min_size=0 if trunk else 1, max_size=30))
    prompt = tuple(TRUNK[:trunk] + own)
    room = min(20, CONFIG.sequence_length - len(prompt) + 1)
    prompt_logprobs = draw(st.sampled_from([None, None, 0, 2, 5]))
    return (prompt, draw(st.integers(0, len(RULES) - 1)), draw(st.integers(0, 2)),
            draw(st.integers(0 if prompt_logprobs is not None else 1, room)),
            draw(st.sampled_from([None, 0, 3])), prompt_logprobs,
            draw(st.sampled_from([(), ((20, 4.0), (11, -100.0))])))


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_a_request_gets_what_it_gets_alone(int8, data):
    """Random arrivals, cancellations, batch sizes, chunks, and so few blocks that sequences lose theirs."""
    blocks = data.draw(st.sampled_from([7, 9, 14, 40]), "blocks")
    scheduler = Scheduler(shared_runner(blocks, int8), data.draw(st.integers(1, 8), "running"),
                          data.draw(st.sampled_from([1, 5, 16, 64]), "chunk"), data.draw(st.booleans(), "share"))
    asked = data.draw(st.lists(st.tuples(requests(), st.integers(0, 6), st.sampled_from([None, None, None, 0, 2, 9])),
                               min_size=1, max_size=9), "requests")
    live = []
    for what, steps, patience in asked:
        request = Listed(*unfrozen(what))
        scheduler.add(request)
        live.append([request, what, patience, True])
        for _ in range(steps):
            advance(scheduler, live)
    while not scheduler.idle:
        advance(scheduler, live)
    for request, what, _, kept in live:
        scores, tokens = alone(int8, *what)
        assert request.tokens == (tokens if kept else tokens[:len(request.tokens)])
        if kept:
            assert request.reads == 1 and request.read_scores == scores
    assert scheduler.pool.used == 0


def advance(scheduler, live):
    """A step; who has lost patience is cancelled, and its blocks are free at once."""
    scheduler.step()
    for entry in live:
        request, _, patience, kept = entry
        if kept and patience is not None and not request.done:
            entry[2] = patience - 1
            if patience == 0:
                scheduler.abort(request)
                entry[3] = False
                assert request.table == []
    held = {block for entry in live for block in entry[0].table}
    assert scheduler.pool.used == len(held)
    assert len(scheduler.running) <= scheduler.most_running


def drained(scheduler, *asked):
    for request in asked:
        scheduler.add(request)
    while not scheduler.idle:
        scheduler.step()
    return asked


def listed(prompt, limit=5, prompt_logprobs=None, logprobs=None):
    return Listed(list(prompt), RULES[0], 0, limit, logprobs, prompt_logprobs, {})


def test_a_common_beginning_is_computed_once():
    """Eight requests at once with 64 tokens in common, and one more later."""
    scheduler = Scheduler(runner(60), 8, 16)
    drained(scheduler, *(listed([*TRUNK, 10 + number]) for number in range(8)))
    assert scheduler.counters.cached_tokens == 7 * 64
    later, = drained(scheduler, listed([*TRUNK, 11, 12]))
    assert later.cached == 64
    scored, = drained(scheduler, listed([*TRUNK, 30], prompt_logprobs=2))
    assert scored.cached == 0  # nobody has scored these tokens before
    again, fewer, more = drained(scheduler, listed([*TRUNK, 40], 1, 2), listed([*TRUNK, 41], 1, 1),
                                 listed([*TRUNK, 42], 1, 3))
    assert again.cached == fewer.cached == 48 and more.cached == 0


def test_blocks_that_run_out_are_taken_from_the_newest():
    scheduler = Scheduler(runner(8), 4, 64)
    first, second, third = drained(scheduler, *(listed([10 + number] * 30, 60) for number in range(3)))
    assert scheduler.counters.preemptions > 0
    assert [len(request.tokens) for request in (first, second, third)] == [60] * 3


def test_a_long_prompt_does_not_stop_those_that_generate():
    """While a prompt of 90 tokens is read ten at a time, the other request gets a token at every step."""
    scheduler = Scheduler(runner(20), 4, 10)
    quick, slow = listed([10], 30), listed([11] * 90, 2)
    scheduler.add(quick)
    scheduler.step()
    scheduler.add(slow)
    for number in range(8):
        scheduler.step()
        assert len(quick.tokens) == 2 + number and not slow.tokens
    scheduler.step()
    assert len(slow.tokens) == 1


@pytest.mark.parametrize(("int8", "group"), [(False, None), (True, None), (True, 128)])
def test_the_kernels_equal_the_oracle_and_tables_of_any_order(int8, group):
    """The contiguous cache is the one whose table is in order; a shuffled one gives the same bits."""
    ids = np.random.default_rng(1).integers(0, CONFIG.vocabulary_size, CONFIG.sequence_length).tolist()
    made = runner(20, int8, group)
    contiguous = made.run([Span(list(range(7)), 0, ids, len(ids))])[0].copy()
    expected = forward(widened(group) if int8 else parameters(), CONFIG, ids)
    np.testing.assert_allclose(contiguous, expected, atol=2e-5 * np.abs(expected).max())
    table, parts = [13, 2, 19, 7, 11, 0, 5], []
    for begin, end in ((0, 1), (1, 18), (18, 19), (19, 64), (64, 65), (65, 100)):
        parts.append(made.run([Span(table, begin, ids[begin:end], end - begin)])[0].copy())
    assert np.array_equal(np.concatenate(parts), contiguous)
