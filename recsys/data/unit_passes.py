"""The passes over a log whose files are read apart, by several processes or machines: row for row what one process
finds and writes.

Each file is a task. The caller asks for rows (and times), gives every file its rank, merges what the files hold in
their order, and puts their encoded rows one after the other. `data.cache` must be visible to all that read.
"""

from __future__ import annotations

import multiprocessing
import shutil
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.common.digests import BlockSums
from parallel.common.errors import UserError
from recsys.data.encode import Columns, Encoder, Report
from recsys.data.features import Feature, FeatureSpec
from recsys.data.passes import FIELDS, PARTS, Passes, Unit, Written, rank, units_of
from recsys.data.readers import reader
from recsys.data.vocabulary import Statistics, Vocabulary

if TYPE_CHECKING:
    from recsys.settings import DataSettings

_BLOCK = 16 << 20


@dataclass
class Task:
    """What is done with every unit, wherever that is: `task(unit)`.

    Args:
        stage: one of the functions at the end of this file.
        arguments: further ones of it.
        data: `recsys.settings.DataSettings`.
        features, columns: of the encoder.
    """

    stage: Callable[..., Any]
    arguments: tuple
    data: DataSettings
    features: list[Feature]
    columns: Columns

    def __call__(self, unit: Unit) -> Any:
        own = Encoder(self.features, self.columns, self.data.on_bad_row)
        return self.stage(Passes(self.data, reader(self.data.reader), own, unit), unit, *self.arguments)


class UnitPasses(Passes):
    """See `Passes`; of a log whose reader names its files each is a unit, any other log is one."""

    def _look_ahead(self) -> None:
        units = []
        for whole in units_of(self.data, self.by):
            files = [whole.path] if self.source.files is None else map(str, self.source.files(Path(whole.path)))
            units += [Unit(file, whole.part) for file in files]
        for number, unit in enumerate(units):
            unit.number = number
        self.units = units
        if self.by == "files":
            return
        found = self._map(look)
        for *_, report in found:
            merge_reports(self.encoder.report, report)
        if len({form for _, _, form, _ in found} - {None}) > 1:
            raise UserError(f"column '{self.encoder.columns.time}' mixes numbers and dates", where=self.data.path,
                            hint="write all times in one form")
        rank(units, [rows for rows, *_ in found], [times for _, times, *_ in found] if self.by == "time" else None)

    def _map(self, stage: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`stage` of every unit, in their order."""
        encoder = self.encoder
        return self.collect(Task(stage, arguments, self.data, encoder.features, encoder.columns))

    @abstractmethod
    def collect(self, task: Task) -> list[Any]:
        """`task` of every one of `units`, in their order.

        Raises:
            UserError: what a unit raises, or who does the work is away.
        """

    def statistics(self, features: list[Feature]) -> Statistics:
        """See `Passes`."""
        merged = Statistics(features)
        for found in self._map(count, features):
            merged.merge(found)
        return merged

    def write(self, directory: Path, spec: FeatureSpec, vocabulary: Vocabulary) -> Written:
        """See `Passes`."""
        for unit in self.units:
            (directory / f"unit_{unit.number}").mkdir()
        counts = dict.fromkeys(PARTS, 0)
        for rows, report in self._map(encode, str(directory), spec, vocabulary):
            merge_reports(self.encoder.report, report)
            counts = {part: counts[part] + rows[part] for part in PARTS}
        return Written(counts, {(part, field): self._join(directory, part, field)
                                for part in PARTS for field in FIELDS})

    def _join(self, directory: Path, part: str, field: str) -> BlockSums:
        sums, last = BlockSums(), (part, field) == (PARTS[-1], FIELDS[-1])
        with (directory / f"{part}.{field}").open("wb") as target:
            for number in range(len(self.units)):
                piece = directory / f"unit_{number}" / f"{part}.{field}"
                with piece.open("rb") as source:
                    while block := source.read(_BLOCK):
                        target.write(block)
                        sums.add(block)
                piece.unlink()
                if last:
                    shutil.rmtree(piece.parent)
        return sums


class PoolPasses(UnitPasses):
    """Units read by `data.workers` processes of this machine."""

    def collect(self, task: Task) -> list[Any]:
        """See `UnitPasses`."""
        workers = min(self.data.workers, len(self.units))
        if workers <= 1:
            return list(map(task, self.units))
        # Not by fork: this process has threads, and may hold a device.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            try:
                return list(pool.map(task, self.units))
            except BrokenProcessPool:
                raise UserError("a process that read the log has died; was it short of memory?", where="data.workers",
                                value=workers, hint="make it smaller") from None
            finally:
                pool.shutdown(cancel_futures=True)


def look(passes: Passes, unit: Unit) -> tuple:
    """(rows, times, their form, report) of a unit."""
    return *passes.look(unit), passes.form, passes.encoder.report


def count(passes: Passes, unit: Unit, features: list[Feature]) -> Statistics:
    """What its training rows hold."""
    return passes.statistics(features)


def encode(passes: Passes, unit: Unit, folder: str, spec: FeatureSpec,
           vocabulary: Vocabulary) -> tuple[dict[str, int], Report]:
    """Writes its rows into a folder of their own; (rows of each part, report)."""
    written = passes.write(Path(folder) / f"unit_{unit.number}", spec, vocabulary)
    return written.rows, passes.encoder.report


def merge_reports(report: Report, other: Report) -> None:
    """Adds what another reading met."""
    report.rows += other.rows
    for name in ("skipped", "missing", "unseen"):
        getattr(report, name).update(getattr(other, name))
    report.empty_files += other.empty_files
