"""The engine: what requests get, cancellation, queue, reload, drain, failures."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from pangu.generation.backend import Backend
from pangu.generation.generate import Generator
from pangu.generation.settings import GenerateSettings
from pangu.native import kernel_library
from pangu.serving.engine import BatchingEngine
from pangu.serving.engine_api import (
    Draining,
    EngineFailure,
    EngineRequest,
    PromptEvent,
    QueueFull,
    SamplingParams,
    TokenEvent,
)
from pangu.serving.engine_settings import EngineSettings
from parallel.common.errors import UserError
from tests.pangu.kernel_model import CONFIG, parameters, weights
from tests.pangu.numpy_model import forward

SMALL = EngineSettings(running=4, queue=64, prefill_chunk=16)
WAIT = 20.0


@pytest.fixture
def make():
    """Makes engines, which are closed afterwards."""
    if kernel_library() is None:
        pytest.skip("no C++ compiler here")
    made = []

    def engine(settings=SMALL, load=None, int8=False):
        made.append(BatchingEngine(Backend(weights(int8)), "first", settings, load))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def read(handle):
    """(prompt's event, ids, last event)."""
    events = list(handle)
    prompt = events[0] if isinstance(events[0], PromptEvent) else None
    tokens = [event.id for event in events if isinstance(event, TokenEvent) and event.id is not None]
    return prompt, tokens, events[-1]


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    common = rng.integers(10, 97, 40).tolist()
    return [common[:20 * (number % 3)] + rng.integers(10, 97, 1 + number % 7).tolist() for number in range(count)]


@pytest.mark.parametrize("settings", [GenerateSettings(max_new_tokens=12, temperature=0.0),
                                      GenerateSettings(max_new_tokens=12, seed=3, top_p=0.9, top_k=30)])
def test_requests_get_what_pangu_generate_gives(make, settings):
    """Equal token by token, for equal prompts too: the n-th repetition is sample n."""
    engine, asked = make(), prompts(9)
    asked += [asked[0], asked[0]]
    expected = Generator(Backend(weights()), None, settings).generate_ids(asked)
    params = {"max_tokens": 12, "temperature": settings.temperature, "seed": settings.seed, "top_p": settings.top_p,
              "top_k": settings.top_k}
    seen = {}
    handles = []
    for ids in asked:
        sample = seen[tuple(ids)] = seen.get(tuple(ids), -1) + 1
        handles.append(engine.submit(EngineRequest(ids, SamplingParams(sample=sample, **params))))
    for handle, completion in zip(handles, expected, strict=True):
        _, tokens, last = read(handle)
        assert (tokens[:-1] if last.finish_reason == "stop" else tokens) == completion.ids
    assert engine.drain(WAIT)
    stats = engine.stats()
    assert stats.blocks_used == stats.running == stats.waiting == 0
    assert stats.finished_total == stats.requests_total == len(asked)
    assert stats.generation_tokens_total >= sum(len(completion.ids) for completion in expected)


def test_log_probabilities_are_the_models_own(make):
    engine, ids = make(), prompts(5)[4]
    params = SamplingParams(6, 0.0, stop_ids=(), logprobs=2, prompt_logprobs=3, logit_bias={20: 3.0})
    for _ in range(2):  # the second time the prompt's scores come from the cache, where it is long enough
        prompt, *events = engine.submit(EngineRequest(ids, params))
        tokens = [event.id for event in events]
        logits = forward(parameters(), CONFIG, np.array([*ids, *tokens])).astype(np.float64)
        log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
            -1, keepdims=True)
        assert prompt.logprobs[0] is None and prompt.prompt_tokens == len(prompt.logprobs) == len(ids)
        scored = [*prompt.logprobs[1:], *(event.logprob for event in events)]
        for place, (token, entry) in enumerate(zip([*ids[1:], *tokens], scored, strict=True)):
            assert entry.id == token and entry.logprob == pytest.approx(log_p[place, token], abs=2e-4)
            assert entry.rank == 1 + (logits[place] > logits[place, token]).sum()
            assert entry.top[0][0] == log_p[place].argmax()
            assert (entry.logprob == entry.top[0][1]) == (entry.rank == 1)


def test_only_the_prompt_is_read(make):
    _, tokens, last = read(make().submit(EngineRequest([10, 11, 12], SamplingParams(0, prompt_logprobs=0))))
    assert tokens == [] and last.finish_reason == "length"


def test_the_context_ends_a_request(make):
    ids = [10] * (CONFIG.sequence_length - 2)
    _, tokens, last = read(make().submit(EngineRequest(ids, SamplingParams(50, 0.0, stop_ids=()))))
    assert len(tokens) == 3 and last.finish_reason == "length"


def test_stop_ids_and_biases(make):
    engine = make()
    _, tokens, last = read(engine.submit(EngineRequest([10], SamplingParams(9, 0.0, stop_ids=(33,),
                                                                            logit_bias={33: 1000.0}))))
    assert tokens == [33] and last.finish_reason == "stop"
    free = read(engine.submit(EngineRequest([10], SamplingParams(9, 0.0, stop_ids=()))))[1]
    banned = read(engine.submit(EngineRequest([10], SamplingParams(9, 0.0, stop_ids=(),
                                                                   logit_bias={free[0]: -1000.0}))))[1]
    assert free[0] not in banned


def test_without_a_seed_requests_differ(make):
    engine = make()
    texts = {tuple(read(engine.submit(EngineRequest([10], SamplingParams(60, 2.0, stop_ids=()))))[1])
             for _ in range(8)}
    assert len(texts) > 1


def test_cancelled_requests_free_their_blocks(make):
    engine = make()
    handles = [engine.submit(EngineRequest([10 + number], SamplingParams(99, stop_ids=()))) for number in range(8)]
    assert isinstance(next(iter(handles[0])), PromptEvent)
    for handle in handles:
        handle.cancel()
        handle.cancel()
    assert engine.drain(WAIT)
    ends = [list(handle)[-1].finish_reason for handle in handles[1:]]
    stats = engine.stats()
    assert set(ends) <= {"cancelled", "length"} and "cancelled" in ends
    assert stats.blocks_used == 0 and 0 < stats.cancelled_total <= 8


def test_an_event_loop_is_woken_at_once(make):
    engine = make()

    async def work():
        handles = [engine.submit(EngineRequest(ids, SamplingParams(5, 0.0, stop_ids=()))) for ids in prompts(6)]
        return await asyncio.gather(*(collect(handle) for handle in handles))

    async def collect(handle):
        return [event async for event in handle]

    found = asyncio.run(work())
    assert [len(events) for events in found] == [6] * 6


def test_a_full_queue_refuses(make):
    engine = make(EngineSettings(running=1, queue=2))
    handles = []
    with pytest.raises(QueueFull) as full:
        for _ in range(50):
            handles.append(engine.submit(EngineRequest([10] * 40, SamplingParams(60, stop_ids=()))))
    assert full.value.retry_after > 0 and len(handles) >= 2
    for handle in handles:
        handle.cancel()


@pytest.mark.parametrize(("ids", "params", "message"), [
    ([], {}, "empty"), ([97], {}, "outside the vocabulary"), ([10] * 101, {}, "longer than the model's context"),
    ([10], {"temperature": -1.0}, "temperature"), ([10], {"top_p": 0.0}, "top_p"), ([10], {"max_tokens": -1}, "max_"),
    ([10], {"logit_bias": {97: 1.0}}, "logit_bias"), ([10], {"stop_ids": (-1,)}, "stop_ids"),
    ([10], {"temperature": float("nan")}, "temperature"), ([10], {"logit_bias": {1: float("inf")}}, "finite"),
    ([10], {"logprobs": -1}, "logprobs")])
def test_what_cannot_be_is_refused(make, ids, params, message):
    with pytest.raises(UserError, match=message):
        make().submit(EngineRequest(ids, SamplingParams(**params)))


def test_reload_loses_nothing(make):
    """What runs ends with the model it began with, what comes later gets the new one; nothing is lost."""
    engine = make(load=lambda path: (Backend(weights(True)), path or "newest"))
    old = [completion.ids for completion in Generator(Backend(weights()), None, GenerateSettings(
        max_new_tokens=50, temperature=0.0, stop_ids=[])).generate_ids(prompts(12))]
    new = [completion.ids for completion in Generator(Backend(weights(True)), None, GenerateSettings(
        max_new_tokens=50, temperature=0.0, stop_ids=[])).generate_ids(prompts(12))]
    params = SamplingParams(50, 0.0, stop_ids=())
    handles = [engine.submit(EngineRequest(ids, params)) for ids in prompts(12)]
    next(iter(handles[0]))
    assert engine.reload("second") == 2
    later = [engine.submit(EngineRequest(ids, params)) for ids in prompts(12)]
    found = [read(handle)[1] for handle in handles]
    assert all(tokens in pair for tokens, pair in zip(found, zip(old, new, strict=True), strict=True))
    assert found[0] == old[0] and old != new
    assert [read(handle)[1] for handle in later] == new
    assert engine.drain(WAIT)
    assert engine.stats().version == 2 and engine.stats().checkpoint == "second"
    assert engine.stats().generation_tokens_total == 24 * 50
    until = time.monotonic() + WAIT
    while engine.stats().blocks_total > engine._schedulers[-1].pool.blocks and time.monotonic() < until:
        time.sleep(0.01)
    assert len(engine._schedulers) == 1  # the old model's memory is free


def test_a_reload_that_fails_changes_nothing(make):
    def load(path):
        raise UserError("no checkpoint here", where=path)

    engine = make(load=load)
    with pytest.raises(UserError, match="no checkpoint"):
        engine.reload("nowhere")
    assert engine.stats().version == 1 and read(engine.submit(EngineRequest([10])))[2].finish_reason


def test_drain_ends_what_was_accepted_and_refuses_more(make):
    engine = make()
    handles = [engine.submit(EngineRequest([10 + number], SamplingParams(60, stop_ids=()))) for number in range(6)]
    done = []
    thread = threading.Thread(target=lambda: done.append(engine.drain(WAIT)))
    thread.start()
    time.sleep(0.05)
    with pytest.raises(Draining):
        engine.submit(EngineRequest([10]))
    assert [len(read(handle)[1]) for handle in handles] == [60] * 6
    thread.join()
    assert done == [True]


def test_close_ends_at_once(make):
    engine = make()
    handles = [engine.submit(EngineRequest([10], SamplingParams(99, stop_ids=()))) for _ in range(9)]
    engine.close()
    assert {list(handle)[-1].finish_reason for handle in handles} <= {"cancelled", "length"}
    with pytest.raises(Draining):
        engine.submit(EngineRequest([10]))


def test_a_step_that_fails_is_reported_and_the_engine_goes_on(make, monkeypatch):
    engine = make()
    runner = engine._schedulers[0].runner
    run, calls = runner.run, []

    def broken(spans):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a bit fell over")
        return run(spans)

    monkeypatch.setattr(runner, "run", broken)
    handle = engine.submit(EngineRequest([10], SamplingParams(20, stop_ids=())))
    with pytest.raises(EngineFailure, match="a bit fell over"):
        list(handle)
    _, tokens, last = read(engine.submit(EngineRequest([10], SamplingParams(5, stop_ids=()))))
    assert len(tokens) == 5 and engine.stats().blocks_used == 0


def test_a_cache_larger_than_the_memory_is_refused_with_what_fits(make, monkeypatch):
    from pangu.serving import engine as module

    monkeypatch.setattr(module, "cache_bytes_per_token", lambda config: 1 << 50)
    with pytest.raises(UserError, match="at most .* fits"):
        make()


def test_few_blocks_only_cost_time(make):
    """A cache of one request's length: requests lose their blocks, and get the same."""
    roomy = make()
    tight = make(EngineSettings(running=4, cache_bytes=1))
    params = SamplingParams(40, 0.7, seed=2, stop_ids=())
    pairs = [(roomy.submit(EngineRequest(ids, params)), tight.submit(EngineRequest(ids, params)))
             for ids in prompts(8)]
    assert all(read(one)[1] == read(other)[1] for one, other in pairs)
    assert tight.stats().blocks_total == 7 and tight.stats().preemptions_total > 0
