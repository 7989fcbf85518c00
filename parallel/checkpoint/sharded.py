"""Checkpoints of which every rank holds slices, read and written tensor by tensor.

    step_00001000/
        parameters-00003-of-00008.safetensors, optimizer-00003-of-00008.safetensors
        layout-00003-of-00008.json    for every tensor: file, dtype, shape and crc32 of the slice, `full_shape`, `box`
        state.json

A full checkpoint (`parallel.checkpoint.full`) is the special case without slices; both are read by `Slices`.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from parallel.checkpoint.folder import (
    FORMAT,
    OPTIMIZER_FILE,
    PARAMETERS_FILE,
    VERSION,
    checkpoint_path,
    read_sealed_json,
    remove_old,
    resolve_checkpoint,
    write_plain_json,
)
from parallel.checkpoint.safetensors_file import DTYPES, SafetensorsFile, write_safetensors
from parallel.checkpoint.tensors import named
from parallel.common.errors import UserError
from parallel.common.files import explain_os_error, inside
from parallel.common.folders import put_in_place, sweep, temporary_name
from parallel.common.structured import typed

Extent = tuple[tuple[int, int], ...]
_RANK_LAYOUT = re.compile(r"^layout-(\d{5,})-of-(\d{5,})\.json$")
_MOMENT = re.compile(r"^(?:adam_m|adam_v|adagrad_a|rmsprop_s|rmsprop_u)\.")


def rank_file(name: str, rank: int, ranks: int) -> str:
    """`parameters-00003-of-00008.safetensors` for `parameters.safetensors`."""
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}-{rank:05d}-of-{ranks:05d}.{suffix}"


def parameter_of(name: str) -> str:
    """The parameter that a moment belongs to (`adam_m.x` -> `x`); a parameter's own name."""
    return _MOMENT.sub("", name)


class _Entry(pydantic.BaseModel):
    """A line of a layout."""

    file: str
    dtype: str
    shape: list[pydantic.NonNegativeInt]
    crc32: int | None = None
    full_shape: list[pydantic.NonNegativeInt] | None = None
    box: list[tuple[pydantic.NonNegativeInt, pydantic.NonNegativeInt]] | None = None


@dataclass(frozen=True)
class StoredSlice:
    """A slice on the disk: its extent in the full tensor, its file and checksum."""

    extent: Extent
    file: Path
    crc32: int | None


@dataclass
class Tensor:
    """A tensor of the checkpoint: which file kind it belongs to, type, full shape, the slices that make it up."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    slices: list[StoredSlice]

    @property
    def nbytes(self) -> int:
        """Bytes of the full tensor."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


class Slices:
    """A checkpoint, full or in slices, opened for reading: `tensors` by name and `read(name, extent)`.

    Raises:
        UserError: no checkpoint, damaged, a rank's file missing, or slices that leave a gap.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = self._find(Path(path))
        self.tensors: dict[str, Tensor] = {}
        self._files: dict[Path, SafetensorsFile] = {}
        self._checked: set[tuple[Path, str]] = set()
        for layout in self._layouts():
            self._add(layout)
        self.state = read_sealed_json(self.path / "state.json") if (self.path / "state.json").is_file() else {}
        for name, tensor in self.tensors.items():
            self._check_cover(name, tensor)

    @staticmethod
    def _find(path: Path) -> Path:
        if path.is_dir() and any(_RANK_LAYOUT.match(entry.name) for entry in path.iterdir()):
            return path
        return resolve_checkpoint(path)

    def _layouts(self) -> list[dict[str, _Entry]]:
        found = sorted(entry for entry in self.path.iterdir() if _RANK_LAYOUT.match(entry.name))
        if not found:
            return [self._read_layout(self.path / "layout.json")]
        matches = [_RANK_LAYOUT.match(entry.name) for entry in found]
        ranks, present = int(matches[0][2]), {int(match[1]) for match in matches}
        missing = sorted(set(range(ranks)) - present)
        if missing:
            raise UserError(f"the slices of rank {missing[0]} of {ranks} are missing", where=self.path,
                            hint="copy the files of all ranks into one folder")
        return [self._read_layout(entry) for entry in found]

    @staticmethod
    def _read_layout(path: Path) -> dict[str, _Entry]:
        layout = read_sealed_json(path)
        if layout.get("format") != FORMAT or layout.get("version") not in (1, VERSION):
            raise UserError("not a checkpoint layout of this version", where=path)
        return typed(layout.get("tensors"), dict[str, _Entry], where=path, hint="use another checkpoint")

    def _add(self, layout: dict[str, _Entry]) -> None:
        for name, entry in layout.items():
            shape = tuple(entry.shape if entry.full_shape is None else entry.full_shape)
            extent = tuple(entry.box) if entry.box is not None else tuple((0, size) for size in shape)
            if entry.dtype not in DTYPES or len(extent) != len(shape) or any(
                    not start <= stop <= size for (start, stop), size in zip(extent, shape, strict=True)):
                raise UserError(f"the layout of '{name}' is damaged", where=self.path, hint="use another checkpoint")
            kind = OPTIMIZER_FILE if entry.file.startswith("optimizer") else PARAMETERS_FILE
            tensor = self.tensors.setdefault(name, Tensor(kind, entry.dtype, shape, []))
            if (tensor.shape, tensor.dtype) != (shape, entry.dtype):
                raise UserError(f"the ranks disagree on the shape of '{name}'", where=self.path)
            if all(stored.extent != extent for stored in tensor.slices):
                tensor.slices.append(StoredSlice(extent, inside(self.path, entry.file), entry.crc32))

    def _check_cover(self, name: str, tensor: Tensor) -> None:
        # Slices of one layout either are the same or do not touch, so their sizes must add up.
        covered = sum(volume(stored.extent) for stored in tensor.slices)
        if covered != math.prod(tensor.shape):
            raise UserError(f"the slices of '{name}' do not make up the full tensor", where=self.path)

    def read(self, name: str, extent: Extent | None = None) -> np.ndarray:
        """The part `extent` (None = all) of a tensor, put together from the slices; each slice's checksum is checked
        once.

        Raises:
            UserError: no such tensor, or damaged data.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise UserError(f"the checkpoint has no parameter '{name}'", where=self.path)
        extent = extent if extent is not None else tuple((0, size) for size in tensor.shape)
        part = np.empty([stop - start for start, stop in extent], DTYPES[tensor.dtype])
        for stored in tensor.slices:
            shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(extent, stored.extent, strict=True))
            if all(start < stop for start, stop in shared):
                self._copy(name, stored, shared, extent, part)
        return part

    def _copy(self, name: str, stored: StoredSlice, shared: Extent, extent: Extent, part: np.ndarray) -> None:
        file = self._files.setdefault(stored.file, SafetensorsFile(stored.file))
        if (stored.file, name) not in self._checked:
            self._check_slice(name, stored, file)
        index = tuple(slice(*pair) for pair in _relative(shared, extent))
        file.copy_extent(name, _relative(shared, stored.extent), part, index)

    def _check_slice(self, name: str, stored: StoredSlice, file: SafetensorsFile) -> None:
        shape, tensor = tuple(stop - start for start, stop in stored.extent), self.tensors[name]
        entry = file.entries.get(name)
        if entry is not None and (entry.shape, entry.dtype) != (shape, tensor.dtype):
            raise UserError(f"checkpoint file is damaged: '{name}' is {entry.dtype} {list(entry.shape)} there and "
                            f"{tensor.dtype} {list(shape)} in the layout", where=stored.file,
                            hint="use another checkpoint")
        file.check(name, stored.crc32)
        self._checked.add((stored.file, name))

    def check(self) -> None:
        """Compares all data with their checksums.

        Raises:
            UserError: a file is missing, or its data have changed.
        """
        for name, tensor in self.tensors.items():
            for stored in tensor.slices:
                self._check_slice(name, stored, self._files.setdefault(stored.file, SafetensorsFile(stored.file)))

    def names(self, kind: str) -> list[str]:
        """Names of the parameters or of the moments."""
        return sorted(name for name, tensor in self.tensors.items() if tensor.kind == kind)


def write_rank(folder: Path, rank: int, ranks: int,
               tensors: Iterable[tuple[str, str, str, tuple[int, ...], Extent]],
               read: Callable[[str, Extent], np.ndarray]) -> None:
    """Writes one rank's files into `folder`.

    Args:
        folder: a folder that becomes a checkpoint when all ranks are written.
        rank, ranks: whose files, of how many.
        tensors: (name, kind of file, dtype, full shape, extent).
        read: gives the data of an extent when its turn comes.
    """
    # Sorted: the bytes then do not depend on the layout that the data come from.
    tensors, layout = sorted(tensors, key=lambda entry: entry[0]), {}
    for kind in (PARAMETERS_FILE, OPTIMIZER_FILE):
        own = [entry for entry in tensors if entry[1] == kind]
        if not own:
            continue
        file = rank_file(kind, rank, ranks)
        plan = [(name, dtype, tuple(stop - start for start, stop in extent), lambda name=name,
                 extent=extent: read(name, extent))
                for name, _, dtype, _, extent in own]
        checksums = write_safetensors(folder / file, plan)
        for (name, _, dtype, full, extent), (_, _, shape, _) in zip(own, plan, strict=True):
            layout[name] = {"file": file, "dtype": dtype, "shape": list(shape), "crc32": checksums[name],
                            "full_shape": list(full), "box": [list(pair) for pair in extent]}
    write_plain_json(folder / rank_file("layout.json", rank, ranks),
                     {"format": FORMAT, "version": VERSION, "rank": rank, "ranks": ranks, "tensors": layout})


def write_full(folder: Path, slices: Slices) -> None:
    """Writes a full checkpoint of the tensors of `slices` into `folder`."""
    layout = {}
    for kind in (PARAMETERS_FILE, OPTIMIZER_FILE):
        names = slices.names(kind)
        if names:
            plan = [(name, slices.tensors[name].dtype, slices.tensors[name].shape, lambda name=name: slices.read(name))
                    for name in names]
            checksums = write_safetensors(folder / kind, plan)
            layout.update({name: {"file": kind, "dtype": dtype, "shape": list(shape), "crc32": checksums[name]}
                           for name, dtype, shape, _ in plan})
    write_plain_json(folder / "layout.json", {"format": FORMAT, "version": VERSION, "tensors": layout})


@dataclass(frozen=True)
class Holder:
    """A process that holds slices: its rank, how many there are, its extents and the full shapes by parameter name, and
    `barrier()`, which returns when all ranks have called it. Moments are sharded as their parameters; a parameter
    without an extent is not held (it belongs to another stage)."""

    rank: int
    ranks: int
    extents: dict[str, Extent]
    shapes: dict[str, tuple[int, ...]]
    barrier: Callable[[], None]


def save_slices(directory: str | Path, step: int, parameters: Sequence[Any], states: Sequence[Any],
                state: dict[str, Any], keep: int | None, holder: Holder,
                add_files: Callable[[Path], None] | None = None) -> Path:
    """`checkpoint.save_checkpoint` for slices: every rank calls it, each writes its own files into one hidden folder on
    a disk that all share, and rank 0 renames it when all have finished.

    Raises:
        UserError: no space or no permission.
    """
    target = checkpoint_path(directory, step)
    # One name for all ranks: the ranks share no process id.
    hidden = target.with_name(f".{target.name}.ranks")
    try:
        if holder.rank == 0:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
            sweep(hidden.parent)
        holder.barrier()
        entries, arrays = [], {}
        for kind, tensors in ((PARAMETERS_FILE, parameters), (OPTIMIZER_FILE, states)):
            for tensor in named(tensors):
                owner = parameter_of(tensor.name)
                if owner in holder.extents:
                    entries.append((tensor.name, kind, tensor.dtype, holder.shapes[owner], holder.extents[owner]))
                    arrays[tensor.name] = tensor
        write_rank(hidden, holder.rank, holder.ranks, entries, lambda name, extent: arrays[name].read())
        holder.barrier()
        if holder.rank == 0:
            if add_files is not None:
                add_files(hidden)
            write_plain_json(hidden / "state.json", {"format": FORMAT, "version": VERSION, "step": step, **state})
            put_in_place(hidden, target)
            remove_old(directory, keep)
        holder.barrier()
    except OSError as error:
        raise explain_os_error(error, target) from error
    return target


def write_checkpoint(target: str | Path, needed: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Calls `write(folder)`, adds state.json and renames: `target` is complete or absent.

    Raises:
        UserError: `target` exists, or the disk has less than `needed` bytes or fills up.
    """
    target = Path(target)
    if target.exists():
        raise UserError("the folder exists already", where=target, hint="choose another or delete it")
    hidden = temporary_name(target)
    try:
        hidden.mkdir(parents=True)
        free = shutil.disk_usage(hidden).free
        if needed + (1 << 20) > free:
            raise UserError(f"this needs {needed / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB left; nothing was "
                            "written", where=target, hint="free some space")
        write(hidden)
        write_plain_json(hidden / "state.json", state)
        hidden.rename(target)
    except OSError as error:
        raise explain_os_error(error, target) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return target


def volume(extent: Sequence[tuple[int, int]]) -> int:
    """Elements in an extent."""
    return math.prod(stop - start for start, stop in extent)


def _relative(extent: Extent, origin: Extent) -> Extent:
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(extent, origin, strict=True))
