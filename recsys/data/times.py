"""Times of a log as numbers, in whatever usual form: a time that cannot be read must not pass for the first."""

from __future__ import annotations

import datetime
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from parallel.common.errors import UserError
from recsys.data.encode import RowErrors, numbers, strings

_DATE = re.compile(
    r"\s*(\d{4})\s*[-/.\u5e74]\s*(\d{1,2})\s*[-/.\u6708]\s*(\d{1,2})\s*\u65e5?"
    r"(?:(?:\s+|[Tt])(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?)?\s*([Zz]|[+-]\d{2}:?\d{2})?\s*", re.ASCII)
_EPOCH = datetime.datetime(1970, 1, 1)


class TimeReader:
    """Reads the time column of a log, chunk after chunk: numbers as they are, dates as seconds since 1970.

    A date without a zone is UTC. One log has one form: a number of unknown unit and a date cannot be put in order.
    """

    def __init__(self) -> None:
        self.form: str | None = None

    def read(self, values: pa.Array, name: str, errors: RowErrors) -> np.ndarray:
        """float64 seconds or numbers; rows without a time that can be read are marked bad and NaN.

        Raises:
            UserError: a bad row under on_bad_row: error; numbers and dates mixed; a column of another type.
        """
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if pa.types.is_temporal(values.type):
            found = self._temporal(values, name, errors)
        elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            found = self._text(strings(values, name, errors.where), name, errors)
        else:
            self._same_form("number", name, errors)
            found = numbers(values, name, errors)
        found = np.where(np.isfinite(found), found, np.nan)
        errors.mark(np.isnan(found) & ~errors.bad, name, "no time", values)
        return found

    def _temporal(self, values: pa.Array, name: str, errors: RowErrors) -> np.ndarray:
        self._same_form("date", name, errors)
        try:
            if pa.types.is_date(values.type):
                values = values.cast(pa.timestamp("s"))
            if pa.types.is_timestamp(values.type):
                return values.cast(pa.timestamp("us", values.type.tz), safe=False).cast(pa.int64()).cast(
                    pa.float64(), safe=False).to_numpy(zero_copy_only=False) / 1e6
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            pass
        raise UserError(f"column '{name}' holds no points in time", where=errors.where, value=str(values.type))

    def _text(self, values: pa.Array, name: str, errors: RowErrors) -> np.ndarray:
        encoded = values.dictionary_encode()
        read = [seconds_of(text) for text in encoded.dictionary.to_pylist()]
        known = np.array([np.nan if seconds is None else seconds for seconds in read] + [np.nan])
        index = pc.fill_null(encoded.indices, len(read)).to_numpy(zero_copy_only=False)
        dates = ~np.isnan(known[index])
        present = values.is_valid().to_numpy(zero_copy_only=False)
        if dates.any():
            self._same_form("date", name, errors)
            errors.mark(present & ~dates, name, "text that is neither a number nor a date and time like the others",
                        values)
            return known[index]
        if not present.any():
            return known[index]
        if self.form != "date":
            found = numbers(values, name, errors)
            if not np.isnan(found).all():
                self._same_form("number", name, errors)
            return found
        errors.mark(present, name, "text that is no date and time, as others of this column are", values)
        return known[index]

    def _same_form(self, form: str, name: str, errors: RowErrors) -> None:
        if self.form not in (None, form):
            raise UserError(f"column '{name}' mixes numbers and dates", where=errors.where,
                            hint="write all times in one form")
        self.form = form


def seconds_of(text: str) -> float | None:
    """Seconds since 1970 of an ISO-like date and time; None if it is none."""
    match = _DATE.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    try:
        seconds = (datetime.datetime(year, month, day, hour, minute, min(second, 59)) - _EPOCH).total_seconds()
    except ValueError:
        return None
    seconds += second - min(second, 59) if second <= 60 else np.nan
    seconds += float(f"0.{match[7]}") if match[7] else 0.0
    zone = match[8]
    if zone and zone not in "Zz":
        digits = zone[1:].replace(":", "")
        seconds -= (1 if zone[0] == "+" else -1) * (int(digits[:2]) * 3600 + int(digits[2:]) * 60)
    return seconds
