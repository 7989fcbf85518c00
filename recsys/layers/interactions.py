"""Interactions between feature fields, batch-first: what the comparators are made of.

Shapes: B batch, F fields, W embedding width, D width, H attention heads.
"""

from __future__ import annotations

import math

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.common.errors import UserError
from parallel.layers.norm import LayerNorm
from parallel.layers.parameter import needs_one_type, parameter
from parallel.sharding.layout import Layer, OpSharding
from recsys.data.features import FeatureSpec
from recsys.layers.embedding import Join, group_widths
from recsys.ranker import MLP, Ranker, dense
from recsys.settings import RankerSettings

CUBE = ("batch", None, None)


class Fields(nn.Cell):
    """x_BFW: one vector a feature, all of one width.

    Raises:
        UserError: the features have different widths, or one has none of its own.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        widths = {spec.width(f.name) for f in spec.ordered if not (f.is_list and f.pooling == "none")}
        if len(widths) != 1:
            raise UserError("this model needs features of one embedding width", where="data.features",
                            value=sorted(widths))
        self.width = widths.pop()
        self.count = sum(group_widths(spec).values()) // self.width
        self.join, self.reshape = Join(len(group_widths(spec))), ops.Reshape()

    def construct(self, *groups: Tensor) -> Tensor:
        return self.reshape(self.join(*groups), (-1, self.count, self.width))


class Flat(nn.Cell):
    """[B, F W] from [B, F, W]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.reshape = size, ops.Reshape()

    def construct(self, x_BFW: Tensor) -> Tensor:
        return self.reshape(x_BFW, (-1, self.size))


class Cross(Layer):
    """x0 * (W x + b) + x, with W = U V of rank `rank` or full (DCN-V2, arXiv 2008.13535, eq. 1-2)."""

    def __init__(self, width: int, rank: int | None, compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.low = rank is not None
        self.down = dense(width, rank, compute_dtype, bias=False) if self.low else None
        self.up = dense(rank or width, width, compute_dtype)
        self.times, self.plus = ops.Mul(), ops.Add()

    def construct(self, x0_BE: Tensor, x_BE: Tensor) -> Tensor:
        inner = self.down(x_BE) if self.low else x_BE
        return self.plus(self.times(x0_BE, self.up(inner)), x_BE)

    def sharding(self) -> list[OpSharding]:
        flat = ("batch", None)
        return [OpSharding(self.times, (flat, flat)), OpSharding(self.plus, (flat, flat))]


class FieldLinear(Layer):
    """y_BGW = W_GF x_BFW: new fields as weighted sums of the old ones (Wukong's linear compression).

    Args:
        inputs, outputs: F and G.
        rows: W.
        compute_dtype: type of the product.
    """

    in_compute_type = ("weight",)

    def __init__(self, inputs: int, outputs: int, rows: int, compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.compute_dtype, self.cast = compute_dtype, ops.Cast()
        self.weight = parameter((outputs, inputs), "normal", math.sqrt(2.0 / (inputs + outputs)))
        self.size = 2 * inputs * outputs * rows
        self.transpose, self.back, self.matmul = ops.Transpose(), ops.Transpose(), ops.MatMul(transpose_b=True)
        self.reshape = ops.Reshape()

    def construct(self, x_BFW: Tensor) -> Tensor:
        _, fields, width = x_BFW.shape
        x_NF = self.reshape(self.transpose(x_BFW, (0, 2, 1)), (-1, fields))
        y_NG = self.matmul(self.cast(x_NF, self.compute_dtype), self.cast(self.weight, self.compute_dtype))
        return self.back(self.reshape(y_NG, (-1, width, self.weight.shape[0])), (0, 2, 1))

    @property
    def flops_per_sample(self) -> int:
        return self.size

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.transpose, (CUBE,)), OpSharding(self.back, (CUBE,)),
                OpSharding(self.matmul, (("tokens", None), (None, None)))]


class Attend(Layer):
    """softmax(q k^T * scale [+ bias]) v for [B, H, F, K] operands; the queries may be fewer than the keys."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scores, self.mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
        self.softmax, self.scale, self.times, self.plus = ops.Softmax(-1), scale, ops.Mul(), ops.Add()
        self.casts = needs_one_type()

    def construct(self, q_BHQK: Tensor, k_BHFK: Tensor, v_BHFK: Tensor, bias_B11F: Tensor | None = None) -> Tensor:
        scale = ops.cast(self.scale, q_BHQK.dtype) if self.casts else self.scale
        scores = self.times(self.scores(q_BHQK, k_BHFK), scale)
        if bias_B11F is not None:
            scores = self.plus(scores, bias_B11F)
        # A float32 bias has made the scores float32.
        return self.mix(ops.cast(self.softmax(scores), v_BHFK.dtype), v_BHFK)

    def sharding(self) -> list[OpSharding]:
        plane = ("batch", None, None, None)
        return [OpSharding(self.scores, (plane, plane)), OpSharding(self.mix, (plane, plane)),
                OpSharding(self.softmax, (plane,)), OpSharding(self.times, (plane, ())),
                OpSharding(self.plus, (plane, plane))]


class Heads(Layer):
    """[B, F, H K] to [B, H, F, K] and back."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.reshape, self.apart, self.together = heads, ops.Reshape(), ops.Transpose(), ops.Transpose()

    def construct(self, x: Tensor, back: bool = False) -> Tensor:
        if back:
            batch, heads, fields, size = x.shape
            return self.reshape(self.together(x, (0, 2, 1, 3)), (batch, fields, heads * size))
        batch, fields, width = x.shape
        return self.apart(self.reshape(x, (batch, fields, self.heads, width // self.heads)), (0, 2, 1, 3))

    def sharding(self) -> list[OpSharding]:
        plane = ("batch", None, None, None)
        return [OpSharding(self.apart, (plane,)), OpSharding(self.together, (plane,))]


class PositionLinear(nn.Cell):
    """One linear layer at every position of [B, F, I]."""

    def __init__(self, inputs: int, outputs: int, rows: int, compute_dtype: mstype = mstype.float32, *,
                 bias: bool = True) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.linear = dense(inputs, outputs, compute_dtype, bias=bias, rows=rows)
        self.reshape = ops.Reshape()

    def construct(self, x_BFI: Tensor) -> Tensor:
        fields = x_BFI.shape[1]
        return self.reshape(self.linear(self.reshape(x_BFI, (-1, self.inputs))), (-1, fields, self.outputs))


class CubeNorm(nn.Cell):
    """LayerNorm over the last dim of [B, F, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width, stream=CUBE)

    def construct(self, x_BFW: Tensor) -> Tensor:
        return self.norm(x_BFW)


class AddRelu(Layer):
    """relu(x + y) or x + y, batch-first."""

    def __init__(self, dims: int, relu: bool = False) -> None:
        super().__init__()
        self.stream, self.with_relu = ("batch",) + (None,) * (dims - 1), relu
        self.add, self.relu = ops.Add(), ops.ReLU()

    def construct(self, x: Tensor, y: Tensor) -> Tensor:
        total = self.add(x, y)
        return self.relu(total) if self.with_relu else total

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.add, (self.stream, self.stream)), OpSharding(self.relu, (self.stream,))]


class InteractionRanker(Ranker):
    """hidden = MLP(flatten(layers(fields))): what models of stacked field interactions share; a model's file calls
    `make_stack`."""

    def __init__(self, settings: RankerSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        self.fields = Fields(spec)

    def make_stack(self, layers: list[nn.Cell], size: int, hidden: list[int]) -> None:
        """Takes layers [B, F, W] -> [B, F', W'], of which the last makes F' W' = `size`, and makes what follows: an MLP
        of the widths `hidden`, and the heads."""
        self.layers = nn.CellList(layers)
        self.flat = Flat(size)
        self.network = MLP([size, *hidden], self.compute_dtype)
        self.make_head(hidden[-1] if hidden else size)

    def represent(self, groups: tuple, sequences: tuple) -> tuple:
        x_BFW = self.fields(*groups)
        for layer in self.layers:
            x_BFW = layer(x_BFW)
        return self.network(self.flat(x_BFW)), (), ()

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]]:
        return [[self.embedding, self.drop, self.fields], *self.layers, [self.flat, self.network, self.head]]
