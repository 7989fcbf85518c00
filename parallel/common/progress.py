"""What people read: a progress bar, tables and notes, all on stderr. Plain lines where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_SECONDS_BETWEEN_LINES = 10.0
_WIDTH_OF_LOGS = 140
_LONGEST = 365 * 86400.0
_Item = TypeVar("_Item")


def _console() -> Console:
    # Made anew each time so that a redirected sys.stderr (tests, logs) is honoured.
    return Console(file=sys.stderr, highlight=False, width=None if sys.stderr.isatty() else _WIDTH_OF_LOGS)


class Bar:
    """A progress bar with ETA on a terminal, a line every ten seconds elsewhere.

    Use as a context: `with Bar(total, "train") as bar: bar.advance(1, loss="2.31")`. `total` None = not known.
    """

    def __init__(self, total: int | None, description: str, completed: int = 0) -> None:
        self.total, self.description, self.completed = total, description, completed
        self._first = completed
        self._rich: Progress | None = None
        self._task: Any = None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Bar:
        console = _console()
        if console.is_terminal:
            self._rich = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
                console=console, refresh_per_second=4,
            )
            self._rich.start()
            self._task = self._rich.add_task(self.description, total=self.total, completed=self.completed, figures="")
        self._started = self._last_line = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self.completed > self._first:
            self._line("done")

    def advance(self, by: int = 1, **figures: Any) -> None:
        """Counts `by` more and shows `figures` beside the bar."""
        self.completed += by
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
        if self._rich is not None:
            self._rich.update(self._task, completed=self.completed, figures=text)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._line(text)

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        seconds = self._last_line - self._started
        rate = (self.completed - self._first) / max(seconds, 1e-9)
        of = f"/{self.total}" if self.total is not None else ""
        left = (self.total - self.completed) / rate if self.total and rate > 0 else _LONGEST
        eta = f"  eta {duration(left)}" if left < _LONGEST else ""  # a stream has as good as no end
        print(f"{self.description} {self.completed}{of}  {duration(seconds)}{eta}  {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds below two minutes, then minutes and seconds, hours and minutes, days and hours."""
    whole = round(seconds)
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= 2 * size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"


def progress(items: Iterable[_Item], description: str, total: int | None = None) -> Iterator[_Item]:
    """Yields `items` under a progress bar."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Bar(total, description) as bar:
        for item in items:
            yield item
            bar.advance()


def table(title: str, columns: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """Prints a table on stderr; numbers are set to the right."""
    rows = [list(row) for row in rows]
    drawn = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        drawn.add_row(*(_show(cell) for cell in row))
    _console().print(drawn)


def info(text: str) -> None:
    """One line for the reader on stderr."""
    print(text, file=sys.stderr, flush=True)


def _show(cell: Any) -> str:
    from rich.markup import escape

    if isinstance(cell, bool) or cell is None:
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.4g}"
    return escape(str(cell))
