"""Errors that a user can cause: one clear line, exit code 2, no traceback."""

from __future__ import annotations

from typing import Any

_LONGEST_VALUE = 120


class UserError(Exception):
    """A mistake in what the user gave us (a key, a file, a size), told in one line.

    Args:
        what: what is wrong, as a short statement.
        where: the key, file or flag at fault.
        value: the offending value; shown shortened.
        hint: what to do about it.

    The command line prints `str(error)` and exits with code 2; libraries raise it like any exception.
    """

    def __init__(self, what: str, *, where: Any = None, value: Any = None, hint: str | None = None) -> None:
        self.what, self.where, self.value, self.hint = what, where, value, hint
        super().__init__(self._line())

    def _line(self) -> str:
        parts = [f"{self.where}: " if self.where is not None else "", self.what]
        if self.value is not None:
            shown = repr(self.value)
            if len(shown) > _LONGEST_VALUE:
                shown = shown[: _LONGEST_VALUE - 3] + "..."
            parts.append(f" (got {shown})")
        if self.hint:
            parts.append(f"; {self.hint}")
        return " ".join("".join(parts).split())
