"""Checkpoints of other codes read part by part, under our names, without converting them first.

What a path holds is told by its files and by the names in them: the release's slices (512 of them, or as many as a
strategy file beside them says), MindSpore's, MindFormers', Hugging Face's and Megatron's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pangu.checkpoints.convert import ManyFiles, Mapping, open_file
from pangu.checkpoints.names import keys
from pangu.checkpoints.slices import STRATEGY_NAME, SlicedCheckpoint, read_strategy, release_layouts
from pangu.config import ModelConfig
from parallel.common.errors import UserError

_NAMINGS = ("huggingface", "mindformers", "mindspore", "megatron")
_FIRST_SLICES = ("*_0.ckpt", "rank_0/*.ckpt")


class ForeignCheckpoint:
    """Like `parallel.checkpoint.full.Checkpoint`: `path`, `state` and `read(name, extent)`.

    Args:
        path: a file, or a folder of files.
        config: of the model.

    Raises:
        UserError: no checkpoint there, or parameters that are not this model's.
    """

    def __init__(self, path: str | Path, config: ModelConfig) -> None:
        self.path, self.state = Path(path), {}
        source, naming = _source(self.path, config)
        mapping = Mapping(source, config, naming)
        if mapping.unmapped:
            raise UserError(f"{len(mapping.unmapped)} keys of the checkpoint belong to no parameter, as "
                            f"{mapping.unmapped[0]}", where=self.path, hint="is the config of another size?")
        self._reads = {name: read for name, _, _, read in mapping.plan(keys(config, "pangu"), "fp32", "pangu")}

    def read(self, name: str, extent: tuple[tuple[int, int], ...] | None = None) -> np.ndarray:
        """The part `extent` (None = all) of a parameter, float32; the whole one is in memory meanwhile."""
        whole = self._reads[name]()
        return whole if extent is None else np.ascontiguousarray(whole[tuple(slice(*pair) for pair in extent)])

    def identity(self) -> bytes:
        """What tells this checkpoint from another: names, sizes and times of its files."""
        files = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        found = [(str(file.relative_to(self.path.parent)), file.stat().st_size, file.stat().st_mtime_ns)
                 for file in files if file.is_file()]
        return repr(found).encode()


def _source(path: Path, config: ModelConfig) -> tuple[Any, str]:
    """What reads the files, and whose names they have."""
    if path.is_dir() and any(next(path.glob(pattern), None) for pattern in _FIRST_SLICES):
        strategy = path / STRATEGY_NAME
        layouts = read_strategy(strategy) if strategy.is_file() else release_layouts(config)
        shapes = {key.foreign: key.their_shape for key in keys(config, "mindspore")}
        return SlicedCheckpoint(path, layouts, None, shapes), "mindspore"
    source = ManyFiles(path) if path.is_dir() else open_file(path)
    known = {naming: sum(key.foreign in source.entries for key in keys(config, naming)) for naming in _NAMINGS}
    best = max(known, key=known.__getitem__)
    if not known[best]:
        raise UserError("no parameter of this model is in it", where=path,
                        hint="known: this project's, MindSpore's, MindFormers', Hugging Face's and Megatron's")
    return source, best
