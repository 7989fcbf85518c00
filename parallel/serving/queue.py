"""The queue before a thread that works in batches: bounded, with deadlines, and with changes between two batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Busy(Exception):
    """The server cannot take or finish the request now; the client may try again."""


@dataclass
class Waiting(Generic[Item]):
    """A request in the queue, and where its result goes."""

    item: Item
    deadline: float
    result: Future = field(default_factory=Future)


class WorkQueue(Generic[Item]):
    """Requests for one working thread; any thread may put them in.

    Args:
        most: requests that may wait.
        timeout_seconds: a request whose turn has not come after this is answered by `Busy`, and not worked on.
    """

    def __init__(self, most: int, timeout_seconds: float) -> None:
        self.most, self.timeout_seconds, self.running = most, timeout_seconds, False
        self._waiting: deque[Waiting[Item]] = deque()
        self._changes: deque[tuple[Callable[[], Any], Future]] = deque()
        self._wake = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def open(self) -> None:
        """Takes requests from now on."""
        self.running = True

    def close(self) -> None:
        """Takes nothing more; what waits is still handed out."""
        with self._wake:
            self.running = False
            self._wake.notify()

    def put(self, item: Item) -> Future:
        """The future of the request's result; a client that gave up may cancel it.

        Raises:
            Busy: the queue is full, or closed.
        """
        waiting = Waiting(item, time.monotonic() + self.timeout_seconds)
        with self._wake:
            if not self.running:
                raise Busy("the server is ending")
            if len(self._waiting) >= self.most:
                raise Busy(f"{self.most} requests wait already")
            self._waiting.append(waiting)
            self._wake.notify()
        return waiting.result

    def change(self, change: Callable[[], Any], always: bool = False) -> Future:
        """The future of `change()`, which the working thread calls between two batches.

        Raises:
            Busy: the queue is closed (but for `always`).
        """
        done: Future = Future()
        with self._wake:
            if not self.running and not always:
                raise Busy("the server is ending")
            self._changes.append((change, done))
            self._wake.notify()
        return done

    def take(self, fits: Callable[[list[Waiting[Item]], Item], bool]) -> list[Waiting[Item]] | None:
        """For the working thread: makes the changes, waits for requests and hands out the next batch, in order.

        Args:
            fits: whether an item still fits to a batch; an empty batch takes any.

        Returns:
            requests, none of them late or given up; may be empty after changes. None once the queue is closed and
            empty.
        """
        with self._wake:
            while self.running and not self._waiting and not self._changes:
                self._wake.wait()
            if not self._waiting and not self._changes:
                return None
            changes, batch = list(self._changes), [] if self._changes else self._batch(fits)
            self._changes.clear()
        for change, done in changes:
            _finish(done, change)
        return batch

    def _batch(self, fits: Callable[[list[Waiting[Item]], Item], bool]) -> list[Waiting[Item]]:
        batch: list[Waiting[Item]] = []
        while self._waiting:
            first = self._waiting[0]
            if first.result.cancelled():
                self._waiting.popleft()
            elif first.deadline < time.monotonic():
                answer(self._waiting.popleft(), error=Busy("the request waited too long"))
            elif batch and not fits(batch, first.item):
                break
            else:
                batch.append(self._waiting.popleft())
        return batch


def answer(waiting: Waiting, result: Any = None, error: BaseException | None = None) -> None:
    """Gives a request its result; a client that gave up has cancelled its future, perhaps this moment."""
    if not waiting.result.set_running_or_notify_cancel():
        return
    if error is None:
        waiting.result.set_result(result)
    else:
        waiting.result.set_exception(error)


def _finish(done: Future, change: Callable[[], Any]) -> None:
    try:
        done.set_result(change())
    except BaseException as error:  # noqa: BLE001 - the one who asked for the change gets it
        done.set_exception(error)
