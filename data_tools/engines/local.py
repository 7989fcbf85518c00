"""The engine without Spark: processes of this machine."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from data_tools.engines.base import Engine
from parallel.common.errors import UserError
from parallel.common.progress import Bar, info

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_MAX_DEATHS = 3  # of workers at one item


class LocalEngine(Engine):
    """Processes of this machine.

    Args:
        workers: how many; None = one a core. With one worker, or one part, everything runs in this process.
    """

    name = "local"

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self._started: list[_Worker] = []

    def map(self, function: Callable[[_Item], _Result], items: list[_Item], description: str) -> Iterator[_Result]:
        workers = min(self.workers, len(items))
        with Bar(len(items), description) as bar:
            for result in map(function, items) if workers <= 1 else self._map(function, items, workers, description):
                yield result
                bar.advance()

    def _map(self, function: Callable, items: list, count: int, description: str) -> Iterator[Any]:
        """Results in the order in which they are done; the workers stay for the next call if all goes well.

        Raises:
            UserError: an item killed one worker after the other.
            Exception: what `function` raised.
        """
        while len(self._started) < count:
            self._started.append(_Worker())
        finished = False
        try:
            yield from _share_out(function, items, self._started, description)
            finished = True
        finally:
            if not finished:
                self.close()

    def close(self) -> None:
        for worker in self._started:
            worker.stop()
        self._started = []


class _Worker:
    """A process that answers one item at a time over its own pipe, so that its death harms no other.

    (The pools of the standard library share one queue, which a killed process can leave locked.)
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy locks of threads (progress bar, Arrow)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None

    def give(self, number: int, function: Callable, item: Any) -> None:
        self.number = number
        with contextlib.suppress(OSError):  # it died: its pipe shows it when it is read
            self.pipe.send((function, item))

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection) -> None:
    """Runs in the worker until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent alone answers Ctrl-C
    while True:
        try:
            function, item = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(item))
        except Exception as error:
            answer = (False, error)
        pipe.send(answer)


def _share_out(function: Callable, items: list, workers: list[_Worker], description: str) -> Iterator[Any]:
    """Gives the items out one by one; a worker that dies is replaced in `workers` and its item given out again."""
    waiting, deaths = collections.deque(range(len(items))), collections.Counter()
    while waiting or any(worker.number is not None for worker in workers):
        for worker in workers:
            if worker.number is None and waiting:
                number = waiting.popleft()
                worker.give(number, function, items[number])
        busy = {worker.pipe: worker for worker in workers if worker.number is not None}
        for pipe in wait(list(busy)):
            worker = busy[pipe]
            number, worker.number = worker.number, None
            try:
                good, result = pipe.recv()
            except (EOFError, OSError):
                worker.stop()
                workers[workers.index(worker)] = _Worker()
                deaths[number] += 1
                _report_death(description, number, deaths[number])
                waiting.appendleft(number)
                continue
            if not good:
                raise result
            yield result


def _report_death(description: str, number: int, deaths: int) -> None:
    if deaths >= _MAX_DEATHS:
        raise UserError(f"part {number} killed {deaths} workers", where=description,
                        hint="look for lack of memory; try fewer workers or a smaller read.split_bytes")
    info(f"{description}: a worker died; part {number} is done again")
