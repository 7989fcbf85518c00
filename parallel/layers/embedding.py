"""Embedding tables. Shapes: V rows (vocabulary or positions), D width, B batch, S sequence, N = B S tokens."""

from __future__ import annotations

from mindspore import Tensor, ops

from parallel.layers.parameter import parameter
from parallel.sharding.layout import Axes, Layer, OpSharding


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
