"""Linear layers and feed-forward networks with weights of their own for every feature token.

Shapes: T tokens, B batch, I inputs, O outputs, D width, F inner width. Activations are token-first, [T, B, D], so that
all tokens' products are one batched matmul without a transpose.

What tensor parallelism shards is given by a `TokenLayout`:
    width         the inner width: column, then row, then AllReduce; all tokens on every device
    tokens        the tokens, between the layers too; whoever mixes tokens pays an exchange (Token Parallel)
    tokens_naive  the tokens inside the products only; between them the batch is sharded, so each network pays
                two redistributions
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from parallel.layers.activation import GELU
from parallel.layers.fused import (
    FusedAdd,
    FusedFeedForward,
    FusedLinear,
    FusedLinearWithoutBias,
    FusedSwiGLU,
    library,
)
from parallel.layers.parameter import parameter
from parallel.sharding.layout import Axes, Layer, Operand, OpSharding

TokenAxis = Literal["width", "tokens", "tokens_naive"]


@dataclass(frozen=True)
class TokenLayout:
    """Named axes of a ranker's tensors under one way to use the op axis."""

    kind: TokenAxis = "width"

    @property
    def stream(self) -> Operand:
        """[T, B, D] between the networks."""
        return {"width": (None, "batch", None), "tokens": ("feature_tokens", "batch", None),
                "tokens_naive": (None, "rows", None)}[self.kind]

    @property
    def tokens(self) -> str | None:
        """What shards T inside a product."""
        return None if self.kind == "width" else "feature_tokens"

    @property
    def width(self) -> str | None:
        """What shards the inner width inside a product."""
        return "width" if self.kind == "width" else None

    @property
    def tokens_after_batch(self) -> str | None:
        """What shards T in a batch-first tensor [B, T, ..]: the same axis, in the order that MindSpore expects."""
        return None if self.kind == "width" else "heads"

    @property
    def inner(self) -> Operand:
        """[T, B, F] inside a network."""
        return (self.tokens, "batch", self.width)


WIDTH_LAYOUT = TokenLayout("width")


class GroupedLinear(Layer):
    """y_TBO = x_TBI W_TIO + b_T1O: token t has the weight W[t].

    Args:
        tokens: T.
        inputs: I.
        outputs: O.
        layout: what tensor parallelism shards.
        style: "column" shards O and "row" shards I, where the layout shards the width; None neither.
        gain: the start is Xavier-uniform within each token, half-width gain x sqrt(6 / (I + O)).
        bias: whether there is a bias (starts at 0).
        compute_dtype: type of the matmul; the weight is stored in float32 and cast.

    Source: RankMixer eq. 6-9 (arXiv 2507.15551).
    """

    in_compute_type = ("weight", "bias")

    def __init__(self, tokens: int, inputs: int, outputs: int, *, layout: TokenLayout = WIDTH_LAYOUT,
                 style: Literal["column", "row"] | None = None, gain: float = 1.0, bias: bool = True,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.tokens, self.inputs, self.outputs = tokens, inputs, outputs
        self.layout, self.style, self.has_bias, self.compute_dtype = layout, style, bias, compute_dtype
        self.weight = parameter((tokens, inputs, outputs), "uniform", gain * math.sqrt(6.0 / (inputs + outputs)))
        self.bias = parameter((tokens, 1, outputs), "zeros", shard_optimizer=False) if bias else None
        self.matmul, self.add, self.cast = ops.BatchMatMul(), ops.Add(), ops.Cast()
        kernels = library(compute_dtype)
        self.fused = None if kernels is None else (FusedLinear if bias else FusedLinearWithoutBias)(kernels)

    def construct(self, x_TBI: Tensor) -> Tensor:
        if self.fused is not None:
            return self.fused(x_TBI, self.weight, self.bias) if self.has_bias else self.fused(x_TBI, self.weight)
        y_TBO = self.matmul(self.cast(x_TBI, self.compute_dtype), self.cast(self.weight, self.compute_dtype))
        if self.has_bias:
            y_TBO = self.add(y_TBO, self.cast(self.bias, self.compute_dtype))
        return y_TBO

    @property
    def flops_per_sample(self) -> int:
        """Two for each multiplication and addition of the product."""
        return 2 * self.tokens * self.inputs * self.outputs

    def redistributes(self, axes: Axes) -> bool:
        return self.layout.kind == "tokens_naive" and axes.sizes["feature_tokens"] > 1

    def sharding(self) -> list[OpSharding]:
        tokens, width = self.layout.tokens, self.layout.width
        column, row = (width if self.style == "column" else None), (width if self.style == "row" else None)
        return [OpSharding(self.matmul, ((tokens, "batch", row), (tokens, row, column)), weights=(None, "weight")),
                OpSharding(self.add, ((tokens, "batch", column), (tokens, None, column)), weights=(None, "bias"))]

class GroupedFeedForward(Layer):
    """GELU(x W1 + b1) W2 + b2 with weights for each token (RankMixer eq. 6-9).

    Args:
        tokens: T.
        width: D.
        inner: F = k D.
        layout: what tensor parallelism shards.
        outputs: width of the result; None = D.
    """

    def __init__(self, tokens: int, width: int, inner: int, *, layout: TokenLayout = WIDTH_LAYOUT,
                 outputs: int | None = None, compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.mapping = GroupedLinear(tokens, width, inner, layout=layout, style="column", compute_dtype=compute_dtype)
        self.gelu = GELU("tanh", layout.inner)
        self.projection = GroupedLinear(tokens, inner, outputs or width, layout=layout, style="row",
                                        compute_dtype=compute_dtype)
        kernels = library(compute_dtype)
        self.fused = FusedFeedForward(kernels) if kernels is not None else None

    def construct(self, x_TBD: Tensor) -> Tensor:
        if self.fused is not None:
            return self.fused(x_TBD, self.mapping.weight, self.mapping.bias, self.projection.weight,
                              self.projection.bias)
        return self.projection(self.gelu(self.mapping(x_TBD)))


class Swish(Layer):
    """x sigmoid(x) * y: the gate of a SwiGLU.

    Args:
        wide: named axes that shard the inputs' dims.
    """

    def __init__(self, wide: Operand) -> None:
        super().__init__()
        self.wide = wide
        self.sigmoid, self.gate, self.product = ops.Sigmoid(), ops.Mul(), ops.Mul()

    def construct(self, x_TBF: Tensor, y_TBF: Tensor) -> Tensor:
        return self.product(self.gate(x_TBF, self.sigmoid(x_TBF)), y_TBF)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.sigmoid, (self.wide,)), OpSharding(self.gate, (self.wide, self.wide)),
                OpSharding(self.product, (self.wide, self.wide))]


class GroupedSwiGLU(Layer):
    """FC_down(Swish(FC_gate(x)) * FC_up(x)) with weights for each token.

    Args:
        tokens: T (mixed tokens in the first half of a block).
        width: D.
        inner: F = n D.
        layout: what tensor parallelism shards.
        down_gain: gain of the last matrix's start; TokenMixer-Large takes 0.01 (its Table 14).
        bias: TokenMixer-Large removes it.
        outputs: width of the result; None = D.

    Source: TokenMixer-Large eq. 17-18 (arXiv 2602.06563).
    """

    def __init__(self, tokens: int, width: int, inner: int, *, layout: TokenLayout = WIDTH_LAYOUT,
                 down_gain: float = 0.01, bias: bool = False, outputs: int | None = None,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        shared = {"layout": layout, "bias": bias, "compute_dtype": compute_dtype}
        self.gate = GroupedLinear(tokens, width, inner, style="column", **shared)
        self.up = GroupedLinear(tokens, width, inner, style="column", **shared)
        self.down = GroupedLinear(tokens, inner, outputs or width, style="row", gain=down_gain, **shared)
        self.swish = Swish(layout.inner)
        kernels = library(compute_dtype) if not bias else None
        self.fused = FusedSwiGLU(kernels) if kernels is not None else None

    def construct(self, x_TBD: Tensor) -> Tensor:
        if self.fused is not None:
            return self.fused(x_TBD, self.gate.weight, self.up.weight, self.down.weight)
        return self.down(self.swish(self.gate(x_TBD), self.up(x_TBD)))


class Add(Layer):
    """x + y, sharded alike.

    Args:
        stream: named axes that shard the dims.
    """

    def __init__(self, stream: Operand) -> None:
        super().__init__()
        self.stream, self.add = stream, ops.Add()
        kernels = library(mstype.float32)
        self.fused = FusedAdd(kernels) if kernels is not None else None

    def construct(self, x: Tensor, y: Tensor) -> Tensor:
        if self.fused is not None and x.dtype == mstype.float32 and x.shape == y.shape:
            return self.fused(x, y)
        return self.add(x, y)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.add, (self.stream, self.stream))]
