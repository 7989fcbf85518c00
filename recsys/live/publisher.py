"""Publishes versions of a model while it trains: a companion of the run.

The values are copied between two steps and written by a thread; while it writes, no further version is begun, so what a
server gets is always the newest. The first version is complete and written before the first step: a folder that cannot
be written ends the run at once and not after an hour.

Where tables on the host are spread over processes, process 0 puts the rows of all beside the dense weights. Steps (or
event time) alone then decide when a version is due, so that all agree, and a version waits for the one before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.training.backend import Backend
from parallel.training.companions import Companion
from parallel.training.operation.saving import disks_of
from recsys.data.features import FeatureSpec
from recsys.data.readers import reader
from recsys.data.vocabulary import VOCABULARY
from recsys.live.host_rows import HostRows
from recsys.live.settings import PublishSettings
from recsys.live.versions import Delta, Values, Versions
from recsys.tables.names import is_accumulator, is_sparse

if TYPE_CHECKING:
    from recsys.settings import Run

# Rows whose gradient is 0 stay as they are under these.
_ROW_EXACT = ("adagrad", "rowwise_adagrad", "lazy_adam")


class TouchedRows:
    """Which rows of the tables in the graph changed since the last version.

    Args:
        spec: columns of the features.
        exact: only rows that a batch names change; otherwise tables are compared with a copy of the last version.
    """

    def __init__(self, spec: FeatureSpec, exact: bool) -> None:
        self.exact, self.marks = exact, {}
        self.columns = {width: np.concatenate([np.arange(slot.start, slot.start + slot.length)
                                               for slot in spec.slots.values() if slot.width == width])
                        for width in spec.tables}
        self.rows = spec.tables
        self.copies: dict[str, np.ndarray] = {}
        self.begin()

    def begin(self) -> None:
        """Nothing has changed."""
        self.marks = {width: np.zeros(rows, bool) for width, rows in self.rows.items()} if self.exact else {}

    def add(self, ids_BM: np.ndarray) -> None:
        """Rows of a batch."""
        for width, marks in self.marks.items():
            marks[ids_BM[:, self.columns[width]].reshape(-1)] = True

    def changed(self, name: str, values_VW: np.ndarray) -> np.ndarray:
        """int64 numbers of the rows of a table that changed; called once a version."""
        if self.exact:
            return np.flatnonzero(self.marks[values_VW.shape[1]])
        before = self.copies.get(name)
        self.copies[name] = values_VW
        return np.arange(len(values_VW)) if before is None else np.flatnonzero((before != values_VW).any(1))


class Publisher(Companion):
    """See the top of this file.

    Args:
        settings: `publish`.
        folder: of the versions.
        backend: whose parameters are published.
        spec: columns of the features in the network's input.
        describe: the run's settings, kept in complete versions.
        vocabulary: file that goes beside the versions.
        exact_rows: see `TouchedRows`.
        tables: `recsys.tables.host.HostTables`, where the tables are on the host.
        event_time: of a step, in seconds.
        ids_of: all columns of the ids [B, M] of a batch.
    """

    name = "publish"

    def __init__(self, settings: PublishSettings, folder: str | Path, backend: Backend, spec: FeatureSpec,
                 describe: dict[str, Any], vocabulary: Path, *, exact_rows: bool, tables: Any = None,
                 event_time: Callable[[int], float | None] = lambda step: None,
                 ids_of: Callable[[Any], np.ndarray] = lambda batch: batch[0]) -> None:
        self.settings, self.backend, self.describe = settings, backend, describe
        self.vocabulary, self.event_time, self.ids_of = vocabulary, event_time, ids_of
        self.touched = TouchedRows(spec, exact_rows) if tables is None else None
        self.versions = Versions(folder, settings.keep)
        self.thread, self.writing = ThreadPoolExecutor(1, "publish"), None
        self.hosted = HostRows(tables, self.versions.folder) if tables is not None else None
        self.spread = self.hosted is not None and self.hosted.spread
        self.step = self.published = 0
        self.time: float | None = None
        self.begun = False

    def before_step(self, step: int, batch: Any) -> None:
        """Publishes the first version; marks the batch's rows."""
        if not self.begun:
            self.begun, self.step, self.time = True, step, self.event_time(step)
            self._publish(step, full=True).result()
        if self.touched is not None:
            self.touched.add(self.ids_of(batch))

    def after_step(self, step: int, outputs: dict[str, float]) -> None:
        """Publishes where it is time."""
        if self.writing is not None and self.writing.done():
            self.writing.result()  # an error of the thread ends the run
            self.writing = None
        if (self.writing is None or self.spread) and self._due(step):
            self.writing = self._publish(step)

    def finish(self, step: int) -> dict[str, int]:
        """Publishes what the run ended with; figures."""
        if self.writing is not None:
            self.writing.result()
        if self.begun and step > self.step:
            self._publish(step).result()
        self.thread.shutdown()
        return {"versions": self.published, "version": self.versions.version}

    def _due(self, step: int) -> bool:
        own, now = self.settings, self.event_time(step)
        if own.every_steps is not None and step - self.step >= own.every_steps:
            return True
        return (own.every_seconds is not None and now is not None
                and (self.time is None or now - self.time >= own.every_seconds))

    # -- what is written ----------------------------------------------------------------------------------------------

    def _publish(self, step: int, full: bool = False) -> Future:
        """Copies what is to be written and hands it to the thread."""
        self.step, self.time = step, self.event_time(step)
        swept = self.hosted is not None and self.hosted.swept()
        full = full or swept or self.published % self.settings.full_every == 0
        self.published += 1
        parameters = {tensor.name: np.array(tensor.read()) for tensor in self.backend.parameters()}
        delta = Delta(0, step, self.time)
        for name, values in parameters.items():
            if is_accumulator(name):
                continue
            if not is_sparse(name):
                delta.dense[name] = values
                continue
            rows = self.touched.changed(name, values)
            delta.rows[name] = rows, values[rows]
        add = self.hosted.stage(full, self._written) if self.hosted is not None else None
        if self.touched is not None:
            self.touched.begin()
        if self.backend.rank != 0:
            return self.thread.submit(lambda: None)
        if full:
            tensors = [Values(name, value) for name, value in parameters.items()]
            return self.thread.submit(self._write_full, tensors, step, self.time, add)
        return self.thread.submit(self.versions.write_delta, delta, add)

    def _written(self) -> None:
        if self.writing is not None:
            self.writing.result()

    def _write_full(self, tensors: list, step: int, time: float | None, add: Callable[[Path], Any] | None) -> int:
        target = self.versions.folder / VOCABULARY
        with atomic_write(target, "wb") as file, self.vocabulary.open("rb") as source:
            shutil.copyfileobj(source, file)
        return self.versions.write_full(tensors, {"run": self.describe}, step, time, add)


def publisher_of(settings: Run, backend: Backend, spec: FeatureSpec, *, tables: Any = None,
                 event_time: Callable[[int], float | None] = lambda step: None,
                 ids_of: Callable[[Any], np.ndarray] = lambda batch: batch[0]) -> Publisher | None:
    """The publisher of a run, where its settings want one; see `Publisher`.

    Raises:
        UserError: seconds of event time are asked for where there are none; tables are spread over machines with disks
            of their own.
    """
    own = settings.publish
    if not own.wanted:
        return None
    if own.every_seconds is not None and reader(settings.data.reader).stream is None:
        raise UserError("files have no event time", where="publish.every_seconds", value=own.every_seconds,
                        hint="set publish.every_steps")
    if tables is not None and disks_of(backend.ranks, settings.output).count > 1:
        raise UserError("versions are put together on a disk that all machines share", where="output.shared_disk",
                        value=settings.output.shared_disk, hint="set publish.every_steps to null")
    optimizer = settings.train.sparse_optimizer or settings.train.optimizer
    folder = Path(own.directory or Path(settings.output.directory) / "live")
    return Publisher(own, folder, backend, spec, settings.model_dump(mode="json"),
                     Path(settings.output.directory) / VOCABULARY, tables=tables, event_time=event_time, ids_of=ids_of,
                     exact_rows=optimizer.name in _ROW_EXACT and backend.ranks == 1)
