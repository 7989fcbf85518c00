"""MindSpore's strategy files: how each parameter of a sharded network is sliced over the devices
(`ParallelStrategyMap`).

`mindspore.parallel` reads and writes them (rank_list_for_transform, transform_checkpoints, unified_safetensors).
A file of several stages names its parameters `<stage>-<name>`, as `merge_pipeline_strategys` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parallel.common import protobuf_wire as wire
from parallel.common.errors import UserError
from parallel.common.files import atomic_write

if TYPE_CHECKING:
    pass

MAX_BYTES = 64 << 20
_MAX_RANKS = 1 << 20
Extent = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SliceLayout:
    """How one parameter is sharded.

    Args:
        matrix: sizes of the device matrix of a stage; ranks count along its last dim first.
        dims: for each dim of the parameter the dim of the matrix that shards it, counted from the right; -1 = none.
        step: distance of the ranks that share one slice by the sharded optimizer; 0 = it is not sharded.
        parts: how many they are; -1 = all there are.
        stages: the pipeline stages that hold it.
        slice_shape: shape of a slice before the optimizer's shard, where it is known.
    """

    matrix: tuple[int, ...]
    dims: tuple[int, ...]
    step: int
    parts: int
    stages: tuple[int, ...] = (0,)
    slice_shape: tuple[int, ...] = ()

    @property
    def ranks(self) -> int:
        """How many ranks a stage has."""
        return math.prod(self.matrix)

    def extent(self, rank: int, shape: tuple[int, ...]) -> Extent:
        """[start, stop) of each dim that `rank` of a stage holds of a parameter of `shape`.

        Raises:
            UserError: a dim does not divide.
        """
        coordinates = np.unravel_index(rank, self.matrix)
        extent = []
        for dim, axis in zip(shape, self.dims, strict=True):
            parts, index = (1, 0) if axis < 0 else (self.matrix[-1 - axis], int(coordinates[-1 - axis]))
            extent.append(_part((0, dim), parts, index))
        if self.step:
            parts = self.parts if self.parts > 0 else self.ranks // self.step
            extent[0] = _part(extent[0], parts, rank // self.step % parts)
        return tuple(extent)


def _part(span: tuple[int, int], parts: int, index: int) -> tuple[int, int]:
    start, stop = span
    if (stop - start) % parts:
        raise UserError(f"a dim of {stop - start} does not divide into {parts} slices", where="strategy",
                        hint="is the strategy file of another model?")
    size = (stop - start) // parts
    return start + index * size, start + (index + 1) * size


def read_strategy(path: str | Path) -> dict[str, SliceLayout]:
    """The layouts of everything that a strategy file names, of one stage or of several.

    Raises:
        UserError: missing, too large or not a strategy file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("no such strategy file", where=path)
    if path.stat().st_size > MAX_BYTES:
        raise UserError("file is too large for a strategy", where=path, value=path.stat().st_size)
    layouts: dict[str, SliceLayout] = {}
    data = path.read_bytes()
    if wire.has_changed(data):
        raise UserError("file is damaged: what is in it has changed since it was written", where=path,
                        hint="use another copy")
    try:
        for number, item in wire.fields(data):
            if number == 3:
                name, layout = _layout(item)
                stage, dash, rest = name.partition("-")
                if dash and stage.isdigit():
                    before = layouts[rest].stages if rest in layouts else ()
                    name, layout = rest, SliceLayout(layout.matrix, layout.dims, layout.step, layout.parts,
                                                     (*before, int(stage)),
                                                     layout.slice_shape)
                layouts[name] = layout
    except (ValueError, TypeError, AttributeError, UnicodeDecodeError):
        raise UserError("not a strategy file", where=path) from None
    if not layouts:
        raise UserError("the strategy file names no parameter", where=path)
    _check_layouts(layouts, path)
    return layouts


def _check_layouts(layouts: dict[str, SliceLayout], path: Path) -> None:
    """What no strategy says: the published files carry no digest, so damage must show in what they mean."""
    for name, layout in layouts.items():
        axes, ranks = len(layout.matrix), math.prod(layout.matrix) if layout.matrix else 0
        used = [dim for dim in layout.dims if dim >= 0]
        wrong = (not name or not name.isprintable() or not 0 < ranks <= _MAX_RANKS or min(layout.matrix, default=0) < 1
                 or any(not -1 <= dim < axes for dim in layout.dims) or len(set(used)) != len(used)
                 or not 0 <= layout.step <= ranks or layout.parts < -1 or layout.parts > ranks
                 or (layout.parts > 0 and ranks % layout.parts) or (layout.step > 0 and ranks % layout.step)
                 or (bool(layout.slice_shape) and len(layout.slice_shape) != len(layout.dims))
                 or any(size < 1 for size in layout.slice_shape))
        if wrong:
            raise UserError(f"file is damaged: no strategy slices '{name[:80]}' like this", where=path,
                            hint="use another copy")
    sizes = {math.prod(layout.matrix) for layout in layouts.values()}
    if len(sizes) > 1:
        raise UserError("file is damaged: its parameters are on different numbers of devices", where=path,
                        value=sorted(sizes), hint="use another copy")


def write_strategy(path: str | Path, layouts: dict[str, SliceLayout]) -> None:
    """A strategy file that `read_strategy` and MindSpore read; several stages in one, if there are several.

    Raises:
        UserError: no disk space.
    """
    stages = sorted({stage for layout in layouts.values() for stage in layout.stages})
    matrix = next(iter(layouts.values())).matrix
    # MindSpore calls a file without strategies of operators empty: one a stage gives the stage's number.
    degree = wire.field(1, b"".join(wire.field(1, size) for size in matrix))
    items = [wire.field(1, 1)]
    items += [wire.field(2, wire.field(1, f"stage_{stage}".encode())
                         + wire.field(2, wire.field(1, stage) + wire.field(2, degree))) for stage in stages]
    for stage in stages:
        for name, layout in layouts.items():
            if stage in layout.stages:
                named = f"{stage}-{name}" if len(stages) > 1 else name
                items.append(wire.field(3, wire.field(1, named.encode()) + wire.field(2, _encoded(layout))))
    with atomic_write(path, "wb") as file:
        file.write(wire.with_digest(b"".join(items)))


def _encoded(layout: SliceLayout) -> bytes:
    sizes, dims, shape = (b"".join(wire.field(1, value) for value in values)
                          for values in (layout.matrix, layout.dims, layout.slice_shape))
    return (wire.field(1, sizes) + wire.field(2, dims) + wire.field(3, shape) + wire.field(4, b"") + wire.field(5, 0)
            + wire.field(6, layout.step) + wire.field(7, layout.parts))


def _layout(item: memoryview) -> tuple[str, SliceLayout]:
    name, layout = "", memoryview(b"")
    for number, value in wire.fields(item):
        if number == 1:
            name = bytes(value).decode("utf-8")
        elif number == 2:
            layout = value
    values = dict(wire.fields(layout))
    return name, SliceLayout(_dims(values.get(1)), _dims(values.get(2)), wire.signed(values.get(6, 0)),
                             wire.signed(values.get(7, 0)), slice_shape=_dims(values.get(3)))


def _dims(message: memoryview | None) -> tuple[int, ...]:
    """`repeated uint32/sint32 dim = 1`, one by one or packed."""
    found: list[int] = []
    for _, value in wire.fields(message or b""):
        if isinstance(value, int):
            found.append(value)
        else:
            at = 0
            while at < len(value):
                number, at = wire.next_varint(value, at)
                found.append(number)
    return tuple(_int32(value) for value in found)


def _int32(value: int) -> int:
    value = wire.signed(value)
    return value - (1 << 32) if 1 << 31 <= value < 1 << 32 else value
