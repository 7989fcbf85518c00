"""Embedding tables. Shapes: V rows (vocabulary or positions), D width, B batch, S sequence, N = B S tokens.

Of tables whose gradient is that of a step's rows alone, never of the table's full shape: W width, R devices that share
a table, K rows that each of them fetches in a step.
"""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.common.start_value import ROW_SLOTS
from parallel.layers.parameter import parameter
from parallel.sharding.layout import Axes, Layer, Operand, OpSharding


class Embedding(Layer):
    """rows_ND = table_VD[ids_BS], flattened over batch and sequence.

    Args:
        rows: V.
        width: D.
        std: sigma of the start.
        start: "normal" or "truncated_normal".
        axis: "vocabulary" shards V over the op axis (every device looks up its own rows, the results are summed);
            None leaves the table unsharded.

    Source: PanGu-alpha code, Gather strategies ((1,1),(dp,1)) and ((mp,1),(dp,1)).
    """

    def __init__(self, rows: int, width: int, *, std: float, start: str = "normal", axis: str | None = None) -> None:
        super().__init__()
        self.rows, self.width, self.axis = rows, width, axis
        self.table = parameter((rows, width), start, std, shard_optimizer=False)
        self.gather = ops.Gather()
        self.reshape = ops.Reshape()

    def construct(self, ids_BS: Tensor) -> Tensor:
        return self.reshape(self.gather(self.table, ids_BS, 0), (-1, self.width))

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.gather, ((self.axis, None), ("batch", None)), weights=("table",))]

class TiedHead(Layer):
    """logits_NV = hidden_ND table_VD^T: the head that shares the word embedding's table, without a bias.

    Args:
        axis: "vocabulary" shards V over the op axis, None leaves it unsharded.
    """

    def __init__(self, *, axis: str | None = None) -> None:
        super().__init__()
        self.axis = axis
        self.matmul = ops.MatMul(transpose_b=True)
        self.cast = ops.Cast()

    def construct(self, hidden_ND: Tensor, table_VD: Tensor) -> Tensor:
        return self.matmul(hidden_ND, self.cast(table_VD, hidden_ND.dtype))

    def redistributes(self, axes: Axes) -> bool:
        return axes.sequence  # from the sharded residual stream

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.matmul, (("tokens", None), (self.axis, None)))]


class Residual(Layer):
    """x_ND + y_ND in the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.add = ops.Add()

    def construct(self, x_ND: Tensor, y_ND: Tensor) -> Tensor:
        return self.add(x_ND, y_ND)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.add, (("residual", None), ("residual", None)))]


class RowTable(Layer):
    """Base of layers that hold a table, `self.table` [V, W], and in training add `RowSlots` to the rows they fetch.

    A step differentiates by the slots instead of the table (`parallel.training.optimizers.row_gradients`).

    Attributes:
        by_rows: whether it does. Whoever builds the network sets it, before a step is made; the optimizer of the table
            is then one of `parallel.training.optimizers.rows`.
        accumulator: [V, 1], row-wise Adagrad's sums of squares; None for other optimizers. It is a parameter of the
            layer and no clone of the table, since the partitioner gives clones the table's shape.
    """

    by_rows = False
    table: Parameter

    def __init__(self) -> None:
        super().__init__()
        self.accumulator: Parameter | None = None

    def keep_accumulator(self, start: float) -> None:
        """Makes `accumulator`, filled with `start`."""
        raise NotImplementedError

    def make_slots(self) -> RowSlots:
        """The slots of a step, made when first asked for, after the layer has its layout."""
        raise NotImplementedError


class RowSlots(Layer):
    """rows_RKW as they are; the gradient by `self.gradient` [R, K, W], which is 0, is that of the rows, and the
    gradient by `self.number` int32 [R, K] says which rows they are.

    Both belong to the step that differentiates by them: the network does not own them, so that nothing that keeps
    or counts its parameters meets them.

    Args:
        name: of the table.
        shape: R, K, W.
    """

    def __init__(self, name: str, shape: tuple[int, int, int]) -> None:
        super().__init__(auto_prefix=False)
        gradient = Parameter(Tensor(np.zeros(shape, np.float32)), f"{ROW_SLOTS}gradient.{name}", requires_grad=False,
                             parallel_optimizer=False)
        number = Parameter(Tensor(np.zeros(shape[:2], np.int32)), f"{ROW_SLOTS}number.{name}", requires_grad=False,
                           parallel_optimizer=False)
        # Past `Cell.__setattr__`, which would make them parameters of the network.
        self.__dict__.update(gradient=gradient, number=number)
        self.add, self.tell = ops.Add(), TellRows()

    def construct(self, rows_RKW: Tensor, asked_RK: Tensor) -> Tensor:
        """asked_RK: which row of its device's shard each is, -1 where nobody reads it."""
        return self.tell(self.add(rows_RKW, self.gradient), self.number, asked_RK)

    def sharding(self) -> list[OpSharding]:
        cube: Operand = ("rows", None, None)
        return [OpSharding(self.add, (cube, cube)), OpSharding(self.tell.expand, (("rows", None),)),
                OpSharding(self.tell.cast, (("rows", None),)), OpSharding(self.tell.add, (cube, cube))]


class TellRows(nn.Cell):
    """rows_RKW; the gradient by number_RK is asked_RK."""

    def __init__(self) -> None:
        super().__init__()
        self.cast, self.expand, self.add = ops.Cast(), ops.ExpandDims(), ops.Add()

    def construct(self, rows_RKW: Tensor, number_RK: Tensor, asked_RK: Tensor) -> Tensor:
        return self.add(rows_RKW, self.expand(self.cast(number_RK, mstype.float32), -1))

    def bprop(self, rows_RKW: Tensor, number_RK: Tensor, asked_RK: Tensor, out: Tensor, gradient: Tensor) -> tuple:
        return gradient, asked_RK, ops.zeros_like(asked_RK)
