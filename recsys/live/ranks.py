"""Publishes versions of a model whose parameters lie in slices on the processes of a run. Needs no MindSpore.

At a version every process writes its slices of the dense weights, and the rows of its tables that changed, into a
hidden folder that all share; process 0 makes the version of them, in a thread, tensor by tensor. Rows of tables on the
host come the same way (`recsys.live.host_rows`). What a server gets is what one process would have published.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.checkpoint.folder import PARAMETERS_FILE
from parallel.checkpoint.full import save
from parallel.checkpoint.safetensors_file import SafetensorsFile, dtype_name, write_safetensors
from parallel.checkpoint.sharded import Slices
from parallel.common.errors import UserError
from parallel.common.files import atomic_write
from parallel.training.backend import Backend
from parallel.training.companions import Companion
from parallel.training.operation.saving import disks_of
from recsys.data.vocabulary import VOCABULARY
from recsys.live.host_rows import HostRows
from recsys.live.settings import PublishSettings
from recsys.live.versions import Delta, Versions
from recsys.tables.names import is_accumulator, is_sparse

if TYPE_CHECKING:
    from recsys.settings import Run

_STAGED = ".staged"
_ROWS, _VALUES = ".rows", ".values"


class Assembled:
    """A `NamedTensor` that is put together from the slices of all processes when it is read.

    Args:
        slices: of a staged version.
        name: of the parameter.
    """

    def __init__(self, slices: Slices, name: str) -> None:
        found = slices.tensors[name]
        self.slices, self.name, self.dtype, self.shape = slices, name, found.dtype, found.shape

    def read(self) -> np.ndarray:
        """See `NamedTensor`."""
        return self.slices.read(self.name)

    def assign(self, value: np.ndarray) -> None:
        """Nothing is put back."""
        raise NotImplementedError


class RanksPublisher(Companion):
    """See the top of this file.

    Args:
        settings: `publish`.
        folder: of the versions, which all processes see.
        backend: whose parameters are published.
        describe: the run's settings, kept in whole versions.
        vocabulary: file that goes beside the versions.
        tables: `recsys.tables.host.HostTables`, where the tables are on the host.
    """

    name = "publish"

    def __init__(self, settings: PublishSettings, folder: Path, backend: Backend, describe: dict[str, Any],
                 vocabulary: Path, tables: Any = None) -> None:
        self.settings, self.folder, self.backend, self.describe = settings, folder, backend, describe
        self.vocabulary = vocabulary
        self.versions = Versions(folder, settings.keep)
        self.hosted = HostRows(tables, folder) if tables is not None else None
        self.thread, self.writing = ThreadPoolExecutor(1, "publish"), None
        self.copies: dict[str, np.ndarray] = {}
        self.step = self.published = 0
        self.begun = False

    def before_step(self, step: int, batch: Any) -> None:
        """Publishes the first version, whole, so that a folder that cannot be written ends the run at once."""
        if not self.begun:
            self.begun = True
            self._publish(step, full=True)
            self._written()

    def after_step(self, step: int, outputs: dict[str, float]) -> None:
        """Publishes where it is time; all processes agree, since steps alone decide."""
        if step - self.step >= self.settings.every_steps:
            self._publish(step)

    def finish(self, step: int) -> dict[str, int]:
        """Publishes what the run ended with; figures."""
        if self.begun and step > self.step:
            self._publish(step)
        self._written()
        self.backend.barrier()
        self.thread.shutdown()
        return {"versions": self.published, "version": self.versions.version}

    def _written(self) -> None:
        """Waits for the version before; an error of the thread ends the run."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _publish(self, step: int, full: bool = False) -> None:
        swept = self.hosted is not None and self.hosted.swept()
        full = full or swept or self.published % self.settings.full_every == 0
        self.step, self.published = step, self.published + 1
        self._written()
        tensors, staged = list(self.backend.parameters()), self.folder / _STAGED
        rows = self._changed([tensor for tensor in tensors if is_sparse(tensor.name)])
        self.backend.barrier()  # what was staged before is written
        add = self.hosted.stage(full, self._written) if self.hosted is not None else None
        if not full:
            tensors = [tensor for tensor in tensors if not is_sparse(tensor.name) and not is_accumulator(tensor.name)]
            _write_rows(staged / f"rows-{self.backend.rank:05d}.safetensors", rows)
        path = save(staged, step, tensors, (), {}, 1, rank=self.backend.rank, holder=self.backend.holder)
        if self.backend.rank == 0:
            self.writing = self.thread.submit(self._write_full if full else self._write_delta, path, step, add)

    def _changed(self, tables: list[Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(numbers, values) of this process's rows that changed since the last version, by table."""
        found = {}
        for tensor in tables:
            values, before = tensor.read(), self.copies.get(tensor.name)
            rows = np.arange(len(values)) if before is None else np.flatnonzero((before != values).any(1))
            first = self.backend.holder.extents[tensor.name][0][0] if self.backend.holder is not None else 0
            found[tensor.name] = rows + first, values[rows]
            self.copies[tensor.name] = values
        return found

    def _write_full(self, path: Path, step: int, add: Callable[[Path], Any] | None) -> None:
        target = self.folder / VOCABULARY
        with atomic_write(target, "wb") as file, self.vocabulary.open("rb") as source:
            shutil.copyfileobj(source, file)
        slices = Slices(path)
        tensors = [Assembled(slices, name) for name in slices.names(PARAMETERS_FILE)]
        self.versions.write_full(tensors, {"run": self.describe}, step, None, add)

    def _write_delta(self, path: Path, step: int, add: Callable[[Path], Any] | None) -> None:
        slices, delta = Slices(path), Delta(0, step, None)
        delta.dense = {name: Assembled(slices, name) for name in slices.names(PARAMETERS_FILE)}
        parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for rank in range(self.backend.ranks):
            file = SafetensorsFile(self.folder / _STAGED / f"rows-{rank:05d}.safetensors")
            for name in file.entries:
                if name.endswith(_ROWS):
                    table = name.removesuffix(_ROWS)
                    parts.setdefault(table, []).append((file.read(name), file.read(table + _VALUES)))
        for table, pieces in parts.items():
            rows, values = (np.concatenate(part) for part in zip(*pieces, strict=True))
            distinct, first = np.unique(rows, return_index=True)  # replicas hold the same rows
            delta.rows[table] = distinct, np.ascontiguousarray(values[first])
        self.versions.write_delta(delta, add)


def _write_rows(path: Path, rows: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name + ending: array for name, pair in rows.items()
              for ending, array in zip((_ROWS, _VALUES), pair, strict=True)}
    write_safetensors(path, [(name, dtype_name(array.dtype), array.shape, lambda array=array: array)
                             for name, array in arrays.items()])


def ranks_publisher(settings: Run, backend: Backend, tables: Any = None) -> RanksPublisher | None:
    """The publisher of a run whose processes hold slices, where its settings want one; see `RanksPublisher`.

    Raises:
        UserError: seconds of event time are asked for; the machines have disks of their own.
    """
    own = settings.publish
    if not own.wanted:
        return None
    if own.every_steps is None:
        raise UserError("files have no event time", where="publish.every_seconds", value=own.every_seconds,
                        hint="set publish.every_steps")
    if disks_of(backend.ranks, settings.output).count > 1:
        raise UserError("versions are put together on a disk that all machines share", where="output.shared_disk",
                        value=settings.output.shared_disk, hint="set publish.every_steps to null")
    directory = Path(settings.output.directory)
    return RanksPublisher(own, Path(own.directory or directory / "live"), backend, settings.model_dump(mode="json"),
                          directory / VOCABULARY, tables)
