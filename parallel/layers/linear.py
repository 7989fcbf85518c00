"""Linear layers, column- or row-parallel over the op axis.

Shapes: N tokens (batch x sequence, flattened), I inputs, O outputs.
"""

from __future__ import annotations

from typing import Literal

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from parallel.layers.parameter import parameter
from parallel.sharding.layout import Axes, Layer, OpSharding


class Linear(Layer):
    """y_NO = x_NI W_OI^T + b_O.

    Args:
        inputs: I.
        outputs: O.
        style: "column" shards O over `axis` (the input is replicated, the output sharded, no communication forward);
            "row" shards I (the input is sharded, the output summed by AllReduce, or ReduceScatter under sequence
            parallelism); None leaves the weight unsharded.
        axis: the named axis.
        std: sigma of the weight's normal start.
        bias: whether there is a bias (starts at 0).
        rows: of x for one sample (positions of a list); only counts FLOPs.
        compute_dtype: type of the matmul; the weight is stored in float32 and cast.

    Source: PanGu-alpha section 4 and Fig. 7 (strategies ((dp,1),(mp,1)) and ((dp,mp),(1,mp))).
    """

    in_compute_type = ("weight", "bias")

    def __init__(self, inputs: int, outputs: int, *, style: Literal["column", "row"] | None, std: float,
                 axis: str = "width", bias: bool = True, rows: int = 1, compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.inputs, self.outputs, self.style, self.axis = inputs, outputs, style, axis
        self.rows, self.compute_dtype = rows, compute_dtype
        self.weight = parameter((outputs, inputs), "normal", std)
        # After a row-parallel product every device of the op axis adds the same full bias, which is not worth sharding.
        self.bias = parameter((outputs,), "zeros", shard_optimizer=style != "row") if bias else None
        self.has_bias = bias
        self.matmul = ops.MatMul(transpose_b=True)
        self.add = ops.Add()
        self.cast = ops.Cast()

    def construct(self, x_NI: Tensor) -> Tensor:
        y_NO = self.matmul(self.cast(x_NI, self.compute_dtype), self.cast(self.weight, self.compute_dtype))
        if self.has_bias:
            y_NO = self.add(y_NO, self.cast(self.bias, self.compute_dtype))
        return y_NO

    @property
    def flops_per_sample(self) -> int:
        """Two for each multiplication and addition of the product."""
        return 2 * self.rows * self.inputs * self.outputs

    def redistributes(self, axes: Axes) -> bool:
        return axes.sequence and self.style == "column"  # from the sharded residual stream

    def sharding(self) -> list[OpSharding]:
        column, row = (self.axis if self.style == "column" else None), (self.axis if self.style == "row" else None)
        after = "residual" if self.style == "row" else "tokens"
        summed = (("residual", None),) if self.style == "row" else None
        return [OpSharding(self.matmul, (("tokens", row), (column, row)), summed, (None, "weight")),
                OpSharding(self.add, ((after, column), (column,)), weights=(None, "bias"))]

