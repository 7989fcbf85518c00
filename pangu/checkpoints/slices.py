"""Sliced MindSpore checkpoints: one file a rank, and a strategy file that says which part of a parameter each holds.

As published for 2.6B and 13B: 512 files `filerted_<rank>.ckpt`, ranks in a matrix [64, 8] (data, op). A parameter is
sharded over op along the dim that its tensor map names, then over data along dim 0 (sharded optimizer). The three
embedding tables are unsharded, in .npy files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from pangu.checkpoints.mindspore_file import Entry, MindSporeFile, write_mindspore
from pangu.checkpoints.names import keys
from pangu.config import ModelConfig
from parallel.checkpoint.strategy_file import SliceLayout, write_strategy
from parallel.checkpoint.strategy_file import read_strategy as read_layouts
from parallel.common.errors import UserError
from parallel.common.progress import progress

TABLES = {"backbone.word_embedding.embedding_table": "word_embedding.npy",
          "backbone.position_embedding.embedding_table": "position_embedding.npy",
          "backbone.top_query_embedding.embedding_table": "top_query_embedding.npy"}
SLICE_NAME = "filerted_{rank}.ckpt"  # the release's own spelling
STRATEGY_NAME = "strategy.ckpt"
_RANK = re.compile(r"(\d+)$")


def read_strategy(path: str | Path) -> dict[str, SliceLayout]:
    """The layouts of PanGu-alpha's parameters of a strategy file, optimizer states left out.

    Raises:
        UserError: missing, too large, not a strategy file, or of another model.
    """
    layouts = {name: layout for name, layout in read_layouts(path).items() if name.startswith("backbone.")}
    if not layouts:
        raise UserError("the strategy file names no parameter of PanGu-alpha", where=path)
    return layouts


def release_layouts(config: ModelConfig, data: int = 64, op: int = 8) -> dict[str, SliceLayout]:
    """The release's layouts for a model of any size: what the strategy files published with 2.6B and 13B say."""
    layouts = {}
    for key in keys(config, "mindspore"):
        name, dims = key.foreign, [-1] * len(key.their_shape)
        full = "layernorm" in name or "embedding" in name or name.endswith("projection.bias")
        if not full:
            dims[1 if name.endswith("mapping.weight") else 0] = 0
        layouts[name] = SliceLayout((data, op), tuple(dims), 0 if full else op, 0 if full else -1)
    return layouts


class SlicedCheckpoint:
    """Slices opened for reading: `entries` of full parameters, `read(name)` puts one together.

    Args:
        folder: of the slices, `<anything>_<rank>.ckpt` or `rank_<rank>/<anything>.ckpt`.
        layouts: of the strategy file, or `release_layouts`.
        tables: folder of the three .npy files; None = the slices' own folder.
        shapes: full shapes by name, as the model has them.

    Raises:
        UserError: a rank's file or a table is missing; the strategy lacks a parameter.
    """

    def __init__(self, folder: str | Path, layouts: dict[str, SliceLayout], tables: str | Path | None,
                 shapes: dict[str, tuple[int, ...]]) -> None:
        self.folder, self.shapes = Path(folder), shapes
        self.layouts = layouts
        self.tables = {name: Path(tables or folder) / file for name, file in TABLES.items()}
        self.paths = self._files(next(iter(self.layouts.values())).ranks)
        missing = [name for name in shapes if name not in self.layouts and name not in TABLES]
        if missing:
            raise UserError(f"the strategy lacks {missing[0]} and {len(missing) - 1} more", where="strategy",
                            hint="has the model the same number of layers?")

    def _files(self, ranks: int) -> list[Path]:
        if not self.folder.is_dir():
            raise UserError("no such folder", where=self.folder)
        found: dict[int, Path] = {}
        for path in [*self.folder.glob("*.ckpt"), *self.folder.glob("rank_*/*.ckpt")]:
            match = _RANK.search(path.stem if path.parent == self.folder else path.parent.name)
            if match is not None and (rank := int(match[1])) < ranks:
                found[rank] = path
        lacking = [rank for rank in range(ranks) if rank not in found]
        if lacking:
            raise UserError(f"{len(lacking)} of {ranks} slices are missing, the first is of rank {lacking[0]}",
                            where=self.folder, hint="unpack all parts of the release into one folder")
        return [found[rank] for rank in range(ranks)]

    @cached_property
    def files(self) -> list[MindSporeFile]:
        """The files of all ranks, opened: only positions are kept of them."""
        return [MindSporeFile(path) for path in progress(self.paths, "open slices")]

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Type and full shape of every parameter found, the tables' included."""
        found = {name: Entry(entry.dtype, self.shapes.get(name, entry.shape))
                 for name, entry in self.files[0].entries.items() if name not in self.tables}
        for name, path in self.tables.items():
            found[name] = Entry("F16" if self._table(name, path).dtype == np.float16 else "F32", self.shapes[name])
        return found

    def _table(self, name: str, path: Path) -> np.ndarray:
        if not path.is_file():
            raise UserError("the table is missing", where=path, hint="give its folder as --embeddings")
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:
            raise UserError("not a plain .npy array", where=path) from None
        if table.shape != tuple(self.shapes[name]) or table.dtype not in (np.float32, np.float16):
            raise UserError(f"the table is {table.dtype} {list(table.shape)}, the model's {list(self.shapes[name])}",
                            where=path, hint="give the config of this model's size")
        return table

    def read(self, name: str) -> np.ndarray:
        """One full parameter.

        Raises:
            UserError: a slice is missing, of another shape or type, or the slices do not cover it.
        """
        if name in self.tables:
            return np.array(self._table(name, self.tables[name]))
        layout, shape = self.layouts[name], self.shapes[name]
        full, covered, seen = None, 0, set()
        for rank, file in enumerate(self.files):
            extent = layout.extent(rank, shape)
            if extent in seen:
                continue
            part = file.read(name)
            if part.shape != tuple(stop - start for start, stop in extent):
                raise UserError(f"'{name}' has shape {list(part.shape)}, the strategy says "
                                f"{[stop - start for start, stop in extent]}", where=file.path,
                                hint="give the config of this model's size")
            if full is None:
                full = np.empty(shape, part.dtype)
            full[tuple(slice(*span) for span in extent)] = part
            seen.add(extent)
            covered += part.size
        if full is None or covered != full.size:
            raise UserError(f"the slices do not cover '{name}'", where=self.folder)
        return full


def write_slices(folder: str | Path, layouts: dict[str, SliceLayout],
                 tensors: Iterable[tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]],
                 ranks: Iterable[int] | None = None) -> None:
    """The opposite of `SlicedCheckpoint`: all ranks' files and the three tables.

    Args:
        folder: made anew.
        layouts: how; they are written as a strategy file, too.
        tensors: (name, dtype, full shape, read() -> array); `read` is called once a rank, so it should map, not load.
        ranks: which ranks; None = all.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError("the folder is not empty", where=folder, hint="name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = list(tensors)
    write_strategy(folder / STRATEGY_NAME, layouts)
    for name, _, _, read in tensors:
        if name in TABLES:
            np.save(folder / TABLES[name], read(), allow_pickle=False)
    sliced = [tensor for tensor in tensors if tensor[0] not in TABLES]
    every = range(next(iter(layouts.values())).ranks)
    for rank in progress(list(ranks if ranks is not None else every), "write slices"):
        write_mindspore(folder / SLICE_NAME.format(rank=rank), [_slice(layouts, rank, *tensor) for tensor in sliced])


def _slice(layouts: dict[str, SliceLayout], rank: int, name: str, dtype: str, shape: tuple[int, ...],
           read: Callable[[], np.ndarray]) -> tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]:
    if name not in layouts:
        raise UserError(f"the strategy lacks {name}", where="--strategy")
    extent = layouts[name].extent(rank, shape)
    where = tuple(slice(*span) for span in extent)
    return name, dtype, tuple(stop - start for start, stop in extent), lambda: read()[where]
