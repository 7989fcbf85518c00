"""Passes of a network as MindIR files, which MindSpore alone loads and runs, with free numbers of rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.interchange.ports import Port

_KERNELS = "PANGU_KERNELS"


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Networks built within have MindSpore's operations only: a file must not name this machine's compiled kernels."""
    before = os.environ.get(_KERNELS)
    os.environ[_KERNELS] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_KERNELS]
        else:
            os.environ[_KERNELS] = before


def write(path: Path, cell: Any, inputs: Sequence[Port]) -> int:
    """Writes a cell with its values; bytes of what was written.

    Args:
        path: ends in .mindir.
        cell: built under `plain_operations`, in inference mode.
        inputs: what it takes; sizes that are names are free.

    Raises:
        UserError: MindSpore does not compile the cell with free sizes.
    """
    import mindspore as ms

    path.parent.mkdir(parents=True, exist_ok=True)
    free = [ms.Tensor(shape=[None if isinstance(size, str) else size for size in port.shape],
                      dtype=getattr(ms, port.dtype)) for port in inputs]
    try:
        ms.export(cell, *free, file_name=str(path.with_suffix("")), file_format="MINDIR")
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).split("\n----")[0].strip().splitlines()[0]
        raise UserError(f"MindSpore does not export this pass with free numbers of rows: {reason}", where=path.name,
                        hint="take --format onnx") from error
    # Above 1 GB MindSpore puts the weights into a folder beside.
    beside = path.with_name(f"{path.stem}_variables")
    return path.stat().st_size + sum(file.stat().st_size for file in beside.glob("*"))


class Loaded:
    """A MindIR file as MindSpore reads it back.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        import mindspore as ms
        from mindspore import nn

        self.cell = nn.GraphCell(ms.load(str(path)))

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """The pass's result for its inputs, in order."""
        return self.all(*arrays)[0]

    def all(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Its results, where it has several."""
        import mindspore as ms

        found = self.cell(*(ms.Tensor(np.ascontiguousarray(array)) for array in arrays))
        return [item.asnumpy() for item in (found if isinstance(found, (tuple, list)) else (found,))]
