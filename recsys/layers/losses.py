"""Losses of tasks that are not plain clicks: products along a funnel, masks, weights of samples, numbers, and losses
that compare the samples of one user.

Shapes: B batch, K tasks, T columns of targets (see `recsys.layers.tasks`).
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.sharding.layout import Layer, OpSharding
from recsys.layers.tasks import TaskPlan

_LEAST = 1e-6


def constant(values: np.ndarray) -> Tensor:
    """float32."""
    return Tensor(np.ascontiguousarray(values, np.float32), mstype.float32)


class FunnelLoss(Layer):
    """loss_BK of every sample and task, 0 where a sample does not count.

    binary: -y log p - (1 - y) log(1 - p) with p the product of the sigmoids along `given` (ESMM: Ma et al., SIGIR 2018:
    CTCVR = CTR x CVR, trained over all impressions). regression: (z - t(y))^2 / 2, or Huber's with delta 1.
    A sample counts where its label is there and the label of `only_where` is 1, times its weight.

    Args:
        plan: of the tasks.
        weights: bool [K, W], which column of weights each task has; None = there are none.
    """

    def __init__(self, plan: TaskPlan, weights: np.ndarray | None) -> None:
        super().__init__()
        tasks = plan.tasks
        weights = np.zeros((len(tasks), 0), bool) if weights is None else weights
        self.tasks, self.columns = len(tasks), len(tasks) + weights.shape[1]
        self.weighted = bool(weights.any())
        self.parents, self.conditions = constant(plan.parents.T), constant(plan.conditions.T)
        self.free = constant(~plan.conditions.any(1)[None])
        self.weights = constant(weights.T) if self.weighted else None
        self.unweighted = constant(~weights.any(1)[None])
        self.binary = constant(np.array([[task.kind == "binary" for task in tasks]]))
        self.alone = constant(plan.parents.sum(1)[None] == 1)
        self.log_target = constant(np.array([[task.transform == "log" for task in tasks]]))
        self.huber = constant(np.array([[task.loss == "huber" for task in tasks]]))
        self.products = not (plan.parents.sum(1) == 1).all()
        self.numbers = any(task.kind == "regression" for task in tasks)
        self.slice, self.differs, self.cast, self.select = ops.StridedSlice(), ops.Equal(), ops.Cast(), ops.Select()
        self.matmul, self.chosen = ops.MatMul(), ops.MatMul()
        self.funnel = ops.MatMul()
        self.zeros, self.mul, self.row_mul = ops.ZerosLike(), ops.Mul(), ops.Mul()
        self.row_add, self.add, self.sub, self.relu = ops.Add(), ops.Add(), ops.Sub(), ops.ReLU()
        self.abs, self.neg, self.exp, self.log, self.plus_one = ops.Abs(), ops.Neg(), ops.Exp(), ops.Log(), ops.Add()
        self.least, self.floor, self.half = ops.Minimum(), ops.Maximum(), ops.Mul()

    def construct(self, logits_BK: Tensor, targets_BT: Tensor) -> Tensor:
        rows = targets_BT.shape[0]
        labels_BK = self.slice(targets_BT, (0, 0), (rows, self.tasks), (1, 1))
        there_BK = self.differs(labels_BK, labels_BK)  # NaN is not equal to itself
        y_BK = self.select(there_BK, labels_BK, self.zeros(labels_BK))
        counts_BK = self.mul(self.cast(there_BK, mstype.float32),
                             self.row_add(self.chosen(y_BK, self.conditions), self.free))
        if self.weighted:
            weights = self.slice(targets_BT, (0, self.tasks), (rows, self.columns), (1, 1))
            counts_BK = self.mul(counts_BK, self.row_add(self.matmul(weights, self.weights), self.unweighted))
        loss_BK = self.cross_entropy(logits_BK, y_BK)
        if self.products:
            loss_BK = self.add(self.row_mul(loss_BK, self.alone),
                               self.row_mul(self.of_products(logits_BK, y_BK), 1.0 - self.alone))
        if self.numbers:
            loss_BK = self.add(self.row_mul(loss_BK, self.binary),
                               self.row_mul(self.of_numbers(logits_BK, y_BK), 1.0 - self.binary))
        return self.mul(loss_BK, counts_BK)

    def softplus(self, x: Tensor) -> Tensor:
        """log(1 + e^x) without overflow."""
        return self.add(self.relu(x), self.log(self.plus_one(self.exp(self.neg(self.abs(x))), 1.0)))

    def cross_entropy(self, logits_BK: Tensor, y_BK: Tensor) -> Tensor:
        """Of each logit alone."""
        return self.sub(self.softplus(logits_BK), self.mul(logits_BK, y_BK))

    def of_products(self, logits_BK: Tensor, y_BK: Tensor) -> Tensor:
        """Cross-entropy of the product of sigmoids along `given`."""
        log_p = self.least(self.funnel(self.neg(self.softplus(self.neg(logits_BK))), self.parents), -_LEAST)
        log_rest = self.log(self.plus_one(self.neg(self.exp(log_p)), 1.0))
        return self.neg(self.add(self.mul(y_BK, log_p), self.sub(log_rest, self.mul(y_BK, log_rest))))

    def of_numbers(self, values_BK: Tensor, y_BK: Tensor) -> Tensor:
        """Half the squared error, or Huber's, of log(1 + y) or y."""
        logged = self.log(self.plus_one(self.floor(y_BK, 0.0), 1.0))
        target = self.add(self.row_mul(logged, self.log_target), self.row_mul(y_BK, 1.0 - self.log_target))
        error = self.sub(values_BK, target)
        size = self.abs(error)
        # Huber: e^2 / 2 up to 1, |e| - 1/2 beyond: with c = min(|e|, 1) both are c (|e| - c / 2).
        short = self.least(size, 1.0)
        huber = self.mul(short, self.sub(size, self.half(short, 0.5)))
        squared = self.half(self.mul(error, error), 0.5)
        return self.add(self.row_mul(huber, self.huber), self.row_mul(squared, 1.0 - self.huber))

    def sharding(self) -> list[OpSharding]:
        wide, row, none = ("batch", None), (None, None), ()
        pairs = [self.mul, self.add, self.sub, self.differs]
        return ([OpSharding(primitive, (wide, wide)) for primitive in pairs]
                + [OpSharding(primitive, (wide, row)) for primitive in (self.row_mul, self.row_add, self.matmul,
                                                                      self.chosen, self.funnel)]
                + [OpSharding(primitive, (wide,)) for primitive in (self.slice, self.zeros, self.relu, self.abs,
                                                                    self.neg, self.exp, self.log)]
                + [OpSharding(primitive, (wide, none)) for primitive in (self.plus_one, self.least, self.floor,
                                                                         self.half)]
                + [OpSharding(self.select, (wide, wide, wide))])


class PairwiseLoss(nn.Cell):
    """Mean over pairs (i, j) of one user with y_i > y_j of log(1 + e^(z_j - z_i)); 0 without such a pair.

    Inputs: logits_B1, labels_B1 (NaN: left out), groups_B1. Source: Burges et al., ICML 2005 (RankNet).
    """

    def construct(self, logits_B1: Tensor, labels_B1: Tensor, groups_B1: Tensor) -> Tensor:
        better_BB = ops.cast(ops.logical_and(labels_B1 > ops.transpose(labels_B1, (1, 0)),
                                             groups_B1 == ops.transpose(groups_B1, (1, 0))), mstype.float32)
        gap_BB = ops.transpose(logits_B1, (1, 0)) - logits_B1
        loss_BB = ops.relu(gap_BB) + ops.log(1.0 + ops.exp(-ops.abs(gap_BB)))
        return (loss_BB * better_BB).sum() / ops.maximum(better_BB.sum(), Tensor(1.0, mstype.float32))


class ListwiseLoss(nn.Cell):
    """Mean over positive samples of -log softmax of their logit among their user's; 0 without one.

    Inputs: logits_B1, labels_B1 (NaN: left out), groups_B1. Source: Cao et al., ICML 2007 (ListNet), with the positive
    samples of a list as its top.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most, self.sum = ops.ReduceMax(keep_dims=True), ops.ReduceSum(keep_dims=True)

    def construct(self, logits_B1: Tensor, labels_B1: Tensor, groups_B1: Tensor) -> Tensor:
        there_B1 = labels_B1 == labels_B1
        y_B1 = ops.select(there_B1, labels_B1, ops.zeros_like(labels_B1))
        same_BB = ops.logical_and(groups_B1 == ops.transpose(groups_B1, (1, 0)), ops.transpose(there_B1, (1, 0)))
        row_BB = ops.broadcast_to(ops.transpose(logits_B1, (1, 0)), same_BB.shape)
        hidden_BB = ops.select(same_BB, row_BB, ops.zeros_like(row_BB) - 1e9)
        most_B1 = ops.stop_gradient(self.most(hidden_BB, 1))
        total_B1 = ops.log(ops.maximum(self.sum(ops.exp(hidden_BB - most_B1), 1),
                                       Tensor(1e-30, mstype.float32))) + most_B1
        return ((total_B1 - logits_B1) * y_B1).sum() / ops.maximum(y_B1.sum(), Tensor(1.0, mstype.float32))


class Compared(nn.Cell):
    """The tasks' losses over pairs and lists of one user's samples, by their factors: a scalar.

    Args:
        plan: of the tasks.

    Inputs: logits_BK, targets_BT whose last column says which samples are of one user.
    """

    def __init__(self, plan: TaskPlan) -> None:
        super().__init__()
        self.factors = tuple((index, task.pairwise, task.listwise) for index, task in enumerate(plan.tasks)
                             if task.pairwise or task.listwise)
        self.pairs, self.lists = PairwiseLoss(), ListwiseLoss()

    def construct(self, logits_BK: Tensor, targets_BT: Tensor) -> Tensor:
        groups_B1, loss = targets_BT[:, -1:], Tensor(0.0, mstype.float32)
        for index, pairwise, listwise in self.factors:
            logits_B1, labels_B1 = logits_BK[:, index:index + 1], targets_BT[:, index:index + 1]
            if pairwise:
                loss = loss + pairwise * self.pairs(logits_B1, labels_B1, groups_B1)
            if listwise:
                loss = loss + listwise * self.lists(logits_B1, labels_B1, groups_B1)
        return loss


class Answers(Layer):
    """`TaskPlan.predictions` within a graph: probabilities, products of them along `given`, or numbers."""

    def __init__(self, plan: TaskPlan) -> None:
        super().__init__()
        binary = np.array([[task.kind == "binary" for task in plan.tasks]])
        self.binary, self.numbers = constant(binary), constant(~binary)
        self.logged = constant(~binary & np.array([[task.transform == "log" for task in plan.tasks]]))
        self.parents = constant((plan.parents & binary.T).T)
        self.matmul, self.row_mul, self.add, self.sub = ops.MatMul(), ops.Mul(), ops.Add(), ops.Sub()
        self.relu, self.abs, self.neg, self.exp, self.log = ops.ReLU(), ops.Abs(), ops.Neg(), ops.Exp(), ops.Log()
        self.plus_one, self.least = ops.Add(), ops.Minimum()

    def construct(self, logits_BK: Tensor) -> Tensor:
        tail_BK = self.log(self.plus_one(self.exp(self.neg(self.abs(logits_BK))), 1.0))
        log_p = self.neg(self.add(self.relu(self.neg(logits_BK)), tail_BK))
        found = self.row_mul(self.exp(self.matmul(log_p, self.parents)), self.binary)
        plain = self.row_mul(logits_BK, self.sub(self.numbers, self.logged))
        number = self.plus_one(self.exp(self.least(logits_BK, 50.0)), -1.0)
        return self.add(self.add(found, plain), self.row_mul(number, self.logged))

    def sharding(self) -> list[OpSharding]:
        wide, row = ("batch", None), (None, None)
        one = (self.relu, self.abs, self.neg, self.exp, self.log)
        return ([OpSharding(primitive, (wide,)) for primitive in one] + [OpSharding(self.add, (wide, wide)),
                OpSharding(self.sub, (row, row)), OpSharding(self.matmul, (wide, row)),
                OpSharding(self.row_mul, (wide, row)), OpSharding(self.plus_one, (wide, ())),
                OpSharding(self.least, (wide, ()))])
