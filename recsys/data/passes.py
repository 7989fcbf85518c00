"""Passes over a log: what its training rows hold, and its rows as numbers on disk.

A log is a number of units (files, where the reader reads single ones). What a unit gives depends on the unit and on
its rank in the log alone, so units may be read anywhere and put together in their order: see
`recsys.data.spark_passes`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.common.digests import BlockSums
from parallel.common.errors import UserError
from parallel.common.files import write_json
from recsys.data.encode import Encoder, RowErrors, column, id_type
from recsys.data.features import Feature, FeatureSpec
from recsys.data.readers import Reader
from recsys.data.times import TimeReader
from recsys.data.vocabulary import Statistics, Vocabulary

if TYPE_CHECKING:
    from recsys.settings import DataSettings

PARTS = ("train", "validation", "test")
FIELDS = ("ids", "numbers", "labels", "users")


@dataclass
class Unit:
    """A part of a log that is read on its own.

    Args:
        path: file or folder; None = the reader needs none.
        part: for a split by files, which part all of it is.
        begin: number of its first row in the log.
        order: of each of its rows, the rank by time; None = the row's number.
        total: rows that are ranked in the whole log.
        number: among the units.
    """

    path: str | None
    part: int = 0
    begin: int = 0
    order: np.ndarray | None = None
    total: int = 0
    number: int = 0


@dataclass
class Written:
    """What was written: rows of each part, checksums by (part, field)."""

    rows: dict[str, int]
    sums: dict[tuple[str, str], BlockSums]


class Passes:
    """Goes over the rows of a log with their part (train, validation, test) beside them.

    Args:
        data: `recsys.settings.DataSettings`.
        source: its reader.
        encoder: of its rows; collects the report.
        unit: read this unit alone, at the rank that it has.
    """

    def __init__(self, data: DataSettings, source: Reader, encoder: Encoder, unit: Unit | None = None) -> None:
        self.data, self.source, self.encoder = data, source, encoder
        self.by = data.split.by if data.split.by != "default" else source.split_by
        self.units = [unit] if unit is not None else units_of(data, self.by)
        self.form: str | None = None  # of the times
        if unit is None:
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Counts the rows and, for a split by time, ranks them, where the split needs it."""
        if self.by in ("order", "time"):
            rows, times = self.look(self.units[0])
            rank(self.units, [rows], [times] if self.by == "time" else None)

    def look(self, unit: Unit) -> tuple[int, np.ndarray | None]:
        """(rows of a unit, their times where the split is by time: NaN for bad rows)."""
        found, reader_, total = [], TimeReader(), 0
        for table, where, first in self._tables(unit.path):
            total += len(table)
            if self.by == "time":
                name = self.encoder.columns.time
                if name is None:
                    raise UserError("split by time needs a time column", where="data.time")
                errors = RowErrors(len(table), where, first, self.data.on_bad_row, self.encoder.report)
                found.append(reader_.read(column(table, name, where), name, errors))
        self.form = reader_.form
        times = np.concatenate(found) if found else np.zeros(0)
        return total, times if self.by == "time" else None

    def _tables(self, path: str | None) -> Iterator[tuple[Any, str, int]]:
        first_row, last = 0, None
        for table, where in self.source.read(self.data, Path(path) if path else None):
            first_row = 0 if where != last else first_row
            yield table, where, first_row
            first_row, last = first_row + len(table), where

    def parts(self) -> Iterator[tuple[Any, str, int, np.ndarray]]:
        """(table, where, its first row in the file, part index of every row)."""
        for unit in self.units:
            begin = 0
            for table, where, first in self._tables(unit.path):
                rows = np.arange(begin, begin + len(table))
                begin += len(table)
                yield table, where, first, self._part_of(unit, rows)

    def _part_of(self, unit: Unit, rows: np.ndarray) -> np.ndarray:
        if self.by == "files":
            return np.full(len(rows), unit.part, np.int8)
        train, validation, test = self.data.split.fractions
        if self.by == "random":
            place, total = _uniform(unit.begin + rows), 1.0
        else:
            place, total = unit.begin + rows if unit.order is None else unit.order[rows], unit.total
        bounds = [train * total, (train + validation) * total]
        if total > 1:
            bounds = [round(bound) for bound in bounds]
        # A share of 0 gives a part without rows even where a border is off by a rounding error.
        last = (place >= bounds[1]) & (test > 0)
        part = ((place >= bounds[0]) & (train < 1.0)).astype(np.int8) + last.astype(np.int8)
        return np.where(place < 0, np.int8(-1), part)  # -1: a row without a time

    def statistics(self, features: list[Feature]) -> Statistics:
        """What the training rows hold."""
        statistics = Statistics(features)
        for table, where, first, part in self.parts():
            rows = np.flatnonzero(part == 0)
            statistics.begin(where, first)
            self.encoder.count(table.take(rows) if part.any() else table, statistics, where, rows + first)
        return statistics

    def write(self, directory: Path, spec: FeatureSpec, vocabulary: Vocabulary) -> Written:
        """Writes `<part>.<field>` for all rows, encoded, in order."""
        counts = dict.fromkeys(PARTS, 0)
        files = {(part, field): (directory / f"{part}.{field}").open("wb") for part in PARTS for field in FIELDS}
        sums = {place: BlockSums() for place in files}
        try:
            for table, where, first, part in self.parts():
                encoded, good = self.encoder.encode(table, spec, vocabulary, where, first)
                for index, name in enumerate(PARTS):
                    rows = encoded.take(np.flatnonzero(part[good] == index))
                    counts[name] += len(rows)
                    for field in FIELDS:
                        data = np.ascontiguousarray(getattr(rows, field)).tobytes()
                        files[name, field].write(data)
                        sums[name, field].add(data)
            for file in files.values():
                file.close()
        finally:
            for file in files.values():
                with contextlib.suppress(OSError):  # of a full disk, which has been reported
                    file.close()
        return Written(counts, sums)


def units_of(data: DataSettings, by: str) -> list[Unit]:
    """The log as one unit, or one for each file of a split by files."""
    if by != "files":
        return [Unit(data.path)]
    paths = (data.path, data.split.validation_path, data.split.test_path)
    return [Unit(path, part) for part, path in enumerate(paths) if path is not None]


def rank(units: list[Unit], rows: list[int], times: list[np.ndarray] | None) -> None:
    """Ranks units: by the numbers of their rows, or by times (NaN: a bad row, which has no rank)."""
    begins = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
    order, total = None, int(begins[-1])
    if times is not None:
        joined = np.concatenate(times) if times else np.zeros(0)
        known = np.flatnonzero(~np.isnan(joined))
        order, total = np.full(len(joined), -1, np.int64), len(known)
        order[known[np.argsort(joined[known], kind="stable")]] = np.arange(total)
    for unit, begin, count in zip(units, begins, rows, strict=False):
        unit.begin, unit.total = int(begin), total
        unit.order = None if order is None else order[begin:begin + count]


def _uniform(rows: np.ndarray) -> np.ndarray:
    """A fixed number in [0, 1) for each row number (SplitMix64's finaliser)."""
    x = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**64


def write_log(directory: Path, written: Written, passes: Passes, spec: FeatureSpec, vocabulary: Vocabulary) -> None:
    """What is stored beside the encoded rows: the vocabulary, and `log.json`.

    Raises:
        UserError: no row is left for training.
    """
    encoder = passes.encoder
    if written.rows["train"] == 0:
        raise UserError("no row is left for training", where=passes.data.path or passes.data.reader,
                        hint="the log is empty, or every row was skipped")
    vocabulary.save(directory / "vocabulary.json")
    write_json(directory / "log.json", {
        "rows": written.rows, "report": {**encoder.report.figures(), "user": encoder.columns.user},
        "id_columns": spec.id_columns, "numeric_columns": spec.numeric_columns,
        "id_type": np.dtype(id_type(spec)).name, "labels": encoder.columns.labels,
        "label_columns": len(encoder.columns.labels) + len(encoder.columns.weights),
        "blocks": {f"{part}.{field}": found.sums() for (part, field), found in written.sums.items()}})
