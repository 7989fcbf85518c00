"""From columns of a log to the arrays that a model reads; every bad row is one clear error, or skipped and counted."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from parallel.common.errors import UserError
from recsys.data.features import FIRST_KNOWN, UNSEEN, Feature, FeatureSpec
from recsys.data.vocabulary import Statistics, Vocabulary, hash_rows, transformed
from recsys.tables.keys import MISSING_KEY, keys_of

_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$|^\s*[+-]?([nN][aA][nN]|[iI]nf(inity)?)\s*$"
_MAX_WHOLE = 2.0**53
_LARGEST = float(np.finfo(np.float32).max)


@dataclass
class Columns:
    """Which columns are no features: labels (those that are numbers among them; whether one may be missing; columns of
    their weights), the user for GAUC, the time for splitting."""

    labels: list[str]
    user: str | None = None
    time: str | None = None
    numbers: tuple[str, ...] = ()
    missing: bool = False
    weights: tuple[str, ...] = ()


@dataclass
class Encoded:
    """n rows: ids_nM int32 (int64 where a feature is dynamic: its columns hold keys), numbers_nN float32, labels_nK
    float32 (then their weights), users int64 (0 without a user column).

    shift_M int32 is to be added to the ids where they were encoded for one common table (`recsys.data.log`).
    """

    ids: np.ndarray
    numbers: np.ndarray
    labels: np.ndarray
    users: np.ndarray
    shift: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: np.ndarray | slice) -> Encoded:
        """The rows of a mask, an index or a slice."""
        return Encoded(self.ids[chosen], self.numbers[chosen], self.labels[chosen], self.users[chosen], self.shift)


@dataclass
class Report:
    """What was met while reading: rows kept, rows skipped by reason, missing and unseen values by feature."""

    rows: int = 0
    skipped: Counter = field(default_factory=Counter)
    missing: Counter = field(default_factory=Counter)
    unseen: Counter = field(default_factory=Counter)
    empty_files: list[str] = field(default_factory=list)

    def figures(self) -> dict:
        """JSON values."""
        return {"rows": self.rows, "skipped": dict(self.skipped), "missing": dict(self.missing),
                "unseen": dict(self.unseen), "empty_files": self.empty_files}


def id_type(spec: FeatureSpec) -> type:
    """Element type of encoded ids."""
    return np.int64 if spec.is_dynamic else np.int32


class RowErrors:
    """Marks bad rows of one chunk: raises at the first under "error", collects a mask under "skip"."""

    def __init__(self, rows: int, where: str, first_row: int | np.ndarray, on_bad_row: str, report: Report) -> None:
        self.bad, self.where = np.zeros(rows, bool), where
        # Numbers of the rows in their file, where the chunk is a selection of them.
        self.rows = first_row if isinstance(first_row, np.ndarray) else np.arange(first_row, first_row + rows)
        self.strict, self.report = on_bad_row == "error", report

    def mark(self, bad: np.ndarray, column: str, what: str, values: pa.Array | np.ndarray) -> None:
        """`bad` rows of `column` hold `what`."""
        if not bad.any():
            return
        if self.strict:
            index = int(np.flatnonzero(bad)[0])
            value = values[index].as_py() if isinstance(values, (pa.Array, pa.ChunkedArray)) else values[index]
            raise UserError(f"{what} in column '{column}'", where=self.place(int(self.rows[index])), value=value,
                            hint="repair the row, or set data.on_bad_row: skip")
        self.report.skipped[f"{column}: {what}"] += int((bad & ~self.bad).sum())
        self.bad |= bad

    def place(self, row: int) -> str:
        """Where a row is, for its error."""
        return f"{self.where}, row {row + 1}"


def column(table: pa.Table, name: str, where: str) -> pa.Array:
    """One column as a flat array.

    Raises:
        UserError: the column is missing (the nearest is named), or there are several of the name.
    """
    if name not in table.column_names:
        import difflib

        near = difflib.get_close_matches(name, table.column_names, n=1)
        raise UserError(f"column '{name}' is missing", where=where, hint=f"did you mean '{near[0]}'?" if near else
                        f"columns: {', '.join(table.column_names[:20])}")
    if table.column_names.count(name) > 1:
        raise UserError(f"there are several columns '{name}'", where=where, hint="give each a name of its own")
    values = table.column(name)
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def strings(values: pa.Array, name: str, where: str) -> pa.Array:
    """Values as text; empty text is null, as is NaN. Whole floats lose their '.0' so that 3 and 3.0 are one value.

    Raises:
        UserError: column `name` holds lists, or bytes that are no UTF-8.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        if pa.types.is_floating(values.type):
            values = pc.if_else(pc.is_nan(values), None, values)
            whole = pc.and_(pc.equal(pc.floor(values), values), pc.less(pc.abs(values), _MAX_WHOLE))
            text = pc.if_else(whole, values, None).cast(pa.int64()).cast(pa.string())
            values = pc.if_else(whole, text, values.cast(pa.string()))
        values = values.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(f"column '{name}' holds no single values (text or numbers)", where=where,
                        value=str(values.type)) from None
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)


def numbers(values: pa.Array, name: str, errors: RowErrors) -> np.ndarray:
    """float64, NaN where missing; text that is no number is a bad row."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = strings(values, name, errors.where)
        bad = pc.invert(pc.fill_null(pc.match_substring_regex(values, _NUMBER), True)).to_numpy(zero_copy_only=False)
        errors.mark(bad, name, "text that is not a number", values)
        values = pc.if_else(pa.array(bad), pa.scalar(None, pa.string()), pc.utf8_trim_whitespace(values))
        values = values.cast(pa.float64())
    try:
        if pa.types.is_integer(values.type):  # Arrow refuses to round an integer above 2^53
            values = values.cast(pa.float64(), safe=False)
        found = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(f"column '{name}' is not numeric", where=errors.where, value=str(values.type)) from None
    beyond = np.isfinite(found) & (np.abs(found) > _LARGEST)
    errors.mark(beyond, name, "number that float32 does not hold", found)
    return np.where(beyond, np.nan, found) if beyond.any() else found


def lists(values: pa.Array, feature: Feature, where: str) -> tuple[np.ndarray, pa.Array]:
    """Offsets [n + 1] into, and the flat text values of, a list column (or text with separators)."""
    if pa.types.is_null(values.type):
        return np.zeros(len(values) + 1, np.int64), pa.array([], pa.string())
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = pc.split_pattern(pc.utf8_trim_whitespace(values), feature.separator)
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        raise UserError(f"column '{feature.source}' holds no lists", where=where, value=str(values.type))
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.concatenate([[0], np.cumsum(lengths)]), strings(values.flatten(), feature.source, where)


class Encoder:
    """Turns tables into `Encoded` arrays, or feeds the statistics pass.

    Args:
        features: as `expand` gives them.
        columns: labels and bookkeeping columns.
        on_bad_row: "error" stops at the first bad row, "skip" counts it.
    """

    row_errors = RowErrors

    def __init__(self, features: list[Feature], columns: Columns, on_bad_row: str) -> None:
        self.features, self.columns, self.on_bad_row = features, columns, on_bad_row
        self.report = Report()

    def count(self, table: pa.Table, statistics: Statistics, where: str, first_row: int | np.ndarray) -> None:
        """Feeds a table to the statistics pass; `first_row` as in `RowErrors`."""
        errors = self.row_errors(len(table), where, first_row, self.on_bad_row, Report())
        for feature in self.features:
            values = column(table, feature.source, where)
            if feature.type == "numeric":
                statistics.add_numbers(feature, numbers(values, feature.source, errors))
            elif feature.values == "vocabulary" and feature.target is None:
                statistics.add_values(feature, lists(values, feature, where)[1] if feature.is_list
                                      else strings(values, feature.source, where))

    def encode(self, table: pa.Table, spec: FeatureSpec, vocabulary: Vocabulary, where: str,
               first_row: int) -> tuple[Encoded, np.ndarray]:
        """The table's good rows and their indices in it.

        Raises:
            UserError: a column is missing or of a wrong type; or, under on_bad_row: error, a row is bad.
        """
        rows = len(table)
        errors = self.row_errors(rows, where, first_row, self.on_bad_row, self.report)
        labels = self._labels(table, where, errors)
        ids = np.zeros((rows, spec.id_columns), id_type(spec))
        values = np.zeros((rows, spec.numeric_columns), np.float32)
        for feature in self.features:
            cells = column(table, feature.source, where)
            if feature.is_value:
                values[:, spec.numeric[feature.name].column] = self._standardised(feature, cells, vocabulary, errors)
                continue
            slot = spec.slots[feature.name]
            if feature.is_list:
                local = self._list_rows(feature, cells, vocabulary, slot.length, where, errors)
            elif feature.type == "numeric":
                local = self._buckets(feature, cells, vocabulary, errors)[:, None]
            else:
                local = self._rows(feature, strings(cells, feature.source, where), vocabulary, errors, cells)[:, None]
            if feature.is_dynamic:
                self.report.missing[feature.name] += int((local == MISSING_KEY).all(1).sum())
                ids[:, slot.start:slot.start + slot.length] = local
                continue
            self.report.missing[feature.name] += int((local == 0).all(1).sum())
            self.report.unseen[feature.name] += int((local == UNSEEN).sum()) if feature.type != "numeric" else 0
            ids[:, slot.start:slot.start + slot.length] = local + slot.offset
        good = np.flatnonzero(~errors.bad)
        self.report.rows += len(good)
        return Encoded(ids, values, labels, self._users(table, where)).take(good), good

    def _labels(self, table: pa.Table, where: str, errors: RowErrors) -> np.ndarray:
        """Labels, NaN where one is missing and may be, then the columns of weights."""
        own, names = self.columns, [*self.columns.labels, *self.columns.weights]
        labels = np.zeros((len(table), len(names)), np.float32)
        for index, name in enumerate(names):
            cells = column(table, name, where)
            if pa.types.is_boolean(cells.type):
                cells = cells.cast(pa.int8())
            found = numbers(cells, name, errors)
            if index >= len(own.labels):
                errors.mark(~(np.isfinite(found) & (found >= 0.0)), name, "weight that is no number from 0 on", cells)
                labels[:, index] = np.nan_to_num(found)
                continue
            allowed = np.isnan(found) & own.missing
            good = np.isfinite(found) if name in own.numbers else np.isin(found, (0.0, 1.0))
            errors.mark(~(good | allowed), name, "label that is no number" if name in own.numbers
                        else "label that is not 0 or 1", cells)
            labels[:, index] = np.where(allowed, np.nan, np.nan_to_num(found))
        return labels

    def _users(self, table: pa.Table, where: str) -> np.ndarray:
        if self.columns.user is None:
            return np.zeros(len(table), np.int64)
        encoded = strings(column(table, self.columns.user, where), self.columns.user, where).dictionary_encode()
        # A number that depends on the text alone, so that chunks and runs agree.
        names = [value.encode() for value in encoded.dictionary.to_pylist()]
        numbers_ = np.array([zlib.crc32(n) | zlib.adler32(n[::-1]) << 32 for n in names] + [0], np.uint64)
        index = pc.fill_null(encoded.indices, len(names)).to_numpy(zero_copy_only=False)
        return numbers_[index].astype(np.int64)

    def _rows(self, feature: Feature, values: pa.Array, vocabulary: Vocabulary, errors: RowErrors | None,
              cells: pa.Array | None = None) -> np.ndarray:
        if feature.values == "hash":
            return hash_rows(feature, values)
        if feature.is_dynamic:
            return keys_of(values, feature.target or feature.name)
        if feature.values == "vocabulary":
            return vocabulary.rows_of(feature, values)
        return self._integer_rows(feature, values, errors, cells)

    @staticmethod
    def _integer_rows(feature: Feature, values: pa.Array, errors: RowErrors | None,
                      cells: pa.Array | None) -> np.ndarray:
        """Row of integers given as text; outside 0 .. rows - 1 is a bad row (or, in lists, unseen)."""
        digits = pc.fill_null(pc.match_substring_regex(values, r"^-?\d{1,18}$"), False)
        plain = pc.if_else(digits, values, pa.scalar(None, pa.string())).cast(pa.int64())
        found = pc.fill_null(plain, -1).to_numpy(zero_copy_only=False)
        present = values.is_valid().to_numpy(zero_copy_only=False)
        outside = present & ((found < 0) | (found >= feature.rows))
        if errors is not None:
            errors.mark(outside, feature.source, f"id outside the table (0 to {feature.rows - 1})", cells)
        return np.where(~present, 0, np.where(outside, UNSEEN, found + FIRST_KNOWN)).astype(np.int32)

    def _list_rows(self, feature: Feature, cells: pa.Array, vocabulary: Vocabulary, length: int, where: str,
                   errors: RowErrors) -> np.ndarray:
        """[n, length]: sets from the left, sequences at the right end with the newest last; the rest is padding."""
        offsets, flat = lists(cells, feature, where)
        rows = self._rows(feature, flat, vocabulary, None)
        counts = np.diff(offsets)
        kept = np.minimum(counts, length)
        place = np.arange(length)
        if feature.type == "sequence":
            index = offsets[1:, None] - length + place
            inside = place >= length - kept[:, None]
        else:
            index = offsets[:-1, None] + place
            inside = place < kept[:, None]
        padded = np.append(rows, MISSING_KEY if feature.is_dynamic else 0)
        return padded[np.where(inside, index, len(rows))]

    def _buckets(self, feature: Feature, cells: pa.Array, vocabulary: Vocabulary, errors: RowErrors) -> np.ndarray:
        found = numbers(cells, feature.source, errors)
        edges = vocabulary.boundaries.get(feature.name, feature.boundaries or [])
        bucket = np.searchsorted(np.asarray(edges, np.float64), found, side="left")
        return np.where(np.isnan(found), 0, bucket + FIRST_KNOWN).astype(np.int32)

    def _standardised(self, feature: Feature, cells: pa.Array, vocabulary: Vocabulary, errors: RowErrors) -> np.ndarray:
        found = numbers(cells, feature.source, errors)
        # Infinity is no measurement: it is treated as missing.
        found = np.where(np.isfinite(found), found, np.nan)
        self.report.missing[feature.name] += int(np.isnan(found).sum())
        mean, deviation = vocabulary.moments.get(feature.name, (0.0, 1.0))
        return np.nan_to_num((transformed(feature, found) - mean) / deviation)
