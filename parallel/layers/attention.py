"""Multi-head attention, sharded by heads over the op axis.

Shapes: B batch, S sequence, D width, H heads, K = D / H head width, N = B S tokens.
"""

from __future__ import annotations

import functools
import math

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.common.errors import UserError
from parallel.layers.dropout import Dropout
from parallel.layers.linear import Linear
from parallel.sharding.layout import Layer, OpSharding

MASKED = -10000.0


class AttentionBias(Layer):
    """bias_B1SS = (1 - visible) * -10000: what is added to the scores, made once for all layers.

    It takes documents_BS int32, the number of each position's document: a position sees those before it, and itself,
    in its own document. So the host sends S numbers a sample and not S x S. It also takes the mask itself, mask_BSS
    (1 = visible, 0 = hidden), for masks of another kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.invert, self.weigh = ops.ExpandDims(), ops.Sub(), ops.Mul()
        self.own, self.other = ops.ExpandDims(), ops.ExpandDims()
        self.same, self.both = ops.Equal(), ops.LogicalAnd()
        self.cast = ops.Cast()

    def construct(self, visible: Tensor) -> Tensor:
        if visible.ndim == 2:
            visible = self.mask(visible)
        visible_B1SS = self.expand(self.cast(visible, mstype.float32), 1)
        return self.weigh(self.invert(1.0, visible_B1SS), MASKED)

    def mask(self, documents_BS: Tensor) -> Tensor:
        """bool [B, S, S]: same document, and not after."""
        same_BSS = self.same(self.own(documents_BS, 2), self.other(documents_BS, 1))
        return self.both(same_BSS, lower_triangle(documents_BS.shape[1]))

    def sharding(self) -> list[OpSharding]:
        plane = ("batch", None, None, None)
        square, row, column = ("batch", None, None), ("batch", None), (None, None, None)
        return [OpSharding(self.own, (row,)), OpSharding(self.other, (row,)), OpSharding(self.same, (square, square)),
                OpSharding(self.both, (square, column)), OpSharding(self.expand, (square,)),
                OpSharding(self.invert, ((), plane)), OpSharding(self.weigh, (plane, ()))]


@ops.constexpr
def lower_triangle(length: int) -> Tensor:
    """bool [1, S, S], a constant of the graph: True where the column is not after the row."""
    return _lower_triangle(length)


@functools.cache
def _lower_triangle(length: int) -> Tensor:
    # One tensor for all layers, so that the compiler and the planner see the same mask everywhere.
    return Tensor(np.tri(length, dtype=bool)[None])


class AttentionCore(Layer):
    """softmax(q k^T / sqrt(K) + bias) v for every head, without the projections.

    Args:
        head_width: K.
        dropout: rate on the probabilities.
        softmax_dtype: float32 as the released code, float16 as its later default.

    The paper prints sqrt(D); all code divides by sqrt(K), and so does this. The division is done on q, which is K/S
    the work and keeps float16 scores small.
    """

    def __init__(self, head_width: int, *, dropout: float, softmax_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.factor, self.softmax_dtype = 1.0 / math.sqrt(head_width), softmax_dtype
        self.scale, self.mask, self.softmax = ops.Mul(), ops.Add(), ops.Softmax(axis=-1)
        self.rows = RowSoftmax() if mindspore.get_context("device_target") == "CPU" else None
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.cast = ops.Cast()
        self.dropout = Dropout(dropout, ("batch", "heads", None, None))

    def construct(self, query_BHSK: Tensor, key_BHSK: Tensor, value_BHSK: Tensor, bias_B1SS: Tensor,
                  keys: tuple[Tensor, Tensor] | None = None) -> Tensor:
        score_BHSS = self.scores(self.scale(query_BHSK, self.factor), key_BHSK)
        score_BHSS = self.mask(self.cast(score_BHSS, self.softmax_dtype), self.cast(bias_B1SS, self.softmax_dtype))
        weight_BHSS = self.rows(score_BHSS) if self.rows is not None else self.softmax(score_BHSS)
        weight_BHSS = self.dropout(self.cast(weight_BHSS, value_BHSK.dtype), keys)
        return self.mix(weight_BHSS, value_BHSK)

    def sharding(self) -> list[OpSharding]:
        heads = ("batch", "heads", None, None)
        return [OpSharding(self.scale, (heads, ())), OpSharding(self.scores, (heads, heads)),
                OpSharding(self.softmax, (heads,)), OpSharding(self.mask, (heads, ("batch", None, None, None))),
                OpSharding(self.mix, (heads, heads))]


class RowSoftmax(nn.Cell):
    """Softmax over the last dim with the gradient p (g - sum(p g)) written by hand.

    The sum is a product with a column of ones: on the CPU MindSpore's ReduceSum over 2 million scores takes 7 ms, the
    product 1 ms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.softmax, self.matmul = ops.Softmax(axis=-1), ops.MatMul()

    def construct(self, x: Tensor) -> Tensor:
        return self.softmax(x)

    def bprop(self, x: Tensor, p: Tensor, gradient: Tensor) -> tuple[Tensor]:
        shape = p.shape
        p_MS, gradient_MS = ops.reshape(p, (-1, shape[-1])), ops.reshape(gradient, (-1, shape[-1]))
        sum_M1 = self.matmul(p_MS * gradient_MS, ops.ones((shape[-1], 1), p.dtype))
        return (ops.reshape(p_MS * (gradient_MS - sum_M1), shape),)


class Attention(Layer):
    """Multi-head attention with query, key, value and output projections, biases on all four.

    Args:
        width: D.
        heads: H, a divisor of D.
        qkv_std: sigma of the three input projections.
        output_std: sigma of the output projection.
        dropout: rate on the probabilities.
        compute_dtype: type of the matmuls.
        softmax_dtype: type of the softmax.

    Raises:
        UserError: H does not divide D.

    Source: PanGu-alpha eq. 2, 3 and 5; the query layer calls it with another query input than key and value input.
    """

    def __init__(self, width: int, heads: int, *, qkv_std: float, output_std: float, dropout: float,
                 compute_dtype: mstype = mstype.float32, softmax_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"heads must divide hidden_size {width}", where="model.heads", value=heads)
        self.width, self.heads, self.head_width = width, heads, width // heads
        column = {"style": "column", "std": qkv_std, "compute_dtype": compute_dtype}
        self.query = Linear(width, width, **column)
        self.key = Linear(width, width, **column)
        self.value = Linear(width, width, **column)
        self.output = Linear(width, width, style="row", std=output_std, compute_dtype=compute_dtype)
        self.core = AttentionCore(self.head_width, dropout=dropout, softmax_dtype=softmax_dtype)
        self.reshape, self.split_heads, self.merge_heads = ops.Reshape(), ops.Transpose(), ops.Transpose()

    def construct(self, query_ND: Tensor, memory_ND: Tensor, bias_B1SS: Tensor,
                  keys: tuple[Tensor, Tensor] | None = None) -> Tensor:
        batch = bias_B1SS.shape[0]
        query_BHSK = self.to_heads(self.query(query_ND), batch)
        key_BHSK = self.to_heads(self.key(memory_ND), batch)
        value_BHSK = self.to_heads(self.value(memory_ND), batch)
        return self.output(self.from_heads(self.core(query_BHSK, key_BHSK, value_BHSK, bias_B1SS, keys)))

    def to_heads(self, x_ND: Tensor, batch: int) -> Tensor:
        """[N, D] -> [B, H, S, K]."""
        return self.split_heads(self.reshape(x_ND, (batch, -1, self.heads, self.head_width)), (0, 2, 1, 3))

    def from_heads(self, x_BHSK: Tensor) -> Tensor:
        """[B, H, S, K] -> [N, D]."""
        return self.reshape(self.merge_heads(x_BHSK, (0, 2, 1, 3)), (-1, self.width))

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.split_heads, (("batch", None, "heads", None),)),
                OpSharding(self.merge_heads, (("batch", "heads", None, None),))]
