"""Errors that a user can cause: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import itertools
import reprlib
from typing import Any

_LONGEST_VALUE = 120
_LONGEST_PART = 1000
_LONGEST_LINE = 4000


class UserError(Exception):
    """A mistake in what the user gave (a key, a file, a size), reported in one line.

    Args:
        what: what is wrong, as a short statement.
        where: the key, file or flag at fault.
        value: the offending value; shown shortened.
        hint: what to do about it.

    The command line prints `str(error)` and exits with code 2; libraries raise it like any exception.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: Any = None, value: Any = None, hint: str | None = None) -> None:
        self.what, self.where, self.value, self.hint = what, where, value, hint
        super().__init__(self._line())

    def __reduce__(self) -> tuple:
        # Between processes (a pool of workers) an exception is built anew from its arguments.
        value = self.value if isinstance(self.value, (str, int, float, bool, type(None))) else shown(self.value)
        return _rebuilt, (self.what, self.where if self.where is None else str(self.where), value, self.hint)

    def _line(self) -> str:
        parts = [f"{_shortened(str(self.where))}: " if self.where is not None else "", _shortened(str(self.what))]
        if self.value is not None:
            parts.append(f" (got {shown(self.value)})")
        if self.hint:
            parts.append(f"; {_shortened(self.hint)}")
        return " ".join("".join(parts).split())[:_LONGEST_LINE]


class PeerError(UserError):
    """Another process of the run is at fault, not the user: the run may begin again from its last checkpoint."""

    exit_code = 75
    """As EX_TEMPFAIL of sysexits.h."""


def _rebuilt(what: str, where: Any, value: Any, hint: str | None) -> UserError:
    return UserError(what, where=where, value=value, hint=hint)


class _Bounded(reprlib.Repr):
    """`repr` whose time and memory do not grow with the value: a few items, a few levels, a few digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother, self.maxlong = 4, _LONGEST_VALUE, 40
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 12
        self.maxstring = _LONGEST_VALUE

    def repr_str(self, text: str, level: int) -> str:
        return repr(text[:_LONGEST_VALUE])

    def repr_bytes(self, data: bytes, level: int) -> str:
        return repr(data[:_LONGEST_VALUE])

    def repr_int(self, number: int, level: int) -> str:
        # Python refuses to write out, and takes long for, numbers of thousands of digits.
        return repr(number) if number.bit_length() < 200 else f"a number of {number.bit_length()} bits"

    def repr_dict(self, value: dict, level: int) -> str:
        # reprlib sorts the keys, and the order is what the user wrote.
        if level <= 0:
            return "{...}"
        items = [f"{self.repr1(key, level - 1)}: {self.repr1(item, level - 1)}"
                 for key, item in itertools.islice(value.items(), self.maxdict)]
        return "{" + ", ".join([*items, "..."] if len(value) > self.maxdict else items) + "}"


_BOUNDED = _Bounded()


def shown(value: Any, longest: int = _LONGEST_VALUE) -> str:
    """`repr(value)` truncated to `longest` characters, in bounded time and memory whatever the value."""
    try:
        text = _BOUNDED.repr(value)
    except Exception:  # a value whose own repr fails must not hide the error that it is part of
        text = f"a {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_PART else text[: _LONGEST_PART - 3] + "..."
