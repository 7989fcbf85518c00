"""Tables on disk: one safetensors file a feature and process, with (key, row, values, state, count, last seen) of every
entry. Any number of processes reads what any number wrote. Needs no MindSpore.

    tables/<feature>-<rank>-of-<ranks>.safetensors: keys, rows, values, states, counts, seen; checksums [6] of these
"""

from __future__ import annotations

import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

import numpy as np

from parallel.checkpoint.safetensors_file import SafetensorsFile, dtype_name, write_safetensors
from parallel.common.errors import UserError
from parallel.common.files import explain_os_error
from recsys.tables.dynamic import Entries
from recsys.tables.keys import owners

if TYPE_CHECKING:
    from recsys.tables.dynamic import DynamicTable

FOLDER = "tables"
_STAGED, _CHECKSUMS = ".tables", "checksums"
_NAME = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.safetensors$")


def write_entries(path: Path, entries: Entries) -> None:
    """One file; `seen` as int64, since the format has no unsigned 32-bit numbers."""
    arrays = {name: getattr(entries, name) for name in Entries.NAMES} | {"seen": entries.seen.astype(np.int64)}
    arrays[_CHECKSUMS] = _checksums(arrays)
    try:
        write_safetensors(path, [(name, dtype_name(array.dtype), array.shape, lambda array=array: array)
                                 for name, array in arrays.items()])
    except OSError as error:
        raise explain_os_error(error, path) from error


def read_entries(path: Path) -> Entries:
    """What `write_entries` wrote.

    Raises:
        UserError: damaged, or another file.
    """
    file = SafetensorsFile(path)
    if set(file.entries) - {_CHECKSUMS} != set(Entries.NAMES):
        raise UserError("this is no table of a checkpoint", where=path)
    arrays = {name: file.read(name) for name in Entries.NAMES}
    # Files of older versions have none.
    if _CHECKSUMS in file.entries and not np.array_equal(file.read(_CHECKSUMS), _checksums(arrays)):
        raise UserError("the table is damaged: its numbers do not have their checksums", where=path,
                        hint="take another checkpoint or version")
    entries = Entries(*arrays.values())
    if len({len(getattr(entries, name)) for name in Entries.NAMES}) != 1:
        raise UserError("the table's parts have different lengths", where=path)
    return entries


def _checksums(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """int64 [6], CRC-32 of each part."""
    return np.array([zlib.crc32(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8))
                     for name in Entries.NAMES], np.int64)


def file_name(feature: str, rank: int, ranks: int) -> str:
    """Of what one of the processes holds of a feature's table."""
    return f"{quote(feature, safe='')}-{rank:05d}-of-{ranks:05d}.safetensors"


def write_all_entries(folder: Path, entries: dict[str, Entries], rank: int = 0, ranks: int = 1) -> None:
    """A file for each feature's entries on one process."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in entries.items():
        write_entries(folder / file_name(name, rank, ranks), own)


def read_all_entries(folder: Path) -> dict[str, Entries]:
    """Entries of every feature that any number of processes wrote into a folder, those of all of them together.

    Raises:
        UserError: files are damaged, or some of a set are missing.
    """
    found = {name: [read_entries(path) for path in paths] for name, paths in _sets(folder).items()}
    return {name: own[0] if len(own) == 1 else Entries(*(np.concatenate([getattr(one, part) for one in own])
                                                         for part in Entries.NAMES)) for name, own in found.items()}


def stage_tables(tables: dict[str, DynamicTable], directory: Path, rank: int, ranks: int) -> None:
    """Writes the tables of one process into a hidden folder of `directory`."""
    staged = directory / _STAGED
    try:
        if ranks == 1:
            shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True, exist_ok=True)
        # What a run of another number of processes left when it was killed here.
        for path in staged.iterdir():
            if (match := _NAME.match(path.name)) and int(match[3]) != ranks:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, staged) from error
    for name, table in tables.items():
        write_entries(staged / file_name(name, rank, ranks), table.entries())


def take_staged(directory: Path, folder: Path) -> None:
    """Moves what `stage_tables` of all processes wrote into a checkpoint's folder."""
    (directory / _STAGED).rename(folder / FOLDER)


def table_files(folder: Path) -> dict[str, list[Path]]:
    """Files of a checkpoint by feature.

    Raises:
        UserError: there are none, or some of a set are missing.
    """
    found = _sets(folder / FOLDER)
    if not found:
        raise UserError("the checkpoint has no tables", where=folder,
                        hint="was the run trained with data.tables.place: host?")
    return found


def _sets(folder: Path) -> dict[str, list[Path]]:
    """Files in a folder (or none) by feature, of all processes that wrote."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        if match := _NAME.match(path.name):
            found.setdefault(unquote(match[1]), []).append(path)
    for name, paths in found.items():
        if len(paths) != int(_NAME.match(paths[0].name)[3]):
            raise UserError(f"files of table '{name}' are missing", where=folder, value=len(paths))
    return found


def read_tables(tables: dict[str, DynamicTable], folder: Path, rank: int = 0, ranks: int = 1) -> None:
    """Fills tables with the entries of a checkpoint that `rank` owns. Rows keep their numbers where the number of
    processes that read is that which wrote.

    Raises:
        UserError: a table is missing, damaged, or of another width.
    """
    files = table_files(folder)
    if missing := [name for name in tables if name not in files]:
        raise UserError(f"the checkpoint has no table of feature '{missing[0]}'", where=folder)
    for name, table in tables.items():
        same = len(files[name]) == ranks
        for path in files[name]:
            if same and int(_NAME.match(path.name)[2]) != rank:
                continue
            entries = read_entries(path)
            if not same and ranks > 1:
                entries = entries.take(owners(entries.keys, ranks) == rank)
            table.put(entries, keep_rows=same)
