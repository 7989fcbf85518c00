"""The contract of handles and events, on the engine without a model."""

import asyncio
import threading

import pytest

from pangu.serving.engine_api import Draining, EngineRequest, PromptEvent, QueueFull, SamplingParams
from parallel.common.errors import UserError
from tests.pangu.serving.fake_engine import FakeEngine


def ids(events):
    return [event.id for event in events if not isinstance(event, PromptEvent)]


def test_events_come_in_order_and_end_once():
    events = list(FakeEngine().submit(EngineRequest([1, 2, 3], SamplingParams(5, 0.0, stop_ids=()))))
    assert isinstance(events[0], PromptEvent) and events[0].prompt_tokens == 3
    assert [event.finish_reason for event in events] == [None] * 5 + ["length"]


def test_event_loop_reads_what_a_thread_reads():
    engine, request = FakeEngine(seconds_per_token=0.002), EngineRequest([4, 5], SamplingParams(8, 1.0, seed=3))

    async def read():
        return [event async for event in engine.submit(request)]

    assert asyncio.run(read()) == list(engine.submit(request))


def test_seed_and_sample_decide_what_is_drawn():
    engine = FakeEngine()

    def drawn(**params):
        return ids(engine.submit(EngineRequest([7], SamplingParams(12, stop_ids=(), **params))))

    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)
    assert drawn(seed=1) != drawn(seed=1, sample=1)


def test_prompt_is_scored_without_generating():
    *_, prompt, end = FakeEngine().submit(EngineRequest([3, 4, 5], SamplingParams(0, prompt_logprobs=2)))
    assert prompt.logprobs[0] is None and [item.id for item in prompt.logprobs[1:]] == [4, 5]
    assert len(prompt.logprobs[1].top) == 2 and end.id is None and end.finish_reason == "length"


def test_cancel_ends_the_stream_and_frees_the_slot():
    engine = FakeEngine(seconds_per_token=0.01)
    handle = engine.submit(EngineRequest([1], SamplingParams(60, stop_ids=())))
    threading.Timer(0.03, handle.cancel).start()
    *_, last = handle
    assert last.finish_reason == "cancelled" and engine.drain(1.0) and engine.stats().running == 0


def test_refusals():
    engine = FakeEngine(seconds_per_token=0.05, queue=1)
    for wrong in ([], [1] * 65, [300]):
        with pytest.raises(UserError):
            engine.submit(EngineRequest(wrong))
    handle = engine.submit(EngineRequest([1], SamplingParams(50, stop_ids=())))
    with pytest.raises(QueueFull) as full:
        engine.submit(EngineRequest([1]))
    assert full.value.retry_after > 0
    handle.cancel()
    assert engine.drain(2.0)
    with pytest.raises(Draining):
        engine.submit(EngineRequest([1]))
