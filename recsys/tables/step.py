"""The training step of a network whose tables are on the host, and its scores.

Shapes: B samples, M id columns, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.checkpoint.tensors import NamedTensor
from parallel.training.mindspore_backend import MindSporeBackend
from parallel.training.optimizers.budget import replicas_in_norm
from parallel.training.optimizers.run import Optimizer, pick
from parallel.training.settings import TrainSettings
from parallel.training.step import GlobalNorm, MeanGradient, TrainStep, times
from recsys.tables.host import HostTables
from recsys.tables.hot import HotTables
from recsys.tables.names import is_sparse


def dense_parameters(network: nn.Cell) -> list[Parameter]:
    """Those that are no table."""
    return [parameter for parameter in network.get_parameters() if not is_sparse(parameter.name)]


def window_parameters(network: nn.Cell) -> list[Parameter]:
    """The windows, in the order of the widths."""
    return [parameter for parameter in network.get_parameters() if is_sparse(parameter.name)]


class _DenseMean(MeanGradient):
    """`MeanGradient` that leaves the gradients of windows to their processes: these are added at the rows' owners.

    Args:
        dense: for each gradient whether it is added over the processes.
    """

    def __init__(self, block: nn.Cell, accumulation: int, group: str | None, ranks: int, dense: list[bool]) -> None:
        super().__init__(block, accumulation, group, ranks)
        self.dense = tuple(dense)

    def added(self, gradients: tuple) -> tuple:
        """See `MeanGradient.added`."""
        return self.map(ops.partial(reduced_if_dense, self.reduce), gradients, self.dense)


def reduced_if_dense(reduce: ops.Primitive, gradient: Tensor, dense: bool) -> Tensor:
    """The gradient, added over the processes where it is `dense`."""
    if dense:
        return reduce(gradient)
    return gradient


class TableStep(TrainStep):
    """`TrainStep` that returns the gradients of the windows after its five scalars. Only dense gradients count in the
    norm that is clipped; a window's gradient that is not finite keeps the step from counting on every process.

    Args:
        network: of a window's spec.
        optimizer: of the dense parameters.
    """

    def __init__(self, network: nn.Cell, optimizer: Optimizer, settings: TrainSettings, *, group: str | None = None,
                 rank: int = 0, ranks: int = 1) -> None:
        super().__init__(network, optimizer, settings, group=group, rank=rank, ranks=ranks)
        dense = [not is_sparse(parameter.name) for parameter in network.trainable_params()]
        self.gradient = _DenseMean(self.gradient.block, settings.accumulation, group, ranks, dense)
        self.dense_indices = tuple(index for index, own in enumerate(dense) if own)
        self.window_indices = tuple(index for index, own in enumerate(dense) if not own)
        owned = [parameter for parameter, own in zip(network.trainable_params(), dense, strict=True) if own]
        self.norm = GlobalNorm(replicas_in_norm(owned))
        self.window_norm = GlobalNorm([1] * len(self.window_indices))
        self.unscaled = False
        self.reduce = ops.AllReduce(ops.ReduceOp.SUM, group) if group is not None and ranks > 1 else None

    def construct(self, *batch: Tensor) -> tuple:
        """See `TrainStep.construct`."""
        scalars, gradients, factor = self.advance(batch)
        windows = self.map(ops.partial(pick, gradients), self.window_indices)
        return scalars + (self.map(ops.partial(times, factor), windows),)

    def measure(self, gradients: tuple, factor: Tensor) -> tuple:
        """See `TrainStep.measure`."""
        norm = self.norm(self.map(ops.partial(pick, gradients), self.dense_indices)) * factor
        finite = ops.isfinite(self.window_norm(self.map(ops.partial(pick, gradients), self.window_indices)))
        if self.reduce is not None:
            finite = self.reduce(1.0 - ops.cast(finite, mstype.float32)) == 0.0
        return norm, ops.logical_and(ops.isfinite(norm), finite)

    def update(self, gradients: tuple, factor: Tensor, rows: tuple) -> Tensor:
        """See `TrainStep.update`: of the dense parameters."""
        dense = self.map(ops.partial(times, factor), self.map(ops.partial(pick, gradients), self.dense_indices))
        done = self.optimizer(dense, self.step)
        return ops.assign(self.step, ops.depend(self.step, done) + 1)


class HostedStep:
    """A `TableStep` and its tables, called as a step is.

    Args:
        step: of the network.
        tables: on the host.
    """

    def __init__(self, step: TableStep, tables: HostTables) -> None:
        self.step, self.tables = step, tables
        self.windows = window_parameters(step.network)
        if tables.settings.hot_rows is not None:
            tables.hot = HotTables(tables.settings, tables.optimizer.name, tables.plans, tables.tables, self.windows)

    def set_train(self, mode: bool = True) -> None:
        """As of a cell."""
        self.step.set_train(mode)

    def __call__(self, ids_BM: Tensor, *rest: Tensor) -> tuple:
        """The step's five scalars."""
        keys = self.tables.columns.keys(ids_BM.asnumpy())
        ids = self.tables.fetch(keys, train=True)
        put_windows(self.windows, self.tables)
        *scalars, gradients = self.step(Tensor(ids), *rest)
        if bool(scalars[2].asnumpy()):
            self.tables.update(gradients if self.tables.hot is not None
                               else [gradient.asnumpy() for gradient in gradients])
        self.tables.end_step()
        return tuple(scalars)


class HostedBackend(MindSporeBackend):
    """A `TableStep` and its tables as a `parallel.training.backend.Backend`; the windows are no parameters that last.

    Args:
        step: of the network.
        tables: on the host.
        scorer: `Hosted` of the scores.
    """

    def __init__(self, step: TableStep, tables: HostTables, scorer: Any = None) -> None:
        super().__init__(step, scorer=scorer)
        self.hosted = HostedStep(step, tables)

    @property
    def cell(self) -> HostedStep:
        """See `MindSporeBackend`."""
        return self.hosted

    def parameters(self) -> Sequence[NamedTensor]:
        """See `Backend`."""
        return [tensor for tensor in super().parameters() if not is_sparse(tensor.name)]


def put_windows(parameters: list[Parameter], tables: HostTables) -> None:
    """Gives the network the rows of a step."""
    if tables.hot is not None:
        tables.hot.put(tables.windows)
        return
    for parameter, window in zip(parameters, tables.windows, strict=True):
        parameter.set_data(Tensor(window))


class Hosted:
    """A network in inference mode whose tables are on the host, called as the network is: `hosted(ids, numbers)`.

    Args:
        cell: takes ids_BM and other tensors.
        network: whose parameters are the windows.
        tables: on the host; only read.
        batch: samples that the windows were made for.
        columns: of the ids, where the cell takes only some; None = all.
        place: which argument the ids are.
    """

    def __init__(self, cell: nn.Cell, network: nn.Cell, tables: HostTables, columns: np.ndarray | None = None,
                 argument: int = 0) -> None:
        self.cell, self.tables, self.columns, self.argument = cell, tables, columns, argument
        self.windows = window_parameters(network)

    def set_train(self, mode: bool = True) -> None:
        """As of a cell."""
        self.cell.set_train(mode)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the cell gives for rows read from the tables."""
        ids = inputs[self.argument].asnumpy()
        own = self.columns if self.columns is not None else slice(None)
        found = self.tables.fetch(self.tables.columns.keys(ids, own), columns=self.columns)
        put_windows(self.windows, self.tables)
        return self.cell(*inputs[:self.argument], Tensor(found), *inputs[self.argument + 1:])
