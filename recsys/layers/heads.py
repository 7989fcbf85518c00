"""Heads of several tasks on one representation: an MLP each, mixtures of shared experts (MMoE), or of shared and own
ones in levels (PLE); and calibration of their logits.

Shapes: B batch, D width, E experts, H width of an expert, K tasks.
"""

from __future__ import annotations

import math

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.layers.linear import Linear
from parallel.layers.parameter import parameter
from parallel.sharding.layout import Layer, OpSharding
from recsys.layers.embedding import Join


def linear(inputs: int, outputs: int) -> Linear:
    """A linear layer in float32 with Xavier-normal start."""
    return Linear(inputs, outputs, style=None, std=math.sqrt(2.0 / (inputs + outputs)))


class Expert(Layer):
    """max(x W + b, 0) of one hidden layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.relu = linear(inputs, outputs), ops.ReLU()

    def construct(self, x_BD: Tensor) -> Tensor:
        return self.relu(self.linear(x_BD))

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.relu, (("tokens", None),))]


class Gate(Layer):
    """sum_e softmax(x W + b)_e expert_e: one task's mixture of experts.

    Args:
        inputs: D.
        experts: E.
    """

    def __init__(self, inputs: int, experts: int) -> None:
        super().__init__()
        self.linear, self.softmax, self.expand = linear(inputs, experts), ops.Softmax(-1), ops.ExpandDims()
        self.weigh, self.sum = ops.Mul(), ops.ReduceSum()

    def construct(self, x_BD: Tensor, experts_BEH: Tensor) -> Tensor:
        weights_BE1 = self.expand(self.softmax(self.linear(x_BD)), -1)
        return self.sum(self.weigh(experts_BEH, weights_BE1), 1)

    def sharding(self) -> list[OpSharding]:
        flat, cube = ("tokens", None), ("batch", None, None)
        return [OpSharding(self.softmax, (flat,)), OpSharding(self.expand, (flat,)),
                OpSharding(self.weigh, (cube, cube)), OpSharding(self.sum, (cube,))]


class Experts(nn.Cell):
    """experts_BEH: each expert's view of x_BD."""

    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__()
        self.experts = nn.CellList([Expert(inputs, outputs) for _ in range(count)])
        self.join, self.shape, self.reshape = Join(count), (-1, count, outputs), ops.Reshape()

    def construct(self, x_BD: Tensor) -> Tensor:
        views = ()
        for expert in self.experts:
            views += (expert(x_BD),)
        return self.reshape(self.join(*views), self.shape)


class MixtureOfExperts(nn.Cell):
    """MMoE: (x_1, ..., x_K) with x_k the mixture of shared experts by task k's gate.

    Source: Ma et al., KDD 2018, eq. 6-7.
    """

    def __init__(self, width: int, experts: int, hidden: int, tasks: int) -> None:
        super().__init__()
        self.shared = Experts(width, hidden, experts)
        self.gates = nn.CellList([Gate(width, experts) for _ in range(tasks)])
        self.cast = ops.Cast()

    def construct(self, x_BD: Tensor) -> tuple:
        x_BD = self.cast(x_BD, mstype.float32)
        experts_BEH, found = self.shared(x_BD), ()
        for gate in self.gates:
            found += (gate(x_BD, experts_BEH),)
        return found


class ProgressiveExtraction(nn.Cell):
    """PLE: levels of shared and own experts; each task mixes its own with the shared ones, and in all levels but the
    last a gate of the shared part mixes all of them.

    Args:
        width: D.
        experts: of each task and of the shared part, on every level.
        hidden: H.
        tasks: K.
        levels: how many.

    Source: Tang et al., RecSys 2020, eq. 1-7.
    """

    def __init__(self, width: int, experts: int, hidden: int, tasks: int, levels: int) -> None:
        super().__init__()
        self.levels, self.tasks = levels, tasks
        own, shared, gates, mixed = [], [], [], []
        for level in range(levels):
            inputs = width if level == 0 else hidden
            own.append(nn.CellList([Experts(inputs, hidden, experts) for _ in range(tasks)]))
            shared.append(Experts(inputs, hidden, experts))
            gates.append(nn.CellList([Gate(inputs, 2 * experts) for _ in range(tasks)]))
            if level < levels - 1:
                mixed.append(Gate(inputs, (tasks + 1) * experts))
        self.own, self.shared, self.gates = nn.CellList(own), nn.CellList(shared), nn.CellList(gates)
        self.mixed = nn.CellList(mixed)
        self.pair, self.all, self.cast = Join(2, 3), Join(tasks + 1, 3), ops.Cast()

    def construct(self, x_BD: Tensor) -> tuple:
        x_BD = self.cast(x_BD, mstype.float32)
        common, states = x_BD, ()
        for _ in range(self.tasks):
            states += (x_BD,)
        for level in range(self.levels):
            shared_BEH, views, following = self.shared[level](common), (), ()
            for task in range(self.tasks):
                view_BEH = self.own[level][task](states[task])
                views += (view_BEH,)
                following += (self.gates[level][task](states[task], self.pair(view_BEH, shared_BEH)),)
            if level < self.levels - 1:
                common = self.mixed[level](common, self.all(*views, shared_BEH))
            states = following
        return states


class Calibration(Layer):
    """z' = softplus(a_k) / log 2 * z + b_k of every task's logit, with no gradient to z: it moves how many clicks are
    predicted, not which candidate comes first. It starts as the identity.

    Source: Platt 1999, kept rising; that it is trained beside the network was chosen here.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.scale = parameter((1, tasks), "zeros", shard_optimizer=False)
        self.shift = parameter((1, tasks), "zeros", shard_optimizer=False)
        self.exp, self.log, self.one_more, self.factor = ops.Exp(), ops.Log(), ops.Add(), ops.Mul()
        self.times, self.plus = ops.Mul(), ops.Add()

    def construct(self, logits_BK: Tensor) -> Tensor:
        slope_1K = self.factor(self.log(self.one_more(self.exp(self.scale), 1.0)), 1.0 / math.log(2.0))
        return self.plus(self.times(ops.stop_gradient(logits_BK), slope_1K), self.shift)

    def sharding(self) -> list[OpSharding]:
        wide, row = ("batch", None), (None, None)
        return [OpSharding(self.times, (wide, row)), OpSharding(self.plus, (wide, row)),
                OpSharding(self.exp, (row,)), OpSharding(self.log, (row,)), OpSharding(self.one_more, (row, ())),
                OpSharding(self.factor, (row, ()))]
