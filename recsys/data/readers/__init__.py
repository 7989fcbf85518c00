"""Readers of click logs, one file each: `read(data, path)` yields tables; the file also says what its columns mean.

A reader is a module here that holds `READER = Reader(...)`; its module name is what `data.reader` says.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from recsys.data.features import Feature


@dataclass(frozen=True)
class Reader:
    """What a data set's columns mean and how its tables are read.

    Args:
        read: `read(data, path) -> iterator of (pyarrow.Table, where)`; `where` names the file for error messages.
        features: the default features; a file's `data.features` replaces them. A function of the data settings, since
            some files name their own columns.
        labels: default label columns.
        user: default column that groups samples for GAUC and UAUC.
        time: column of times for a split by time.
        split_by: default way to split ("order", "time" or "random").
        needs_path: whether `data.path` must be given.
        histories: whether it adds the columns that `data.history`, `passed` and `like_rate` ask for.
        files: the files that a path stands for, where `read` reads each alone as it does among others: Spark then takes
            them in parallel.
        stream: for a stream, what makes its `recsys.data.streams.events.Transport` of the data settings; `read` then
            refuses, or reads what there is.
    """

    read: Callable[[Any, Path | None], Iterator[tuple[Any, str]]]
    features: Callable[[Any], list[Feature]]
    labels: list[str] = field(default_factory=lambda: ["label"])
    user: str | None = None
    time: str | None = None
    split_by: str = "order"
    needs_path: bool = True
    histories: bool = False
    files: Callable[[Path], list[Path]] | None = None
    stream: Callable[[Any], Any] | None = None


def known_readers() -> list[str]:
    """Names that `data.reader` may take."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def reader(name: str) -> Reader:
    """The reader called `name`.

    Raises:
        UserError: there is none; the nearest is named.
    """
    known = known_readers()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError("no such reader", where="data.reader", value=name,
                        hint=f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}").READER
