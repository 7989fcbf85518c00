"""The passes over a log on Spark: row for row what one machine finds and writes.

Each file is a task. The driver asks for rows (and times), gives every file its rank, merges what the files
hold in their order, and puts their encoded rows one after the other. The log and `data.cache` must be visible to all
workers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from parallel.common.digests import BlockSums
from parallel.common.errors import UserError
from parallel.common.spark.session import explain, start_session
from recsys.data.encode import Encoder, Report
from recsys.data.features import Feature, FeatureSpec
from recsys.data.passes import FIELDS, PARTS, Passes, Unit, Written, rank, units_of
from recsys.data.readers import Reader, reader
from recsys.data.vocabulary import Statistics, Vocabulary

if TYPE_CHECKING:
    from recsys.settings import DataSettings

_Result = TypeVar("_Result")
_BLOCK = 16 << 20


class SparkPasses(Passes):
    """See `Passes`; of a log whose reader names its files each is a task, any other log is one."""

    def __init__(self, data: DataSettings, source: Reader, encoder: Encoder) -> None:
        self.session = _session(data)
        super().__init__(data, source, encoder)

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
        found = self._map(lambda passes, unit: (*passes.look(unit), passes.form, passes.encoder.report))
        for *_, report in found:
            merge_reports(self.encoder.report, report)
        if len({form for _, _, form, _ in found} - {None}) > 1:
            raise UserError(f"column '{self.encoder.columns.time}' mixes numbers and dates", where=self.data.path,
                            hint="write all times in one form")
        rank(units, [rows for rows, *_ in found], [times for _, times, *_ in found] if self.by == "time" else None)

    def _map(self, function: Callable[[Passes, Unit], _Result]) -> list[_Result]:
        """`function` of every unit, in their order."""
        data, encoder = self.data, self.encoder
        features, columns, on_bad_row = encoder.features, encoder.columns, encoder.on_bad_row

        def task(unit: Unit) -> _Result:
            own = Encoder(features, columns, on_bad_row)
            return function(Passes(data, reader(data.reader), own, unit), unit)

        try:
            return self.session.sparkContext.parallelize(self.units, len(self.units)).map(task).collect()
        except Exception as error:
            raise explain(error) from error

    def statistics(self, features: list[Feature]) -> Statistics:
        """See `Passes`."""
        merged = Statistics(features)
        for found in self._map(lambda passes, unit: passes.statistics(features)):
            merged.merge(found)
        return merged

    def write(self, directory: Path, spec: FeatureSpec, vocabulary: Vocabulary) -> Written:
        """See `Passes`."""
        folder = str(directory)
        for unit in self.units:
            (directory / f"unit_{unit.number}").mkdir()

        def encode(passes: Passes, unit: Unit) -> tuple[dict, Report]:
            written = passes.write(Path(folder) / f"unit_{unit.number}", spec, vocabulary)
            return written.rows, passes.encoder.report

        counts = dict.fromkeys(PARTS, 0)
        for rows, report in self._map(encode):
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


def merge_reports(report: Report, other: Report) -> None:
    """Adds what another reading met."""
    report.rows += other.rows
    for name in ("skipped", "missing", "unseen"):
        getattr(report, name).update(getattr(other, name))
    report.empty_files += other.empty_files


def _session(data: DataSettings) -> Any:
    from importlib.util import find_spec

    if find_spec("pyspark") is None:
        raise UserError("the package pyspark is not installed", where="data.engine: spark",
                        hint='pip install -e ".[data]"')
    from pyspark.sql import SparkSession

    running = SparkSession.getActiveSession()
    return running or start_session("recsys", data.spark.master, data.spark.driver_memory, data.spark.options,
                                    "data.engine")
