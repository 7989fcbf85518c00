"""Checkpoints of which every rank holds slices, read tensor by tensor.

    step_00001000/
        parameters-00003-of-00008.safetensors, optimizer-00003-of-00008.safetensors
        layout.json    for every tensor its type and shape, and for every slice its file, place and checksum
        state.json

A full checkpoint (`parallel.checkpoint.full`) is the special case without slices; both are read by `Slices`. Written by
`parallel.checkpoint.writing`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parallel.checkpoint.folder import LAYOUT_PART, read_state, resolve_checkpoint
from parallel.checkpoint.index import Written, layout_files, read_layout
from parallel.checkpoint.owners import Extent, volume
from parallel.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from parallel.common.errors import UserError

_MOMENT = re.compile(r"^(?:adam_m|adam_v|adagrad_a|rmsprop_s|rmsprop_u)\.")


def parameter_of(name: str) -> str:
    """The parameter that a moment belongs to (`adam_m.x` -> `x`); a parameter's own name."""
    return _MOMENT.sub("", name)


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
    slices: dict[Extent, StoredSlice] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the full tensor."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


class Slices:
    """A checkpoint, full or in slices, opened for reading: `tensors` by name and `read(name, extent)`.

    Args:
        path: a checkpoint, or a folder of them (the newest is taken).
        partial: whether slices may be missing until they are read: those of machines with disks of their own.

    Raises:
        UserError: no checkpoint, damaged, a layout missing, or slices that leave a gap.
    """

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        self.path = self._find(Path(path))
        self.tensors: dict[str, Tensor] = {}
        self._files: dict[Path, SafetensorsFile] = {}
        self._checked: set[tuple[Path, str]] = set()
        layouts, missing, count = layout_files(self.path)
        if missing and not partial:
            raise UserError(f"layout {missing[0]} of {count} is missing, and its slices with it", where=self.path,
                            hint="copy the files of all machines into one folder")
        for layout in layouts:
            for item in read_layout(layout):
                self._add(item)
        self.state = read_state(self.path)
        for name, tensor in self.tensors.items():
            if not missing:
                self._check_cover(name, tuple((0, size) for size in tensor.shape), tensor.slices)

    @staticmethod
    def _find(path: Path) -> Path:
        if path.is_dir() and any(LAYOUT_PART.match(entry.name) for entry in path.iterdir()):
            return path
        return resolve_checkpoint(path)

    def _add(self, item: Written) -> None:
        if item.dtype not in DTYPES or len(item.extent) != len(item.shape) or any(
                not 0 <= start <= stop <= size for (start, stop), size in zip(item.extent, item.shape, strict=True)):
            raise UserError(f"the layout of '{item.name}' is damaged", where=self.path, hint="use another checkpoint")
        tensor = self.tensors.get(item.name)
        if tensor is None:
            tensor = self.tensors[item.name] = Tensor(item.kind, item.dtype, item.shape)
        if (tensor.shape, tensor.dtype) != (item.shape, item.dtype):
            raise UserError(f"the ranks disagree on the shape of '{item.name}'", where=self.path)
        # Of equal slices the first counts: an earlier stage's, where a later one borrows the parameter.
        tensor.slices.setdefault(item.extent, StoredSlice(item.extent, self.path / item.file, item.crc32))

    def _check_cover(self, name: str, extent: Extent, parts: Iterable[Extent]) -> None:
        # Slices of one layout either are the same or do not touch, so their sizes must add up.
        if sum(map(volume, parts)) != volume(extent):
            raise UserError(f"the slices of '{name}' do not make up the full tensor", where=self.path,
                            hint="copy the files of all machines into one folder")

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
        found = _overlaps(tensor, extent)
        self._check_cover(name, extent, [shared for _, shared in found])
        for stored, shared in found:
            self._copy(name, stored, shared, extent, part)
        return part

    def _copy(self, name: str, stored: StoredSlice, shared: Extent, extent: Extent, part: np.ndarray) -> None:
        file = self._opened(stored.file)
        if (stored.file, name) not in self._checked:
            self._check_slice(name, stored, file)
        place = tuple(slice(*pair) for pair in _relative(shared, extent))
        file.copy_extent(name, _relative(shared, stored.extent), part, place)

    def _check_slice(self, name: str, stored: StoredSlice, file: SafetensorsFile) -> None:
        shape, tensor = tuple(stop - start for start, stop in stored.extent), self.tensors[name]
        entry = file.entries.get(name)
        if entry is not None and (entry.shape, entry.dtype) != (shape, tensor.dtype):
            raise UserError(f"checkpoint file is damaged: '{name}' is {entry.dtype} {list(entry.shape)} there and "
                            f"{tensor.dtype} {list(shape)} in the layout", where=stored.file,
                            hint="use another checkpoint")
        file.check(name, stored.crc32)
        self._checked.add((stored.file, name))

    def _opened(self, path: Path) -> SafetensorsFile:
        if path not in self._files:
            self._files[path] = SafetensorsFile(path)
        return self._files[path]

    def check(self, part: int = 0, parts: int = 1) -> None:
        """Compares all data with their checksums, or every `parts`-th slice from number `part` on.

        Raises:
            UserError: a file is missing, or its data have changed.
        """
        listed = [(name, stored) for name, tensor in self.tensors.items() for stored in tensor.slices.values()]
        for name, stored in listed[part::parts]:
            self._check_slice(name, stored, self._opened(stored.file))

    def names(self, kind: str) -> list[str]:
        """Names of the parameters or of the moments."""
        return sorted(name for name, tensor in self.tensors.items() if tensor.kind == kind)


def _overlaps(tensor: Tensor, extent: Extent) -> list[tuple[StoredSlice, Extent]]:
    """Slices that have a part of `extent`, and which."""
    if extent in tensor.slices:
        return [(tensor.slices[extent], extent)]
    found = []
    for stored in tensor.slices.values():
        shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(extent, stored.extent, strict=True))
        if all(start < stop for start, stop in shared):
            found.append((stored, shared))
    return found


def _relative(extent: Extent, origin: Extent) -> Extent:
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(extent, origin, strict=True))
