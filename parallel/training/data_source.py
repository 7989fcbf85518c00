"""What the trainer reads from, and reading ahead."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from parallel.task import SAMPLE_NUMBERS, sample_numbers

_PREFETCHED = 2


class DataSource(Protocol):
    """What the trainer reads from. Batch i depends only on the source's seed and i. See also `WaitingSource`."""

    columns: Sequence[str]
    steps_per_epoch: int

    def batches(self, start_step: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Batches start_step, start_step + 1, ...: one array per column, this rank's rows first dim."""
        ...

    def mindspore_dataset(self, start_step: int, steps: int) -> Any:
        """The same batches as a `mindspore.dataset` of `steps` batches, for data sink (Ascend). May be absent."""
        ...


@runtime_checkable
class WaitingSource(Protocol):
    """A data source that waits for events.

    Args:
        ends: whether its batches may end, and the run with them.
        read_ahead: whether batches may be read before the step that takes them.
    """

    ends: bool
    read_ahead: bool

    def interrupt(self) -> None:
        """Ends a wait for events; called by the handler of a signal."""
        ...


class NumberedSource:
    """A source with the numbers of the samples as one more column, which a network with dropout takes.

    Args:
        source: this process's rows of every batch.
        part, parts: which consecutive share of the global batch they are.
    """

    def __init__(self, source: DataSource, part: int, parts: int) -> None:
        self.source, self.part, self.parts = source, part, parts
        self.columns, self.steps_per_epoch = (*source.columns, SAMPLE_NUMBERS), source.steps_per_epoch
        self.stream = source if isinstance(source, WaitingSource) else None
        self.ends = self.stream is not None and self.stream.ends
        self.read_ahead = self.stream is None or self.stream.read_ahead

    def interrupt(self) -> None:
        """See `WaitingSource`."""
        if self.stream is not None:
            self.stream.interrupt()

    def batches(self, start_step: int) -> Iterator[tuple[np.ndarray, ...]]:
        """See `DataSource`."""
        for step, batch in enumerate(self.source.batches(start_step), start_step):
            yield *batch, sample_numbers(step, len(batch[0]) * self.parts, self.part, self.parts)

    def mindspore_dataset(self, start_step: int, steps: int) -> Any:
        """See `DataSource`."""
        from mindspore import dataset

        return dataset.GeneratorDataset(lambda: itertools.islice(self.batches(start_step), steps), list(self.columns),
                                        shuffle=False, num_parallel_workers=1)


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def prefetch(items: Iterator, depth: int = _PREFETCHED) -> Iterator:
    """`items`, read ahead by a thread so that the next batch is ready when the step ends. Order is kept."""
    ready: queue.Queue = queue.Queue(depth)
    stop, end = threading.Event(), object()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(end)
        except BaseException as error:  # noqa: BLE001 - handed to the reader, who raises it
            put(_Failure(error))

    thread = threading.Thread(target=read, daemon=True, name="prefetch")
    thread.start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stop.set()
        thread.join(timeout=5.0)
