"""Optimizers that move only the rows that a step uses: table and states are read and written at these rows, whatever
number of rows they have. Formulas are those of tables on the host (`recsys.tables`).

Shapes: V rows of a table (of a device's shard), K distinct rows of a step with some -1 behind them, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from parallel.training.optimizers.dense import held, make_states
from parallel.training.settings import OptimizerSettings

_GATHER, _PUT, _TAKE = ops.Gather(), ops.ScatterUpdate(), ops.ScatterSub()


def places(rows_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows_K to write, whose gradient each gets, whether it is touched [K, 1]). Slots without a row repeat the first
    one, which writes its new values again; where a device has no row at all, row 0 keeps its values."""
    valid_K = rows_K >= 0
    source_K = ops.select(valid_K, Tensor(np.arange(rows_K.shape[0]), ms.int32), ops.zeros_like(rows_K))
    row_K = _GATHER(rows_K, source_K, 0)
    return ops.maximum(row_K, ops.zeros_like(row_K)), source_K, ops.expand_dims(row_K >= 0, -1)


def moved(state: Parameter, row_K: Tensor, touched_K1: Tensor, old_KW: Tensor, new_KW: Tensor) -> Tensor:
    """Writes rows of a state; those that are not touched keep what they had."""
    return _PUT(state, row_K, ops.select(ops.broadcast_to(touched_K1, old_KW.shape), new_KW, old_KW))


def stepped(table: Parameter, row_K: Tensor, source_K: Tensor, touched_K1: Tensor, step_KW: Tensor) -> Tensor:
    """Subtracts the steps of rows, each once. The table is not read: beside the forward pass's read a second one would
    make MindSpore copy all of it, lest it change under the first."""
    own_K1 = ops.logical_and(touched_K1, ops.expand_dims(
        ops.equal(source_K, Tensor(np.arange(row_K.shape[0]), ms.int32)), -1))
    return _TAKE(table, row_K, ops.select(ops.broadcast_to(own_K1, step_KW.shape), step_KW, ops.zeros_like(step_KW)))


def sgd_rows(rate: Tensor, table: Parameter, gradient_KW: Tensor, rows_K: Tensor) -> Tensor:
    """p -= rate g."""
    row_K, source_K, touched_K1 = places(rows_K)
    return stepped(table, row_K, source_K, touched_K1, rate * _GATHER(gradient_KW, source_K, 0))


def adagrad_rows(rate: Tensor, epsilon: float, mean: bool, table: Parameter, a: Parameter, gradient_KW: Tensor,
                 rows_K: Tensor) -> Tensor:
    """a += g^2 (row-wise: its mean over the row, a [V, 1]), p -= rate g / (sqrt(a) + epsilon)."""
    row_K, source_K, touched_K1 = places(rows_K)
    g, old = _GATHER(gradient_KW, source_K, 0), _GATHER(a, row_K, 0)
    square = ops.square(g)
    if mean:
        square = ops.expand_dims(ops.reduce_sum(square, -1), -1) / g.shape[1]
    new = old + square
    done = stepped(table, row_K, source_K, touched_K1, rate * g / (ops.sqrt(new) + epsilon))
    return ops.depend(done, moved(a, row_K, touched_K1, old, new))


def adam_rows(rate: Tensor, betas: tuple, corrections: tuple, epsilon: float, table: Parameter, m: Parameter,
              v: Parameter, gradient_KW: Tensor, rows_K: Tensor) -> Tensor:
    """Adam's formula, moments of a row decaying at the steps that use it only."""
    row_K, source_K, touched_K1 = places(rows_K)
    g = _GATHER(gradient_KW, source_K, 0)
    old_m, old_v = _GATHER(m, row_K, 0), _GATHER(v, row_K, 0)
    new_m = betas[0] * old_m + (1.0 - betas[0]) * g
    new_v = betas[1] * old_v + (1.0 - betas[1]) * ops.square(g)
    step = rate * (new_m / corrections[0]) / (ops.sqrt(new_v / corrections[1]) + epsilon)
    done = stepped(table, row_K, source_K, touched_K1, step)
    return ops.depend(ops.depend(done, moved(m, row_K, touched_K1, old_m, new_m)),
                      moved(v, row_K, touched_K1, old_v, new_v))


class RowSGD(nn.Cell):
    """Plain gradient descent; no state.

    Args:
        tables: parameters with gradients of rows.
        settings: of the optimizer.
        accumulators: of the tables' layers (`RowTable.accumulator`).
    """

    def __init__(self, tables: Sequence[Parameter], settings: OptimizerSettings,
                 accumulators: Sequence[Parameter | None] = ()) -> None:
        super().__init__(auto_prefix=False)
        self.parameters, self.settings, self.map = ParameterTuple(tables), settings, ops.HyperMap()
        self.epsilon = settings.epsilon

    def construct(self, gradients: tuple, rate: Tensor, step: Tensor, finite: Tensor | None = None,
                  rows: tuple = ()) -> Tensor:
        """Moves the rows. gradients: [K, W] of each table; rows: [K] of each (`row_gradients.once`); the others as in
        `Adam.construct`."""
        return ops.depend(step, self.map(ops.partial(sgd_rows, rate), self.parameters, gradients, rows))


class RowAdagrad(RowSGD):
    """Adagrad; equal to the dense one to the bit, whose rows without a gradient stay as they are."""

    def __init__(self, tables: Sequence[Parameter], settings: OptimizerSettings,
                 accumulators: Sequence[Parameter | None] = ()) -> None:
        super().__init__(tables, settings)
        self.adagrad_a = make_states("adagrad_a", tables, settings.initial_accumulator)

    def construct(self, gradients: tuple, rate: Tensor, step: Tensor, finite: Tensor | None = None,
                  rows: tuple = ()) -> Tensor:
        """See `RowSGD.construct`."""
        update = ops.partial(adagrad_rows, rate, self.epsilon, False)
        return ops.depend(step, self.map(update, self.parameters, self.adagrad_a, gradients, rows))


class RowwiseAdagrad(RowSGD):
    """Adagrad with one sum of squares a row, of the mean over the row's numbers; it lies in the tables' layers."""

    def __init__(self, tables: Sequence[Parameter], settings: OptimizerSettings,
                 accumulators: Sequence[Parameter | None] = ()) -> None:
        super().__init__([*tables, *accumulators], settings)
        self.tables, self.accumulators = ParameterTuple(tables), ParameterTuple(accumulators)

    def construct(self, gradients: tuple, rate: Tensor, step: Tensor, finite: Tensor | None = None,
                  rows: tuple = ()) -> Tensor:
        """See `RowSGD.construct`."""
        update = ops.partial(adagrad_rows, rate, self.epsilon, True)
        return ops.depend(step, self.map(update, self.tables, self.accumulators, gradients, rows))


class LazyAdam(RowSGD):
    """Adam whose moments and rows move at the steps that use the row only; the correction of the bias is by the steps
    of the run."""

    def __init__(self, tables: Sequence[Parameter], settings: OptimizerSettings,
                 accumulators: Sequence[Parameter | None] = ()) -> None:
        super().__init__(tables, settings)
        self.adam_m, self.adam_v = make_states("adam_m", tables), make_states("adam_v", tables)
        self.beta1, self.beta2 = (Tensor(beta, ms.float32) for beta in settings.betas)
        self.bias_correction, self.one = settings.bias_correction, Tensor(1.0, ms.float32)

    def construct(self, gradients: tuple, rate: Tensor, step: Tensor, finite: Tensor | None = None,
                  rows: tuple = ()) -> Tensor:
        """See `RowSGD.construct`."""
        corrections = (self.one, self.one)
        if self.bias_correction:
            count = ops.cast(step, ms.float32) + 1.0
            corrections = (1.0 - ops.pow(self.beta1, count), 1.0 - ops.pow(self.beta2, count))
        betas = (held(self.beta1, finite), held(self.beta2, finite))
        update = ops.partial(adam_rows, rate, betas, corrections, self.epsilon)
        return ops.depend(step, self.map(update, self.parameters, self.adam_m, self.adam_v, gradients, rows))


ROW_OPTIMIZERS: dict[str, Callable[..., RowSGD]] = {
    "sgd": RowSGD, "adagrad": RowAdagrad, "rowwise_adagrad": RowwiseAdagrad, "lazy_adam": LazyAdam,
}
