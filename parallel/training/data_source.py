"""What the trainer reads from, and reading ahead."""

from __future__ import annotations

import itertools
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from parallel.common.errors import UserError

_PREFETCHED = 2
SAMPLE_NUMBERS = "sample_numbers"
"""The input by which a network with dropout knows its samples (`parallel.layers.dropout`)."""


class DataSource(ABC):
    """What the trainer reads from. Batch i depends only on the source's seed and i.

    Attributes:
        columns: names of the arrays of a batch.
        steps_per_epoch: batches in one pass over the data.
        forms_vary: whether batches have different shapes; those of other sources are compared with the first.
    """

    columns: Sequence[str]
    steps_per_epoch: int
    forms_vary: bool = False

    @abstractmethod
    def batches(self, start_step: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Batches start_step, start_step + 1, ...: one array per column, this rank's rows first dim."""

    def mindspore_dataset(self, start_step: int, steps: int) -> Any:
        """The same batches as a `mindspore.dataset` of `steps` batches, for data sink (Ascend).

        Raises:
            UserError: the source has none.
        """
        raise UserError("this data is not fed by data sink", where="train.data_sink", hint="set it to false")


class WaitingSource(DataSource):
    """A data source that waits for events.

    Attributes:
        ends: whether its batches may end, and the run with them.
        read_ahead: whether batches may be read before the step that takes them.
    """

    ends: bool
    read_ahead: bool

    @abstractmethod
    def interrupt(self) -> None:
        """Ends a wait for events; called by the handler of a signal."""


class BatchForm:
    """Shapes and element types of a run's batches: those that its graph was compiled for.

    A framework that compiles at the first call would compile another graph for a batch of another form, and a sharded
    network cannot be compiled twice: its parameters are slices by then.

    Args:
        inputs: (name, shape, element type) of the compiled graph, this process's rows; None = those of the first batch.
    """

    def __init__(self, inputs: Sequence[tuple[str, tuple[int, ...], str]] | None = None) -> None:
        self.inputs = [(name, tuple(shape), str(dtype)) for name, shape, dtype in inputs] if inputs else None

    def check(self, batch: Sequence[np.ndarray]) -> None:
        """
        Raises:
            ValueError: the batch has another form; a defect of its source.
        """
        found = [(tuple(item.shape), str(item.dtype)) for item in batch]
        if self.inputs is None:
            self.inputs = [(f"input {place}", *form) for place, form in enumerate(found)]
        if len(found) != len(self.inputs):
            raise ValueError(f"a batch of {len(found)} arrays where the graph takes {len(self.inputs)}")
        for (name, shape, dtype), form in zip(self.inputs, found, strict=True):
            if form != (shape, dtype):
                raise ValueError(f"{name} of a batch is {form[1]} {list(form[0])}, and the graph was compiled for "
                                 f"{dtype} {list(shape)}")


class UnreadSource(DataSource):
    """Batches of zeros in place of a source whose batches nobody looks at.

    Args:
        source: not read.
        inputs: (name, shape, element type) of a training batch (`Backend.inputs`).
    """

    def __init__(self, source: DataSource, inputs: Sequence[tuple[str, tuple[int, ...], str]]) -> None:
        self.columns, self.steps_per_epoch = source.columns, source.steps_per_epoch
        self.batch = tuple(np.zeros(shape, dtype) for name, shape, dtype in inputs if name != SAMPLE_NUMBERS)

    def batches(self, start_step: int) -> Iterator[tuple[np.ndarray, ...]]:
        """See `DataSource`."""
        return itertools.repeat(self.batch)


def sample_numbers(iteration: int, batch: int, part: int = 0, parts: int = 1) -> np.ndarray:
    """Numbers through the whole run of the samples in one global batch, int32 (wraps) [batch / parts].

    Args:
        iteration: number of the batch.
        batch: samples of a global batch.
        part, parts: which consecutive share of them.
    """
    share = batch // parts
    first = iteration * batch + part * share
    return np.arange(first, first + share, dtype=np.int64).astype(np.int32)


class NumberedSource(DataSource):
    """A source with the numbers of the samples as one more column, which a network with dropout takes.

    Args:
        source: this process's rows of every batch.
        part, parts: which consecutive share of the global batch they are.
    """

    def __init__(self, source: DataSource, part: int, parts: int) -> None:
        self.source, self.part, self.parts = source, part, parts
        self.columns, self.steps_per_epoch = (*source.columns, SAMPLE_NUMBERS), source.steps_per_epoch
        self.forms_vary = source.forms_vary

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
