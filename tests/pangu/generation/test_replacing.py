"""Two processes, here threads, that hold one model or two: a load of all or of none, calls to the one that is meant."""

from __future__ import annotations

import threading
from queue import Queue

import numpy as np
import pytest

from pangu.generation.sharded import replacing
from pangu.generation.sharded.replacing import Models
from parallel.common.errors import UserError


class Pair:
    """One of two members of a group."""

    def __init__(self, number: int, messages: Queue, told: list, meeting: threading.Barrier) -> None:
        self.number, self.messages, self.told, self.meeting = number, messages, told, meeting

    def broadcast(self, message: np.ndarray) -> None:
        self.messages.put(message)

    def receive(self) -> np.ndarray:
        return self.messages.get(timeout=10)

    def tell_group(self, item):
        self.told[self.number] = item
        self.meeting.wait(10)
        found = list(self.told)
        self.meeting.wait(10)
        return found


class Rank:
    """Graphs of a checkpoint."""

    def __init__(self, path: str) -> None:
        self.path, self.calls, self.released = path, 0, False

    def shape(self, kind: str) -> dict:
        return {}

    def release(self) -> None:
        self.released = True


@pytest.fixture
def pair(monkeypatch):
    """(models of the first process, of the second, which follows); a path with the number of a process fails there."""
    def run_call(rank, call, shapes, blocks):
        rank.calls += 1

    monkeypatch.setattr(replacing, "run_call", run_call)
    monkeypatch.setattr(replacing.Call, "unpacked", lambda message: message)
    messages, told, meeting = Queue(), [None, None], threading.Barrier(2)

    def make(number: int):
        def made(path: str) -> Rank:
            if str(number) in path:
                raise UserError("damaged", where=path)
            return Rank(path)
        return made

    both = [Models(Pair(number, messages, told, meeting), make(number), 8) for number in range(2)]
    for models in both:
        models.first(Rank("a"))
    thread = threading.Thread(target=both[1].follow)
    thread.start()
    yield both
    both[0].end()
    thread.join(10)
    assert not thread.is_alive()


def test_a_load_is_one_of_all_and_calls_go_to_the_model_that_is_meant(pair):
    first, second = pair
    old = second.held[0]
    assert first.load("b 文") == 1 and first.held[1].path == "b 文"
    first.sender(1)(np.array([5], np.int32))
    first.sender(0)(np.array([5], np.int32))
    first.drop(0)
    assert first.load("c") == 2  # what was sent before has been done
    assert old.released and old.calls == 1 and second.held[1].calls == 1
    assert {number: rank.path for number, rank in second.held.items()} == {1: "b 文", 2: "c"}


@pytest.mark.parametrize("failing", [0, 1])
def test_a_load_that_fails_on_one_is_none(pair, failing):
    first, second = pair
    with pytest.raises(UserError, match="damaged"):
        first.load(f"b{failing}")
    assert list(first.held) == list(second.held) == [0]
    assert first.load("c") == 1
