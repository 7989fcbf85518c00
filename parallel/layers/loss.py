"""Losses. Shapes: N tokens, V vocabulary."""

from __future__ import annotations

import mindspore
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.sharding.layout import Layer, OpSharding


class CrossEntropy(Layer):
    """nll_N = log sum exp(logits_NV) - logits_N[labels_N], in float32.

    Args:
        axis: "vocabulary" where the logits are sharded over V by the op axis, else None.

    Source: PanGu-alpha eq. 6; the code's log(softmax + 1e-24) is the same but for underflow, which this form has not.

    On the CPU, where nothing is sharded, `SoftmaxCrossEntropy` replaces it: the written-out form passes over the
    logits some fifteen times (measured at N 1024, V 40000, forward and backward: 681 ms against 75 ms).
    """

    def __init__(self, vocabulary: int, *, axis: str | None = None) -> None:
        super().__init__()
        self.vocabulary, self.axis = vocabulary, axis
        self.max, self.sum, self.pick = ops.ReduceMax(keep_dims=True), ops.ReduceSum(), ops.ReduceSum()
        self.shift, self.exp, self.log = ops.Sub(), ops.Exp(), ops.Log()
        self.one_hot, self.select, self.subtract = ops.OneHot(), ops.Mul(), ops.Sub()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)
        self.cast = ops.Cast()
        self.full = SoftmaxCrossEntropy() if mindspore.get_context("device_target") == "CPU" else None

    def construct(self, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        logits_NV = self.cast(logits_NV, mstype.float32)
        if self.full is not None:
            return self.full(logits_NV, labels_N)
        shifted_NV = self.shift(logits_NV, ops.stop_gradient(self.max(logits_NV, -1)))
        log_total_N = self.log(self.sum(self.exp(shifted_NV), -1))
        chosen_NV = self.one_hot(labels_N, self.vocabulary, self.on, self.off)
        return self.subtract(log_total_N, self.pick(self.select(shifted_NV, chosen_NV), -1))

    def sharding(self) -> list[OpSharding]:
        wide, narrow, rows = ("tokens", self.axis), ("tokens", None), ("tokens",)
        return [OpSharding(self.max, (wide,)), OpSharding(self.sum, (wide,)), OpSharding(self.pick, (wide,)),
                OpSharding(self.exp, (wide,)), OpSharding(self.shift, (wide, narrow)), OpSharding(self.log, (rows,)),
                OpSharding(self.one_hot, (wide, (), ())), OpSharding(self.select, (wide, wide)),
                OpSharding(self.subtract, (rows, rows))]


class SoftmaxCrossEntropy(nn.Cell):
    """nll_N = -log(softmax(logits_NV)[labels_N] + 1e-38), with its gradient softmax - one_hot written by hand.

    The constant is the smallest normal float32: the value (not the gradient) ends at 87.3 nats.
    """

    TINY = 1.2e-38

    def __init__(self) -> None:
        super().__init__()
        self.softmax = ops.Softmax(-1)

    def construct(self, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        chosen_N1 = ops.gather_d(self.softmax(logits_NV), 1, ops.reshape(labels_N, (-1, 1)))
        return ops.neg(ops.log(ops.reshape(chosen_N1, (-1,)) + self.TINY))

    def bprop(self, logits_NV: Tensor, labels_N: Tensor, nll_N: Tensor, gradient_N: Tensor) -> tuple[Tensor, Tensor]:
        # The compiler finds the forward softmax again, so it is computed once.
        softmax_NV, labels_N1 = self.softmax(logits_NV), ops.reshape(labels_N, (-1, 1))
        chosen_N1 = ops.gather_d(softmax_NV, 1, labels_N1)
        difference_NV = ops.tensor_scatter_elements(softmax_NV, labels_N1, chosen_N1 - 1.0, 1)
        return difference_NV * ops.reshape(gradient_N, (-1, 1)), ops.zeros_like(labels_N)


class TiedCrossEntropy(nn.Cell):
    """nll_N of labels under the logits of a tied head, with the gradients of head and softmax written by hand together.

    d hidden = g (p table - table[labels]) and d table = p^T (g hidden), less g hidden in the rows of the labels, with
    p_NV the softmax and g_N the gradient of nll: two matmuls and nothing else of size N V, where `SoftmaxCrossEntropy`
    would copy p to take 1 from its labels and multiply it by g (N 2048, V 40,000: 330 MB each).

    Inputs: logits_NV without gradient (`stop_gradient` of the head's), hidden_ND and table_VD that they were made of,
    labels_N. For one device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = SoftmaxCrossEntropy()
        self.matmul, self.transposed = ops.MatMul(), ops.MatMul(transpose_a=True)

    def construct(self, logits_NV: Tensor, hidden_ND: Tensor, table_VD: Tensor, labels_N: Tensor) -> Tensor:
        return self.value(logits_NV, labels_N)

    def bprop(self, logits_NV: Tensor, hidden_ND: Tensor, table_VD: Tensor, labels_N: Tensor, nll_N: Tensor,
              gradient_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        softmax_NV, gradient_N1 = self.value.softmax(logits_NV), ops.reshape(gradient_N, (-1, 1))
        weighed_ND = hidden_ND * gradient_N1
        hidden_gradient_ND = (self.matmul(softmax_NV, table_VD) - ops.gather(table_VD, labels_N, 0)) * gradient_N1
        table_gradient_VD = ops.tensor_scatter_sub(self.transposed(softmax_NV, weighed_ND),
                                                   ops.reshape(labels_N, (-1, 1)), weighed_ND)
        # Nobody asks for the gradient of the logits, so the zeros are never made.
        return ops.zeros_like(logits_NV), hidden_gradient_ND, table_gradient_VD, ops.zeros_like(labels_N)


class MaskedMean(Layer):
    """sum(value_N * mask_N) / (sum(mask_N) + 1e-5).

    Returns `(mean, weight)`, scalars; the weight is the sum of the mask, by which a training step averages over
    micro-batches and processes.
    """

    EPSILON = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.weigh, self.divide, self.add = ops.Mul(), ops.RealDiv(), ops.Add()
        self.total, self.count = ops.ReduceSum(), ops.ReduceSum()

    def construct(self, value_N: Tensor, mask_N: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.count(mask_N)
        return self.divide(self.total(self.weigh(value_N, mask_N)), self.add(weight, self.EPSILON)), weight

    def sharding(self) -> list[OpSharding]:
        rows = ("tokens",)
        return [OpSharding(self.weigh, (rows, rows)), OpSharding(self.total, (rows,)), OpSharding(self.count, (rows,)),
                OpSharding(self.add, ((), ())), OpSharding(self.divide, ((), ()))]
