"""Mixture of experts where every token has experts of its own: route, permute, grouped matmul, unpermute.

Shapes: T tokens, B batch, D width, E experts of a token (R = E - 1 routed, one shared), A experts chosen, F inner
width of one expert, C capacity.
"""

from __future__ import annotations

import math
from typing import Literal

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.common.errors import UserError
from parallel.layers.experts.routed import CapacityExperts, DroplessExperts, routed_weight
from parallel.layers.fused import FusedSparseExperts, library
from parallel.layers.grouped import WIDTH_LAYOUT, GroupedLinear, GroupedSwiGLU, Swish, TokenLayout
from parallel.layers.parameter import parameter
from parallel.sharding.layout import Layer, Operand, OpSharding

Dispatch = Literal["auto", "grouped", "capacity", "dropless"]


def _segments(counts_TR: np.ndarray):
    """(token, expert, first row, end row) of every expert that has rows."""
    ends = np.cumsum(counts_TR, axis=1)
    for token, expert in zip(*np.nonzero(counts_TR), strict=True):
        end = int(ends[token, expert])
        yield token, expert, end - int(counts_TR[token, expert]), end


def grouped_product(x_TNI: np.ndarray, w_TRIO: np.ndarray, counts_TR: np.ndarray) -> np.ndarray:
    """Rows of each expert, one expert after the other, times that expert's weight."""
    y = np.empty((*x_TNI.shape[:2], w_TRIO.shape[-1]), x_TNI.dtype)
    for token, expert, begin, end in _segments(counts_TR):
        np.matmul(x_TNI[token, begin:end], w_TRIO[token, expert], out=y[token, begin:end])
    return y


def grouped_product_gradients(x_TNI: np.ndarray, w_TRIO: np.ndarray, counts_TR: np.ndarray,
                              dy_TNO: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of `grouped_product` by its first two arguments."""
    dx, dw = np.empty_like(x_TNI), np.zeros_like(w_TRIO)
    for token, expert, begin, end in _segments(counts_TR):
        rows, change = x_TNI[token, begin:end], dy_TNO[token, begin:end]
        np.matmul(change, w_TRIO[token, expert].T, out=dx[token, begin:end])
        np.matmul(rows.T, change, out=dw[token, expert])
    return dx, dw


def permutation(chosen_TBA: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How to bring the chosen (sample, expert) pairs of each token into the order of the experts.

    Returns: source_TN, the row of x [T B, D] that pair n of the new order reads; place_TBA, where in [T N] a pair went;
    counts_TR, pairs of each expert. N = B A.
    """
    tokens, batch, active = chosen_TBA.shape
    flat = chosen_TBA.reshape(tokens, -1)
    order = np.argsort(flat, axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(flat.shape[1])[None, :], axis=1)
    first = np.arange(tokens)[:, None]
    source = order // active + first * batch
    counts = np.stack([np.bincount(row, minlength=experts) for row in flat])
    place = (place + first * flat.shape[1]).reshape(chosen_TBA.shape)
    return source.astype(np.int32), place.astype(np.int32), counts.astype(np.int32)


class GroupedMatMul(nn.Cell):
    """y_TNO = rows of x_TNI times the weight of the expert that they belong to, w_TRIO.

    counts_TR says how many rows each expert has; rows are sorted by expert. The work is that of the rows
    there are: no padding, none dropped. On the CPU each expert's product is one call of NumPy's BLAS inside the graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = ops.Custom(grouped_product, out_shape=lambda x, w, c: (x[0], x[1], w[3]),
                                  out_dtype=lambda x, w, c: x, func_type="pyfunc")
        self.backward = ops.Custom(grouped_product_gradients, out_shape=lambda x, w, c, d: (x, w),
                                   out_dtype=lambda x, w, c, d: (x, w), func_type="pyfunc")

    def construct(self, x_TNI: Tensor, w_TRIO: Tensor, counts_TR: Tensor) -> Tensor:
        return self.forward(x_TNI, w_TRIO, counts_TR)

    def bprop(self, x_TNI: Tensor, w_TRIO: Tensor, counts_TR: Tensor, out: Tensor, dout: Tensor) -> tuple:
        dx_TNI, dw_TRIO = self.backward(x_TNI, w_TRIO, counts_TR, dout)
        return dx_TNI, dw_TRIO, ops.zeros_like(counts_TR)


class Permutation(nn.Cell):
    """`permutation` inside a graph; it has no gradient."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.plan = ops.Custom(
            lambda chosen: permutation(chosen, experts),
            out_shape=lambda s: ((s[0], s[1] * s[2]), s, (s[0], experts)),
            out_dtype=lambda s: (mstype.int32, mstype.int32, mstype.int32), func_type="pyfunc")

    def construct(self, chosen_TBA: Tensor) -> tuple:
        return self.plan(chosen_TBA)

    def bprop(self, chosen_TBA: Tensor, out: tuple, dout: tuple) -> tuple:
        return (ops.zeros_like(chosen_TBA),)


class GroupedExperts(nn.Cell):
    """y_TBD: the sum of the chosen experts' SwiGLUs of their rows times their gates, exact, for the CPU."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.plan = Permutation(experts)
        self.product1, self.product2, self.product3 = GroupedMatMul(), GroupedMatMul(), GroupedMatMul()
        self.swish = Swish((None, None, None))
        self.gather, self.reshape, self.weigh, self.total = ops.Gather(), ops.Reshape(), ops.Mul(), ops.ReduceSum()

    def construct(self, x_TBD: Tensor, chosen_TBA: Tensor, gates_TBA: Tensor, gate: Tensor, up: Tensor,
                  down: Tensor) -> Tensor:
        tokens, batch, width = x_TBD.shape
        active = chosen_TBA.shape[2]
        source_TN, place_TBA, counts_TR = self.plan(chosen_TBA)
        rows_TND = self.reshape(self.gather(self.reshape(x_TBD, (tokens * batch, width)), source_TN, 0),
                                (tokens, batch * active, width))
        inner = self.swish(self.product1(rows_TND, gate, counts_TR), self.product2(rows_TND, up, counts_TR))
        y_TND = self.product3(inner, down, counts_TR)
        y_TBAD = self.gather(self.reshape(y_TND, (tokens * batch * active, down.shape[-1])), place_TBA, 0)
        return self.total(self.weigh(y_TBAD, self.reshape(gates_TBA, (tokens, batch, active, 1))), 2)


class SparsePertokenMoE(Layer):
    """alpha * sum over the chosen of g_i Expert_i(x_t) + SharedExpert(x_t), with E experts for every token.

    Args:
        tokens: T.
        width: D.
        inner: n D, the width of the dense SwiGLU; each of the E experts has inner / E.
        experts: E, the shared one included.
        active: k, the shared one included; k - 1 of E - 1 are chosen.
        alpha: gate value scaling; None = E / k.
        layout: what tensor parallelism shards (tokens or none; an expert is not sharded further).
        dispatch: grouped (exact, CPU), capacity (static shapes), dropless (as capacity while it trains, without padding
            when it is used); auto = grouped on the CPU, elsewhere dropless in bfloat16 and capacity in other types.
        capacity_factor: see `CapacityExperts`.
        down_gain, outputs: see `GroupedSwiGLU`.

    The gate is a softmax over all routed experts; the chosen ones' are divided by their sum only if there are at least
    two. With one chosen expert that division would make it 1 whatever the router says, and the router would learn
    nothing; the paper does not say what it does there, so this was chosen here.

    Source: TokenMixer-Large eq. 19-21 (arXiv 2602.06563).
    """

    in_compute_type = ("gate_weight", "up_weight", "down_weight")

    def __init__(self, tokens: int, width: int, inner: int, *, experts: int, active: int, alpha: float | None = None,
                 layout: TokenLayout = WIDTH_LAYOUT, dispatch: Dispatch = "auto", capacity_factor: float = 1.5,
                 down_gain: float = 0.01, outputs: int | None = None, compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        outputs = outputs or width
        if not 2 <= active <= experts or inner % experts:
            raise UserError(f"needs 2 <= active <= experts, and experts must divide the inner width {inner}",
                            where="model.moe", value=f"experts {experts}, active {active}")
        self.tokens, self.width, self.inner, self.layout = tokens, width, inner // experts, layout
        self.routed, self.chosen, self.experts, self.active = experts - 1, active - 1, experts, active
        self.alpha = experts / active if alpha is None else alpha
        self.outputs = outputs
        self.shared = GroupedSwiGLU(tokens, width, self.inner, layout=layout, down_gain=down_gain, outputs=outputs,
                                    compute_dtype=compute_dtype)
        self.router = GroupedLinear(tokens, width, self.routed, layout=layout, bias=False)
        into, out = math.sqrt(6.0 / (width + self.inner)), (tokens, self.routed, self.inner, outputs)
        self.gate_weight = parameter((tokens, self.routed, width, self.inner), "uniform", into)
        self.up_weight = parameter((tokens, self.routed, width, self.inner), "uniform", into)
        self.down_weight = parameter(out, "uniform", down_gain * math.sqrt(6.0 / (outputs + self.inner)))
        on_cpu = mindspore.get_context("device_target") == "CPU"
        self.dispatch = dispatch
        if dispatch == "auto":
            self.dispatch = "grouped" if on_cpu else "dropless" if compute_dtype == mstype.bfloat16 else "capacity"
        if self.dispatch == "grouped" and not on_cpu:
            raise UserError("grouped dispatch runs Python on the host, which a device's graph cannot",
                            where="model.moe.dispatch", value="grouped", hint="leave it at auto, or take capacity")
        if self.dispatch == "grouped":
            self.run = GroupedExperts(self.routed)
        else:
            kind = DroplessExperts if self.dispatch == "dropless" else CapacityExperts
            self.run = kind(tokens, self.routed, capacity_factor, layout=layout)
        # The CPU has no grouped product; what it has instead gives the same.
        self.host = GroupedExperts(self.routed) if self.dispatch == "dropless" and on_cpu else None
        self.softmax, self.top, self.sum, self.share = ops.Softmax(-1), ops.TopK(), ops.ReduceSum(True), ops.RealDiv()
        self.scale, self.add, self.cast = ops.Mul(), ops.Add(), ops.Cast()
        self.turn, self.turn_gates, self.turn_chosen = ops.Transpose(), ops.Transpose(), ops.Transpose()
        self.compute_dtype = compute_dtype
        self.expand, self.same, self.hits = ops.ExpandDims(), ops.Equal(), ops.ReduceSum()
        self.load, self.odds, self.meet, self.product = ops.ReduceMean(), ops.ReduceMean(), ops.Mul(), ops.ReduceMean()
        kernels = library(compute_dtype) if self.dispatch == "grouped" else None
        self.fused = FusedSparseExperts(kernels, self.chosen, self.alpha) if kernels is not None else None

    def route(self, x_TBD: Tensor) -> tuple:
        """(gates_TBA float32, chosen_TBA int32)."""
        probability_TBR = self.softmax(self.cast(self.router(x_TBD), mstype.float32))
        # Batch first for TopK, which knows the mesh in that order only.
        gates_BTA, chosen_BTA = self.top(self.turn(probability_TBR, (1, 0, 2)), self.chosen)
        if self.chosen >= 2:
            gates_BTA = self.share(gates_BTA, self.sum(gates_BTA, -1))
        return self.turn_gates(gates_BTA, (1, 0, 2)), self.turn_chosen(chosen_BTA, (1, 0, 2))

    def construct(self, x_TBD: Tensor) -> Tensor:
        if self.fused is not None:
            shared = self.shared
            return self.fused(x_TBD, self.router.weight, shared.gate.weight, shared.up.weight, shared.down.weight,
                              self.gate_weight, self.up_weight, self.down_weight)
        gates_TBA, chosen_TBA = self.route(x_TBD)
        kind = self.compute_dtype
        gates_TBA = self.cast(self.scale(gates_TBA, self.alpha), kind)
        run = self.run if self.host is None or self.training else self.host
        routed_TBD = run(self.cast(x_TBD, kind), chosen_TBA, gates_TBA, self.cast(self.gate_weight, kind),
                         self.cast(self.up_weight, kind), self.cast(self.down_weight, kind))
        return self.add(routed_TBD, self.shared(x_TBD))

    def balance(self, x_TBD: Tensor) -> Tensor:
        """R sum_r f_tr P_tr, averaged over the tokens: 1 where the samples of every token are spread evenly over its
        experts, up to R where one expert gets all of a token's. f is the share of a token's choices that fell on an
        expert (without a gradient), P the mean of its probability; means go over the batch and never over the tokens,
        so that tokens which crowd on different experts do not pass for balanced ones.

        Source: Switch Transformer eq. 4 (arXiv 2101.03961), for every token by itself.
        """
        probability_TBR = self.softmax(self.cast(self.router(x_TBD), mstype.float32))
        _, chosen_BTA = self.top(self.turn(probability_TBR, (1, 0, 2)), self.chosen)
        chosen_TBA1 = self.expand(self.turn_chosen(chosen_BTA, (1, 0, 2)), -1)
        hot_TBAR = self.cast(self.same(chosen_TBA1, Tensor(np.arange(self.routed, dtype=np.int32))), mstype.float32)
        load_TR = self.load(self.hits(hot_TBAR, 2), 1)
        crowd_TR = self.meet(ops.stop_gradient(load_TR), self.odds(probability_TBR, 1))
        return self.product(crowd_TR) * (self.routed * self.routed / self.chosen)

    @property
    def flops_per_sample(self) -> int:
        """Router, the shared expert and the chosen ones; twice the multiplications."""
        one = 2 * self.tokens * (2 * self.width + self.outputs) * self.inner
        return 2 * self.tokens * self.width * self.routed + one * self.active

    def weights(self) -> dict[str, Operand]:
        """Of the routed experts, whose products belong to `CapacityExperts`."""
        return dict.fromkeys(("gate_weight", "up_weight", "down_weight"), routed_weight(self.layout))

    @property
    def idle_parameters(self) -> int:
        """Parameters of the experts that a sample does not use."""
        return (self.experts - self.active) * self.tokens * (2 * self.width + self.outputs) * self.inner

    def sharding(self) -> list[OpSharding]:
        row = (self.layout.tokens, "batch", None)
        first = ("batch", self.layout.tokens_after_batch, None)
        return [OpSharding(self.softmax, (row,)), OpSharding(self.turn, (row,)), OpSharding(self.top, (first,)),
                OpSharding(self.sum, (first,)), OpSharding(self.share, (first, first)),
                OpSharding(self.turn_gates, (first,)), OpSharding(self.turn_chosen, (first,)),
                OpSharding(self.scale, (row, ())), OpSharding(self.add, (row, row)),
                OpSharding(self.expand, (row,)), OpSharding(self.same, ((*row, None), (None,))),
                OpSharding(self.hits, ((*row, None),)), OpSharding(self.load, (row,)), OpSharding(self.odds, (row,)),
                OpSharding(self.meet, ((row[0], None),) * 2), OpSharding(self.product, ((row[0], None),))]
