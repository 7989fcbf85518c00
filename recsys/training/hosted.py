"""Tables on the host beside a network that is sharded: every process of data x op owns rows, fetches those of its part
of the batch, and sends their gradients back. Imports no framework.

The network has a window for each data-parallel part (`recsys.layers.embedding.Table.divide`); processes that differ in
op have the same part and the same window, so the first of them counts the ids and each sends a share of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parallel.checkpoint.tensors import NamedTensor
from parallel.checkpoint.writing import Holder
from parallel.common.errors import UserError
from parallel.training.backend import Outputs, SlicedBackend
from recsys.data.features import FeatureSpec
from recsys.tables.exchange import Alone, Rounds
from recsys.tables.host import HostTables
from recsys.tables.names import is_sparse

if TYPE_CHECKING:
    from recsys.settings import Run


class HostedRanks(SlicedBackend):
    """A backend whose windows are filled before every step, and read after it.

    Args:
        backend: of a network that was built for windows (`Task.given`).
        tables: on the host; `exchange` is of all processes.
    """

    def __init__(self, backend: SlicedBackend, tables: HostTables) -> None:
        self.backend, self.tables = backend, tables
        self.name, self.rank, self.ranks, self.share = backend.name, backend.rank, backend.ranks, backend.share
        self.numbered, self.reads = backend.numbered, backend.reads
        # A batch holds keys, which the network's numbering of a step's rows replaces.
        kind = "int64" if tables.spec.is_dynamic else "int32"
        self.inputs = [(name, shape, kind if name == "ids" else dtype) for name, shape, dtype in backend.inputs]
        self.windows = [tensor for tensor in backend.parameters() if is_sparse(tensor.name)]

    def _fill(self, ids_BM: np.ndarray, train: bool = False) -> np.ndarray:
        """The network's ids of a batch, whose rows are in the windows."""
        found = self.tables.fetch(self.tables.columns.keys(ids_BM), train=train)
        for tensor, window in zip(self.windows, self.tables.windows, strict=True):
            tensor.assign(window)
        return found

    def step(self, batch: Sequence[np.ndarray]) -> Outputs:
        """See `Backend`."""
        outputs = self.backend.step((self._fill(batch[0], train=True), *batch[1:]))
        if outputs["finite"]:
            self.tables.update([tensor.read().reshape(window.shape)
                                for tensor, window in zip(self.windows, self.tables.windows, strict=True)])
        self.tables.end_step()
        return outputs

    def loss(self, batch: Sequence[np.ndarray]) -> tuple[float, float]:
        """See `Backend`."""
        return self.backend.loss((self._fill(batch[0]), *batch[1:]))

    def scores(self, batch: Sequence[np.ndarray]) -> np.ndarray | None:
        """See `Backend`."""
        return self.backend.scores((self._fill(batch[0]), *batch[1:]))

    def parameters(self) -> Sequence[NamedTensor]:
        """See `Backend`; without the windows."""
        return [tensor for tensor in self.backend.parameters() if not is_sparse(tensor.name)]

    @cached_property
    def holder(self) -> Holder | None:
        """See `Backend`; without the windows."""
        own = self.backend.holder
        if own is None:
            return None
        extents, shapes = ({name: value for name, value in found.items() if not is_sparse(name)}
                           for found in (own.extents, own.shapes))
        return Holder(own.rank, own.ranks, extents, shapes, own.barrier, own.holders)

    def states(self) -> Sequence[NamedTensor]:
        """See `Backend`."""
        return self.backend.states()

    def counters(self) -> Sequence[NamedTensor]:
        """See `Backend`."""
        return self.backend.counters()

    def full_start(self, name: str) -> np.ndarray:
        """See `SlicedBackend`."""
        return self.backend.full_start(name)

    def exchange(self, values: list[float]) -> list[float]:
        """See `Backend`."""
        return self.backend.exchange(values)

    def swap(self, parts: np.ndarray) -> np.ndarray:
        """See `SlicedBackend`."""
        return self.backend.swap(parts)

    def barrier(self) -> None:
        """See `Backend`."""
        self.backend.barrier()

    def peak_tflops(self, precision: str) -> float | None:
        """See `Backend`."""
        return self.backend.peak_tflops(precision)

    def profiler(self, folder: Path) -> Callable[[], None]:
        """See `Backend`."""
        return self.backend.profiler(folder)

    def close(self) -> None:
        """See `Backend`."""
        self.backend.close()


def hosted_ranks(settings: Run, spec: FeatureSpec, backend: SlicedBackend) -> HostedRanks:
    """A backend with the tables of its process on the host.

    Args:
        settings: the run.
        spec: columns of the features in the log.
        backend: of the network built for windows.

    Raises:
        UserError: settings that only other runs know.
    """
    own, options = settings.data.tables, settings.train
    if own.hot_rows is not None:
        raise UserError("hot rows are for one process on MindSpore", where="data.tables.hot_rows", value=own.hot_rows,
                        hint="set it to null")
    parts, copies = backend.share[1], backend.ranks // backend.share[1]
    exchange = Alone() if backend.ranks == 1 else Rounds(backend.rank, backend.ranks, own.exchange_kb << 10,
                                                         backend.swap)
    return HostedRanks(backend, HostTables(settings, spec, options.global_batch_size // parts, exchange,
                                           (backend.rank % copies, copies)))
