"""Processes that tokenize and write the shards of a packing: each owns some shards, none is shared."""

from __future__ import annotations

import multiprocessing
import queue
import time
import traceback
from collections.abc import Callable
from typing import Any

from pangu.data.packing import PackTokenizer, _Shard
from parallel.common.errors import UserError

_BLOCKS_WAITING = 4
_POLL_SECONDS = 0.2


class WriterPool:
    """Writer processes behind bounded queues; shard `n` belongs to process `n % workers`.

    Use as a context; leaving it early ends the processes. Processes are spawned, not forked, because MindSpore's
    threads do not survive a fork.

    Args:
        plans: arguments of every shard.
        workers: number of processes.
        tokenizer_factory: picklable; called once in each process.
    """

    def __init__(self, plans: list[dict], workers: int, tokenizer_factory: Callable[[], PackTokenizer]) -> None:
        context = multiprocessing.get_context("spawn")
        self._results = context.Queue()
        self._queues = [context.Queue(_BLOCKS_WAITING) for _ in range(workers)]
        self._count = len(plans)
        self._processes = []
        for number, inbox in enumerate(self._queues):
            own = {index: plan for index, plan in enumerate(plans) if index % workers == number}
            process = context.Process(target=_work, args=(own, tokenizer_factory, inbox, self._results), daemon=True)
            process.start()
            self._processes.append(process)

    def __enter__(self) -> WriterPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        for process in self._processes:
            process.join()
        for channel in [*self._queues, self._results]:
            channel.cancel_join_thread()
            channel.close()

    def send(self, shard: int, block: list[str]) -> None:
        """Hands a block of documents to the owner of `shard`; waits while its queue is full.

        Raises:
            UserError: a worker met one.
            RuntimeError: a worker failed or was killed.
        """
        inbox = self._queues[shard % len(self._queues)]
        while True:
            try:
                return inbox.put((shard, block), timeout=_POLL_SECONDS)
            except queue.Full:
                self._raise_failure()

    def finish(self) -> list[dict]:
        """Lets every worker close its files; the index entries in the order of the plans."""
        for number in range(len(self._queues)):
            self.send(number, [])
        entries: dict[int, dict] = {}
        while len(entries) < self._count:
            self._raise_failure(entries)
            time.sleep(0)
        return [entries[index] for index in range(self._count)]

    def _raise_failure(self, entries: dict[int, dict] | None = None) -> None:
        """Takes what workers reported: entries into `entries`, errors raised here."""
        try:
            kind, value = self._results.get(timeout=_POLL_SECONDS if entries is not None else 0.001)
        except queue.Empty:
            dead = [process.exitcode for process in self._processes if process.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(f"a packing process ended with exit code {dead[0]}") from None
            return
        if kind == "user_error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"a packing process failed:\n{value}")
        if entries is not None:
            entries.update(value)


def _work(plans: dict[int, dict], tokenizer_factory: Callable[[], PackTokenizer], inbox: Any, results: Any) -> None:
    """Body of a writer process; an empty block is the end."""
    try:
        encode = tokenizer_factory().encode
        shards = {index: _Shard(encode, **plan) for index, plan in plans.items()}
        while True:
            number, block = inbox.get()
            if not block:
                break
            shards[number].add(block)
        results.put(("entries", {index: shard.finish() for index, shard in shards.items()}))
    except UserError as error:
        results.put(("user_error", str(error)))
    except Exception:
        results.put(("error", traceback.format_exc()))
