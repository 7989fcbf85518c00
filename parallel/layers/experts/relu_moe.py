"""Mixture of experts with ReLU gates for every token: dense training, sparse inference, a budget held by a penalty.

Shapes: T tokens, B batch, D width, E experts, F inner width of all experts together.
"""

from __future__ import annotations

from typing import Literal

import mindspore
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from parallel.common.errors import UserError
from parallel.layers.activation import GELU
from parallel.layers.experts.open_rows import OpenExperts
from parallel.layers.fused import FusedGatedExperts, library
from parallel.layers.grouped import WIDTH_LAYOUT, GroupedLinear, TokenLayout
from parallel.layers.parameter import parameter
from parallel.sharding.layout import Layer, OpSharding


class ReluMoE(Layer):
    """v = sum_j G_j e_j(s), G = ReLU(h(s)), e_j(s) = GELU(s W1_j + b1_j) W2_j + b2_j.

    All E experts of a token together are one network of inner width F whose parts are scaled by their gates; a gate of
    0 takes its expert out exactly. On the CPU (`FusedGatedExperts`) the work of such experts is not done, in training
    and inference alike, nor does it change a gradient; elsewhere everything is one batched matmul, or, where it is
    used and `dispatch` says so, what `OpenExperts` does.

    Args:
        tokens, width, inner: T, D, F; E must divide F.
        experts: E.
        router: "dtsi" has two routers: training mixes with (G_train + G_infer) / 2, so both get the task's gradient,
        the
            penalty falls on G_infer alone, and evaluation takes G_infer alone. "single_relu" has one.
        budget: share of gates that should be above 0 in G_infer.
        penalty, penalty_step: lambda at the start, and by what a step moves it (`BudgetFactors`).
        outputs: width of the result; None = D.
        dispatch: on devices: dense, all experts for all rows; dropless, trains the same way, and where it is used
            computes open pairs of a row and an expert alone, in layouts that `OpenExperts` fits. The CPU always
            computes just these.

    Output: (v_TBD, penalty scalar). The biases of the routers start at 1, so that every expert starts active.

    Source: RankMixer eq. 10-11; the penalty's rule is that of ReMoE (arXiv 2412.14711): lambda is multiplied by the
    step while more than the budget is active, and divided while less; a step counts all of its micro-batches and ranks.
    The paper gives neither rule nor blend: both were chosen here.
    """

    def __init__(self, tokens: int, width: int, inner: int, *, experts: int, router: Literal["dtsi", "single_relu"],
                 budget: float, penalty: float, penalty_step: float, layout: TokenLayout = WIDTH_LAYOUT,
                 outputs: int | None = None, dispatch: Literal["dense", "dropless"] = "dense",
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        if inner % experts:
            raise UserError(f"experts must divide the inner width {inner}", where="model.moe.experts", value=experts)
        self.tokens, self.experts, self.layout, self.two_routers = tokens, experts, layout, router == "dtsi"
        self.mapping = GroupedLinear(tokens, width, inner, layout=layout, compute_dtype=compute_dtype)
        self.gelu = GELU("tanh", layout.inner)
        outputs = outputs or width
        self.projection = GroupedLinear(tokens, inner, outputs, layout=layout, bias=False, compute_dtype=compute_dtype)
        self.expert_bias = parameter((tokens, experts, outputs), "zeros", shard_optimizer=False)
        self.infer_router = GroupedLinear(tokens, width, experts, layout=layout, gain=0.1)
        self.infer_router.bias.start = ("ones", 1.0)
        self.train_router = None
        if self.two_routers:
            self.train_router = GroupedLinear(tokens, width, experts, layout=layout, gain=0.1)
            self.train_router.bias.start = ("ones", 1.0)
        self.factor = parameter((), "fill", penalty, shard_optimizer=False)
        self.factor.budget_step = penalty_step
        self.budget = budget
        self.relu1, self.relu2, self.blend, self.halve = ops.ReLU(), ops.ReLU(), ops.Add(), ops.Mul()
        self.expand, self.weigh, self.bias, self.add = ops.ExpandDims(), ops.Mul(), ops.BatchMatMul(), ops.Add()
        self.reshape, self.cast = ops.Reshape(), ops.Cast()
        # Batch first: MindSpore's reductions know the mesh in that order only.
        self.turn1, self.turn2 = ops.Transpose(), ops.Transpose()
        self.share, self.height = ops.ReduceMean(), ops.ReduceMean()
        self.active, self.spread = ops.Greater(), ops.Gather()
        kernels = library(compute_dtype)
        self.fused = FusedGatedExperts(kernels) if kernels is not None else None
        self.compute_dtype = compute_dtype
        on_cpu = mindspore.get_context("device_target") == "CPU"  # which has no grouped product
        self.open = OpenExperts(tokens, experts, layout=layout) if dispatch == "dropless" and not on_cpu else None

    def gates(self, s_TBD: Tensor) -> tuple:
        """(the gates to mix with, G_infer), both [T, B, E]."""
        infer_TBE = self.relu1(self.infer_router(s_TBD))
        if not self.training or not self.two_routers:
            return infer_TBE, infer_TBE
        train_TBE = self.relu2(self.train_router(s_TBD))
        return self.halve(self.blend(train_TBE, infer_TBE), 0.5), infer_TBE

    def construct(self, s_TBD: Tensor, index_N: Tensor | None = None) -> tuple:
        """`index_N`: where rows serve several samples, the row of each sample: the penalty counts samples."""
        gates_TBE, infer_TBE = self.gates(s_TBD)
        v_TBD = self.mix(s_TBD, gates_TBE)
        if not self.training:
            return v_TBD, Tensor(0.0, mstype.float32)
        if index_N is not None:
            infer_TBE = self.spread(infer_TBE, index_N, 1)
        return v_TBD, self.adapt(infer_TBE)

    def mix(self, s_TBD: Tensor, gates_TBE: Tensor) -> Tensor:
        """Sum of the experts' outputs times their gates."""
        if self.fused is not None:
            return self.fused(s_TBD, gates_TBE, self.mapping.weight, self.mapping.bias, self.projection.weight,
                              self.expert_bias)
        if self.open is not None and not self.training and self.open.fits:
            kind = self.compute_dtype
            v_TBD = self.open(self.cast(s_TBD, kind), gates_TBE, self.cast(self.mapping.weight, kind),
                              self.cast(self.mapping.bias, kind), self.cast(self.projection.weight, kind))
            return self.add(v_TBD, self.cast(self.bias(gates_TBE, self.expert_bias), v_TBD.dtype))
        inner_TBF = self.gelu(self.mapping(s_TBD))
        batch = s_TBD.shape[1]
        pieces = self.reshape(inner_TBF, (self.tokens, batch, self.experts, -1))
        pieces = self.weigh(pieces, self.cast(self.expand(gates_TBE, -1), pieces.dtype))
        v_TBD = self.projection(self.reshape(pieces, inner_TBF.shape))
        return self.add(v_TBD, self.cast(self.bias(gates_TBE, self.expert_bias), v_TBD.dtype))

    def adapt(self, infer_TBE: Tensor) -> Tensor:
        """lambda x (sum of the gates, mean over the batch). What is added to it is 0, with the gradient by lambda that
        `BudgetFactors` moves it by: the share of gates above 0 less the budget."""
        above_TBE = self.cast(self.active(ops.stop_gradient(infer_TBE), 0.0), mstype.float32)
        used = self.share(self.turn1(above_TBE, (1, 0, 2)))
        factor = self.factor * 1.0
        held = ops.stop_gradient(factor)
        penalty = held * (self.height(self.turn2(infer_TBE, (1, 0, 2))) * (self.tokens * self.experts))
        return penalty + (factor - held) * ops.stop_gradient(used - self.budget)

    @property
    def flops_per_sample(self) -> int:
        """Of inference at the budget: routers and the active share of the experts."""
        experts = self.mapping.flops_per_sample + self.projection.flops_per_sample
        return self.infer_router.flops_per_sample + round(self.budget * experts)

    @property
    def idle_parameters(self) -> int:
        """Parameters of the experts that a sample does not use at the budget, and of the training router."""
        experts = self.mapping.weight.size + self.projection.weight.size
        return round((1.0 - self.budget) * experts) + (self.train_router.weight.size if self.two_routers else 0)

    def sharding(self) -> list[OpSharding]:
        tokens, batch, _ = self.layout.inner
        row, plane = (tokens, batch, None), (tokens, batch, None, None)
        first = (batch, self.layout.tokens_after_batch, None)
        return [OpSharding(self.relu1, (row,)), OpSharding(self.relu2, (row,)), OpSharding(self.blend, (row, row)),
                OpSharding(self.expand, (row,)), OpSharding(self.halve, (row, ())),
                OpSharding(self.weigh, (plane, plane)), OpSharding(self.add, (row, row)),
                OpSharding(self.bias, (row, (tokens, None, None)), weights=(None, "expert_bias")),
                OpSharding(self.active, (row, ())), OpSharding(self.turn1, (row,)), OpSharding(self.turn2, (row,)),
                OpSharding(self.share, (first,)), OpSharding(self.height, (first,))]
