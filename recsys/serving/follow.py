"""A server that follows a run: it sees new versions by itself and takes them between two batches.

Deltas are read beside the scoring; the rows of tables are then written in place by small graphs of fixed sizes, which
are compiled at the start, so a version costs the scoring thread milliseconds whatever the size of the tables. All of a
version (or of several that came meanwhile) is put in place at once: an answer is of one version, and says which.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from parallel.common.errors import UserError
from parallel.common.progress import info
from parallel.serving.queue import Busy
from recsys.live.versions import CURRENT, Current, Delta, merged, read_current, read_delta
from recsys.saved_model import Trained, load

_ROWS_AT_ONCE = (64, 1024, 16384)
LIVE = "live"


class PutRows(nn.Cell):
    """Writes rows of a parameter in place."""

    def __init__(self, parameter: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.parameter, self.scatter = parameter, ops.ScatterUpdate()

    def construct(self, rows_n: Tensor, values_nW: Tensor) -> Tensor:
        return self.scatter(self.parameter, rows_n, values_nW)


class RowWriter:
    """`PutRows` in batches of a few sizes, the last one filled up with its last row again."""

    def __init__(self, parameter: Parameter) -> None:
        self.cell, self.width = PutRows(parameter), parameter.shape[1]
        self.dtype = parameter.dtype
        self.first = np.asarray(parameter.asnumpy()[:1])

    def warm(self) -> None:
        """Compiles every size; writes the first row onto itself."""
        for size in _ROWS_AT_ONCE:
            self.cell(Tensor(np.zeros(size, np.int32)), Tensor(np.repeat(self.first, size, 0), self.dtype))

    def __call__(self, rows_n: np.ndarray, values_nW: np.ndarray) -> None:
        """Values of rows, each named once."""
        begin = 0
        while begin < len(rows_n):
            left = len(rows_n) - begin
            size = next((size for size in _ROWS_AT_ONCE if size >= left), _ROWS_AT_ONCE[-1])
            index = np.minimum(np.arange(begin, begin + size), len(rows_n) - 1)
            self.cell(Tensor(rows_n[index].astype(np.int32)), Tensor(values_nW[index], self.dtype))
            begin += size


class LiveModel:
    """A served model that takes deltas.

    Args:
        trained: the model, which the engine serves too.
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.parameters = {parameter.name: parameter for parameter in trained.model.get_parameters()}
        tables = [] if trained.tables is not None else [
            name for name in self.parameters if name.endswith(".table")]
        self.writers = {name: RowWriter(self.parameters[name]) for name in tables}

    def warm(self) -> None:
        """Compiles what writes rows."""
        for writer in self.writers.values():
            writer.warm()

    def check(self, delta: Delta) -> None:
        """Raises a `UserError` for a delta of another model."""
        for name, value in delta.dense.items():
            if name not in self.parameters or tuple(self.parameters[name].shape) != value.shape:
                raise UserError(f"'{name}' of version {delta.version} does not fit the model that is served",
                                hint="start another server for it")
        if unknown := set(delta.rows) - set(self.writers):
            raise UserError(f"version {delta.version} has rows of '{sorted(unknown)[0]}', which is not served")

    def put(self, delta: Delta) -> None:
        """Puts the values of `merged` deltas in place."""
        for name, value in delta.dense.items():
            parameter = self.parameters[name]
            parameter.set_data(Tensor(value, parameter.dtype))
        for name, (rows, values) in delta.rows.items():
            self.writers[name](rows, values)
        for name, parts in delta.entries.items():
            for entries in parts:
                self.trained.tables.tables[name].put(entries)


def live_folder(checkpoint: str | Path) -> Path:
    """The folder of versions that is meant by a run's folder, or by itself.

    Raises:
        UserError: nothing has been published there.
    """
    path = Path(checkpoint)
    for folder in (path / LIVE, path):
        if (folder / CURRENT).is_file():
            return folder
    raise UserError("nothing has been published here", where=path,
                    hint="train with publish.every_steps or publish.every_seconds")


def load_current(folder: Path, rows: int) -> tuple[Trained, Current]:
    """The newest version, from nothing.

    Raises:
        UserError: it cannot be read; versions that went while they were read are tried anew.
    """
    for attempt in range(5):
        current = read_current(folder)
        try:
            trained = load(current.chain[0][1], rows=rows)
            if deltas := [read_delta(path) for _, path in current.chain[1:]]:
                LiveModel(trained).put(merged(deltas))
            return trained, current
        except (UserError, FileNotFoundError):
            if attempt == 4 or read_current(folder) == current:
                raise
    raise AssertionError


class Follower:
    """Watches a folder of versions and gives them to an engine.

    Args:
        engine: of `recsys.serving.engine`.
        current: the version that it serves.
        seconds: between two looks.
        counted: called with "done" or "refused" at every version.
    """

    def __init__(self, engine: Any, current: Current, seconds: float, counted: Any = lambda outcome: None) -> None:
        self.engine, self.current, self.seconds, self.counted = engine, current, seconds, counted
        self.model = LiveModel(engine.trained)
        self.held: int | None = None
        self._refused: Current | None = None
        self._was_pinned = False
        self._stop, self._looking = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._work, name="follow", daemon=True)

    def start(self) -> None:
        """Begins to watch; the engine runs."""
        self.engine.change(self.model.warm)
        self.engine.change(lambda: self.engine.take_version(self.current.version, cleared=False))
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(self.seconds):
            try:
                self.look()
            except Busy:
                return
            except (UserError, FileNotFoundError) as error:  # a version may have gone while it was read
                self._refuse_version(str(error))

    def _refuse_version(self, error: str) -> None:
        if self._refused != self.current:
            info(f"version not taken: {error}")
            self._refused = self.current
        self.counted("refused")

    def look(self) -> bool:
        """Takes the newest version if it is a new one; whether it was. A pinned server takes none, and after it a
        complete
        one: what is in place is then no link of the chain."""
        with self._looking:
            if self.engine.pinned is not None:
                self._was_pinned = True
                return False
            return self._look()

    def _look(self) -> bool:
        newest = read_current(self.current.folder)
        if newest is None or (newest.version == self.current.version and not self._was_pinned):
            return False
        steps = None if self._was_pinned else newest.after(self.current.version)
        if steps is None:
            self._take_complete(newest)
        else:
            delta = merged([read_delta(path) for _, path in steps])
            self.model.check(delta)
            self.engine.change(lambda: self._put(delta, newest))
        self.current, self._refused, self._was_pinned = newest, None, False
        self.counted("done")
        return True

    def reload(self) -> dict[str, Any]:
        """Takes the newest version now, as /reload asks."""
        self.look()
        return {"version": self.engine.version, "checkpoint": str(self.current.chain[-1][1])}

    def _put(self, delta: Delta, newest: Current) -> None:
        self.model.put(delta)
        self.engine.take_version(newest.version)

    def _take_complete(self, newest: Current) -> None:
        """A chain that does not begin at the version served: its complete version, then its deltas, put in place
        together."""
        prepared = self.engine.prepare(newest.chain[0][1])
        deltas = [read_delta(path) for _, path in newest.chain[1:]]
        delta = merged(deltas) if deltas else None
        if delta is not None:
            self.model.check(delta)

        def put() -> None:
            self.engine.put(*prepared)
            self.model.trained = self.engine.trained
            if delta is not None:
                self.model.put(delta)
            self.engine.take_version(newest.version)

        self.engine.change(put)

    def figures(self) -> dict[str, Any]:
        """Of the version that is served, for /health."""
        return {"step": self.current.step, "event_time": self.current.event_time}
