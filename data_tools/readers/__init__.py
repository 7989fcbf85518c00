"""Readers of document files: one module a format, found automatically.

A reader module has `SUFFIXES` (file endings without compression), `ranges(path, settings)` -> [(start, end)] and
`read(split, settings, log)` -> documents. Compression (.gz, .xz, .zst, .bz2) is taken off before unless the module says
`READS_COMPRESSED = True`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import zlib
from pathlib import Path
from types import ModuleType

from parallel.common.errors import UserError
from parallel.common.files import COMPRESSED_SUFFIXES, DamagedFile


@functools.lru_cache(maxsize=1)
def _by_suffix() -> dict[str, str]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        for suffix in load(module.name).SUFFIXES:
            found[suffix] = module.name
    return found


def load(name: str) -> ModuleType:
    """The reader module of this name."""
    return importlib.import_module(f"{__name__}.{name}")


def suffixes() -> list[str]:
    """Every file ending that can be read, compression aside."""
    return sorted(_by_suffix())


def _reader_name(path: Path) -> str | None:
    name = path.name.lower()
    for ending in COMPRESSED_SUFFIXES:
        name = name.removesuffix(ending)
    return next((reader for suffix, reader in _by_suffix().items() if name.endswith(suffix)), None)


def known(path: Path) -> bool:
    """Whether some reader reads this kind of file."""
    return _reader_name(path) is not None


def reader_for(path: Path) -> str:
    """Name of the reader for `path`.

    Raises:
        UserError: no reader knows the suffix.
    """
    name = _reader_name(path)
    if name is None:
        raise UserError("no reader for this kind of file", where=path,
                        hint=f"known: {', '.join(suffixes())} (also .gz .xz .zst .bz2)")
    return name


def is_compressed(path: Path) -> bool:
    """Whether the file has to be decompressed to be read, and so cannot be split."""
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def damage_errors() -> tuple[type[Exception], ...]:
    """Exceptions that mean: the rest of this file cannot be read."""
    return (DamagedFile, EOFError, OSError, zlib.error)
