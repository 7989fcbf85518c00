"""The queue of a working thread: order, bounds, deadlines, changes between batches, the end."""

from __future__ import annotations

import threading
import time

import pytest

from parallel.serving.queue import Busy, WorkQueue, answer


def fits(batch, item):
    return len(batch) < 2


def test_batches_in_order_with_changes_between():
    queue: WorkQueue[int] = WorkQueue(5, 60.0)
    with pytest.raises(Busy, match="ending"):
        queue.put(0)
    early = queue.change(lambda: "warm", always=True)
    queue.open()
    results = [queue.put(number) for number in range(5)]
    with pytest.raises(Busy, match="5 requests wait"):
        queue.put(5)
    assert queue.take(fits) == [] and early.result() == "warm"
    results[1].cancel()
    assert [one.item for one in queue.take(fits)] == [0, 2]
    failed = queue.change(lambda: 1 / 0)
    queue.close()
    assert queue.take(fits) == [] and isinstance(failed.exception(), ZeroDivisionError)
    last = queue.take(fits)
    assert [one.item for one in last] == [3, 4] and queue.take(fits) is None
    answer(last[0], "done")
    answer(last[1], error=Busy("no"))
    assert results[3].result() == "done" and isinstance(results[4].exception(), Busy)
    with pytest.raises(Busy):
        queue.change(lambda: None)


def test_late_requests_are_reported_and_not_worked_on():
    queue: WorkQueue[str] = WorkQueue(5, 0.01)
    queue.open()
    late = queue.put("late")
    time.sleep(0.03)
    queue.timeout_seconds = 60.0
    queue.put("good")
    assert [one.item for one in queue.take(fits)] == ["good"]
    assert "too long" in str(late.exception())


def test_a_waiting_thread_wakes():
    queue: WorkQueue[int] = WorkQueue(5, 60.0)
    queue.open()
    taken: list = []
    thread = threading.Thread(target=lambda: taken.extend(queue.take(fits)))
    thread.start()
    queue.put(7)
    thread.join(5)
    assert [one.item for one in taken] == [7]
