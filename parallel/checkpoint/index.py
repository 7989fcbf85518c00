"""The index of a checkpoint in slices: one file with the place of every slice of every tensor.

    layout.json                       of a disk that all ranks share
    layout-00003-of-00064.json        of machine 3 of 64 that have disks of their own; copied into one folder they are
                                      read together

    {"format", "version": 3, "ranks": 512, "files": [name, ...],
     "tensors": {name: {"kind": "parameters.safetensors", "dtype": "F32", "shape": [full],
                        "pieces": ["<file> <crc32> <start>:<stop> <start>:<stop>", ...]}}}

Until version 2 every rank had a layout of its own with all that it held; those are read too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from parallel.checkpoint.folder import (
    FORMAT,
    INDEX_VERSION,
    LAYOUT_PART,
    OPTIMIZER_FILE,
    PARAMETERS_FILE,
    VERSION,
    read_sealed_json,
)
from parallel.checkpoint.owners import Disks, Extent
from parallel.common.errors import UserError
from parallel.common.files import inside
from parallel.common.structured import read_json, typed


@dataclass(frozen=True)
class Written:
    """A slice on the disk: its tensor, kind of file, type, full shape; its place in the tensor, file and checksum."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    extent: Extent
    file: str
    crc32: int | None


class _Entry(pydantic.BaseModel):
    """A tensor in a layout of one rank (versions 1 and 2), or of a full checkpoint."""

    file: str
    dtype: str
    shape: list[pydantic.NonNegativeInt]
    crc32: int | None = None
    full_shape: list[pydantic.NonNegativeInt] | None = None
    box: list[tuple[pydantic.NonNegativeInt, pydantic.NonNegativeInt]] | None = None


class _Indexed(pydantic.BaseModel):
    """A tensor in an index."""

    kind: str
    dtype: str
    shape: list[pydantic.NonNegativeInt]
    pieces: list[str]


def index_name(rank: int, disks: Disks) -> str:
    """Name of the index on a rank's disk."""
    return "layout.json" if disks.count == 1 else f"layout-{disks.of(rank):05d}-of-{disks.count:05d}.json"


def part_name(rank: int) -> str:
    """Name of the file by which a rank reports to the first of its disk while a checkpoint is being written."""
    return f".written-{rank:05d}.json"


def index_tree(slices: Iterable[Written], ranks: int) -> dict[str, Any]:
    """The JSON of an index."""
    files: dict[str, int] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for item in sorted(slices, key=lambda item: (item.name, item.extent, item.file)):
        entry = tensors.setdefault(item.name, {"kind": item.kind, "dtype": item.dtype, "shape": list(item.shape),
                                               "pieces": []})
        place = "".join(f" {start}:{stop}" for start, stop in item.extent)
        entry["pieces"].append(f"{files.setdefault(item.file, len(files))} {item.crc32}{place}")
    return {"format": FORMAT, "version": INDEX_VERSION, "ranks": ranks, "files": list(files), "tensors": tensors}


def written_tree(slices: Iterable[Written]) -> dict[str, Any]:
    """The JSON by which a rank reports to the first of its disk what it has written."""
    return {"slices": [[item.name, item.kind, item.dtype, item.shape, item.extent, item.file, item.crc32]
                       for item in slices]}


def read_written(path: Path) -> list[Written]:
    """The slices of a file that `written_tree` made."""
    return [Written(name, kind, dtype, tuple(shape), tuple(map(tuple, extent)), file, crc32)
            for name, kind, dtype, shape, extent, file, crc32 in read_json(path, dict)["slices"]]


def layout_files(folder: Path) -> tuple[list[Path], list[int], int]:
    """Layouts of a checkpoint, the numbers of missing ones, and of how many; a single index is ([path], [], 1).

    Raises:
        UserError: there is none.
    """
    if (folder / "layout.json").is_file():
        return [folder / "layout.json"], [], 1
    found = {int(match[1]): entry for entry in folder.iterdir() if (match := LAYOUT_PART.match(entry.name))}
    if not found:
        raise UserError("the checkpoint has no layout", where=folder)
    count = max(int(LAYOUT_PART.match(entry.name)[2]) for entry in found.values())
    return [found[number] for number in sorted(found)], sorted(set(range(count)) - found.keys()), count


def read_layout(path: Path) -> Iterator[Written]:
    """The slices that a layout names.

    Raises:
        UserError: not a layout, damaged, or a file outside the folder.
    """
    layout = read_sealed_json(path)
    if layout.get("format") != FORMAT or layout.get("version") not in (1, VERSION, INDEX_VERSION):
        raise UserError("not a checkpoint layout of this version", where=path)
    if layout["version"] == INDEX_VERSION:
        yield from _indexed(layout, path)
        return
    for name, entry in typed(layout.get("tensors"), dict[str, _Entry], where=path,
                             hint="use another checkpoint").items():
        shape = tuple(entry.shape if entry.full_shape is None else entry.full_shape)
        extent = tuple(entry.box) if entry.box is not None else tuple((0, size) for size in shape)
        kind = OPTIMIZER_FILE if entry.file.startswith("optimizer") else PARAMETERS_FILE
        inside(path.parent, entry.file)
        yield Written(name, kind, entry.dtype, shape, extent, entry.file, entry.crc32)


def _indexed(layout: dict[str, Any], path: Path) -> Iterator[Written]:
    files = typed(layout.get("files"), list[str], where=path, hint="use another checkpoint")
    for file in files:
        inside(path.parent, file)
    for name, entry in typed(layout.get("tensors"), dict[str, _Indexed], where=path,
                             hint="use another checkpoint").items():
        shape = tuple(entry.shape)
        for text in entry.pieces:
            try:
                number, crc32, *places = text.split(" ")
                extent = tuple((int(start), int(stop)) for start, stop in (place.split(":") for place in places))
                yield Written(name, entry.kind, entry.dtype, shape, extent, files[int(number)], int(crc32))
            except (ValueError, IndexError):
                raise UserError(f"the layout of '{name}' is damaged", where=path,
                                hint="use another checkpoint") from None
