"""Low-rank adapters beside linear layers (LoRA, arXiv 2106.09685, section 4.1).

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math

from mindspore import Tensor, nn, ops

from parallel.checkpoint.adapter_names import DOWN, UP, is_adapter
from parallel.layers.linear import Linear
from parallel.layers.parameter import parameter
from parallel.sharding.layout import OpSharding


class AdaptedLinear(Linear):
    """y_NO = x_NI W_OI^T + b_O + (alpha / R) (x_NI D_RI^T) U_OR^T, where W and b stay as they are.

    D starts normal with sigma 1 / sqrt(I) and U at 0, so an adapter begins as no change (the paper's choice). A column
    style shards U by column, a row style D by row; the small product between them is then summed over the op axis.

    Args:
        linear: the layer that is adapted; its parameters become this one's, names included, and are frozen.
        rank: R.
        alpha: strength; the change is multiplied by alpha / R.
    """

    in_compute_type = ("weight", "bias", DOWN, UP)

    def __init__(self, linear: Linear, rank: int, alpha: float) -> None:
        nn.Cell.__init__(self)
        self.inputs, self.outputs, self.style, self.axis = linear.inputs, linear.outputs, linear.style, linear.axis
        self.rows, self.compute_dtype, self.has_bias = linear.rows, linear.compute_dtype, linear.has_bias
        self.factor = alpha / rank
        name = linear.weight.name
        self.weight, self.bias = linear.weight, linear.bias
        self.adapter_down = parameter((rank, linear.inputs), "normal", 1.0 / math.sqrt(linear.inputs))
        self.adapter_up = parameter((linear.outputs, rank), "zeros", shard_optimizer=linear.style == "column")
        self.adapter_down.name = f"{name.removesuffix('weight')}{DOWN}"
        self.adapter_up.name = f"{name.removesuffix('weight')}{UP}"
        for frozen in (self.weight, self.bias):
            if frozen is not None:
                frozen.requires_grad = False
        self.matmul, self.add, self.cast = ops.MatMul(transpose_b=True), ops.Add(), ops.Cast()
        self.down, self.up = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)
        self.scale, self.join = ops.Mul(), ops.Add()

    def construct(self, x_NI: Tensor) -> Tensor:
        x_NI = self.cast(x_NI, self.compute_dtype)
        y_NO = self.matmul(x_NI, self.cast(self.weight, self.compute_dtype))
        low_NR = self.down(x_NI, self.cast(self.adapter_down, self.compute_dtype))
        change_NO = self.up(low_NR, self.cast(self.adapter_up, self.compute_dtype))
        y_NO = self.join(y_NO, self.scale(change_NO, self.cast(self.factor, self.compute_dtype)))
        if self.has_bias:
            y_NO = self.add(y_NO, self.cast(self.bias, self.compute_dtype))
        return y_NO

    def sharding(self) -> list[OpSharding]:
        column, row = (self.axis if self.style == "column" else None), (self.axis if self.style == "row" else None)
        after, summed = ("tokens", column), None
        if self.style == "row":
            after, summed = ("residual", None), (("residual", None),)
        return [OpSharding(self.matmul, (("tokens", row), (column, row)), summed, (None, "weight")),
                OpSharding(self.down, (("tokens", row), (None, row)), weights=(None, DOWN)),
                OpSharding(self.up, (("tokens", None), (column, None)), weights=(None, UP)),
                OpSharding(self.scale, (after, ())), OpSharding(self.join, (after, after)),
                OpSharding(self.add, (after, (column,)), weights=(None, "bias"))]

def add_adapters(network: nn.Cell, targets: frozenset[str], rank: int, alpha: float) -> list[str]:
    """Freezes every parameter of `network` and puts adapters beside its linear layers of the names `targets`.

    Returns:
        names of the adapters' parameters.
    """
    for item in network.get_parameters():
        item.requires_grad = False
    found = [(parent, name, child) for _, parent in network.cells_and_names()
             for name, child in parent.name_cells().items() if name in targets and type(child) is Linear]
    for parent, name, child in found:
        adapted = AdaptedLinear(child, rank, alpha)
        # Not by setattr, which would put the parent's prefix in front of names that are complete.
        parent._cells[name] = adapted  # noqa: SLF001
    return [item.name for item in network.get_parameters() if is_adapter(item.name)]
