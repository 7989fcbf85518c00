"""Versions of a model on disk: complete ones, and deltas that hold the dense weights and the rows of tables that
changed.

    live/current.json                 {"version": 12, "step": 600, "event_time": ..., "chain": [[10, "full/..."], ...]}
    live/full/step_00000010/          a checkpoint like any other, without optimizer states; its step is the version
    live/delta/version_00000011/      delta.safetensors, manifest.json, tables/ (of tables on the host)
    live/vocabulary.json

A folder is written under a hidden name and renamed; then `current.json` is replaced. `chain` is what makes the current
version out of nothing: one complete version and the deltas after it, in order. Needs no MindSpore.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from parallel.checkpoint.full import save_checkpoint
from parallel.checkpoint.safetensors_file import SafetensorsFile, dtype_name, write_safetensors
from parallel.checkpoint.tensors import NamedTensor
from parallel.common.errors import UserError
from parallel.common.files import inside, read_json, write_json
from parallel.common.folders import put_in_place, temporary_name
from recsys.tables.files import FOLDER, read_all_entries

CURRENT = "current.json"
_ROWS, _VALUES = ".delta_rows", ".delta_values"
_FULL, _DELTA = "full", "delta"


class Values:
    """A `NamedTensor` of values at hand.

    Args:
        name: of the parameter.
        array: its values.
    """

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array, self.shape, self.dtype = name, array, array.shape, dtype_name(array.dtype)

    def read(self) -> np.ndarray:
        """See `NamedTensor`."""
        return self.array

    def assign(self, value: np.ndarray) -> None:
        """Nothing is put back."""
        raise NotImplementedError


@dataclass
class Delta:
    """What changed since the version before.

    Args:
        dense: full parameters by name; to be written also `NamedTensor`s, which are read one at a time.
        rows: of tables in the graph: name -> (row numbers int64 [n], values [n, W]).
        entries: of tables on the host: feature -> `recsys.tables.dynamic.Entries`.
        version, step, event_time: which version it makes.
    """

    version: int = 0
    step: int = 0
    event_time: float | None = None
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    entries: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Current:
    """`current.json`.

    Args:
        folder: of the versions.
        version, step, event_time: of the newest.
        chain: (version, folder) of a complete version and the deltas after it.
    """

    folder: Path
    version: int
    step: int
    event_time: float | None
    chain: tuple[tuple[int, Path], ...]

    def after(self, version: int) -> tuple[tuple[int, Path], ...] | None:
        """Deltas that lead from `version` to this one; None where they do not, and a complete version must be read."""
        if not any(number == version for number, _ in self.chain):
            return None
        return tuple((number, path) for number, path in self.chain if number > version)


def read_current(folder: str | Path) -> Current | None:
    """The newest version; None where nothing has been published.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / CURRENT
    if not path.is_file():
        return None
    tree = read_json(path, dict, max_bytes=1 << 20)
    try:
        chain = tuple((int(number), inside(folder, name)) for number, name in tree["chain"])
        time = tree["event_time"]
        return Current(Path(folder), int(tree["version"]), int(tree["step"]), None if time is None else float(time),
                       chain)
    except (KeyError, TypeError, ValueError):
        raise UserError("the file is damaged", where=path, hint="let the run publish anew") from None


class Versions:
    """Writes versions into a folder.

    Args:
        folder: of the versions.
        keep: newest versions that stay loadable.
    """

    def __init__(self, folder: str | Path, keep: int) -> None:
        self.folder, self.keep = Path(folder), keep
        current = read_current(self.folder)
        self.version = current.version if current is not None else 0
        self.chain: list[tuple[int, str]] = []
        self.chains: list[list[tuple[int, str]]] = []

    def write_full(self, tensors: list[NamedTensor], state: dict[str, Any], step: int, event_time: float | None,
                   add_files: Callable[[Path], None] | None = None) -> int:
        """A complete version; its number."""
        version = self.version + 1
        save_checkpoint(self.folder / _FULL, version, tensors, (), {**state, "step_of_run": step}, None, add_files)
        self.chain = [(version, f"{_FULL}/step_{version:08d}")]
        self.chains.append(self.chain)
        self._announce(version, step, event_time)
        return version

    def write_delta(self, delta: Delta, add_files: Callable[[Path], None] | None = None) -> int:
        """The next version, from the one before; its number."""
        version = self.version + 1
        target = self.folder / _DELTA / f"version_{version:08d}"
        hidden = temporary_name(target)
        try:
            hidden.mkdir(parents=True)
            arrays = dict(delta.dense)
            for name, (rows, values) in delta.rows.items():
                arrays[name + _ROWS], arrays[name + _VALUES] = rows, values
            checksums = write_safetensors(hidden / "delta.safetensors", [
                (item.name, item.dtype, item.shape, item.read) for item in (
                    Values(name, value) if isinstance(value, np.ndarray) else value for name, value in arrays.items())])
            if add_files is not None:
                add_files(hidden)
            write_json(hidden / "manifest.json", {"version": version, "step": delta.step,
                                                  "event_time": delta.event_time, "crc32": checksums})
            put_in_place(hidden, target)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
        self.chain.append((version, f"{_DELTA}/{target.name}"))
        self._announce(version, delta.step, delta.event_time)
        return version

    def _announce(self, version: int, step: int, event_time: float | None) -> None:
        self.version = version
        write_json(self.folder / CURRENT, {"version": version, "step": step, "event_time": event_time,
                                           "chain": self.chain})
        self._remove_old()

    def _remove_old(self) -> None:
        """Deletes what none of the newest `keep` versions needs."""
        oldest = self.version - self.keep + 1
        while len(self.chains) > 1 and self.chains[1][0][0] <= oldest:
            self.chains.pop(0)
        needed = {name for chain in self.chains for _, name in chain}
        for kind in (_FULL, _DELTA):
            for path in (self.folder / kind).glob("*_*"):
                if f"{kind}/{path.name}" not in needed and path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)


def read_delta(folder: Path) -> Delta:
    """What `Versions.write_delta` wrote.

    Raises:
        UserError: missing or damaged.
    """
    manifest = read_json(folder / "manifest.json", dict, max_bytes=64 << 20)
    file = SafetensorsFile(folder / "delta.safetensors")
    arrays = {}
    for name in file.entries:
        arrays[name] = file.read(name)
        if zlib.crc32(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)) != manifest["crc32"].get(name):
            raise UserError(f"'{name}' is damaged", where=folder, hint="let the run publish a complete version")
    delta = Delta(int(manifest["version"]), int(manifest["step"]), manifest["event_time"])
    for name, array in arrays.items():
        if name.endswith(_ROWS):
            table = name.removesuffix(_ROWS)
            delta.rows[table] = array, arrays[table + _VALUES]
        elif not name.endswith(_VALUES):
            delta.dense[name] = array
    delta.entries = read_all_entries(folder / FOLDER)
    return delta


def merged(deltas: list[Delta]) -> Delta:
    """Deltas in a row as one: the last word on every weight and row. Entries of tables on the host stay lists."""
    last = deltas[-1]
    result = Delta(last.version, last.step, last.event_time)
    for delta in deltas:
        result.dense.update(delta.dense)
        for name, entries in delta.entries.items():
            result.entries.setdefault(name, []).append(entries)
    for name in {name for delta in deltas for name in delta.rows}:
        pieces = [delta.rows[name] for delta in deltas if name in delta.rows]
        rows = np.concatenate([rows for rows, _ in pieces])[::-1]
        values = np.concatenate([values for _, values in pieces])[::-1]
        distinct, first = np.unique(rows, return_index=True)
        result.rows[name] = distinct, np.ascontiguousarray(values[first])
    return result
