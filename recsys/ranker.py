"""What every ranker is: embedding, interaction, one head a task; and its training loss.

Shapes: B batch, M id columns, N numeric columns, K tasks, D width.
"""

from __future__ import annotations

import math
from typing import Any

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.common.errors import UserError
from parallel.layers.dropout import Dropout, DropoutKeys
from parallel.layers.linear import Linear
from parallel.sharding.config import ParallelConfig, divides
from parallel.sharding.layout import Layer, OpSharding
from parallel.sharding.trainable import Trainable
from recsys.data.features import FeatureSpec
from recsys.layers.embedding import FeatureEmbedding, Join
from recsys.layers.heads import Calibration, MixtureOfExperts, ProgressiveExtraction
from recsys.layers.losses import Answers, Compared, FunnelLoss
from recsys.layers.tasks import TaskPlan
from recsys.settings import HeadSettings, RankerSettings


def dense(inputs: int, outputs: int, compute_dtype: mstype = mstype.float32, *, bias: bool = True,
          style: str | None = None, rows: int = 1) -> Linear:
    """A linear layer with Xavier-normal start."""
    return Linear(inputs, outputs, style=style, std=math.sqrt(2.0 / (inputs + outputs)), bias=bias, rows=rows,
                  compute_dtype=compute_dtype)


class ReLU(Layer):
    """max(x, 0).

    Args:
        stream: named axes that shard the dims.
    """

    def __init__(self, stream: tuple = ("tokens", None)) -> None:
        super().__init__()
        self.stream, self.relu = stream, ops.ReLU()

    def construct(self, x: Tensor) -> Tensor:
        return self.relu(x)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.relu, (self.stream,))]


class MLP(nn.Cell):
    """Linear layers with ReLU after each, after the last one only if `final_relu`.

    Args:
        sizes: input width, then the width of every layer.
    """

    def __init__(self, sizes: list[int], compute_dtype: mstype = mstype.float32, *, final_relu: bool = True) -> None:
        super().__init__()
        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.linears = nn.CellList([dense(i, o, compute_dtype) for i, o in pairs])
        self.relus = nn.CellList([ReLU() for _ in pairs])
        self.final_relu = final_relu

    def construct(self, x_BD: Tensor) -> Tensor:
        for index in range(len(self.linears)):
            x_BD = self.linears[index](x_BD)
            if self.final_relu or index < len(self.linears) - 1:
                x_BD = self.relus[index](x_BD)
        return x_BD


class TaskHeads(nn.Cell):
    """logits_BK: a head for each task on one shared representation, or on each task's mixture of experts. In float32.

    Args:
        width: D.
        hidden: widths of a head's hidden layers.
        tasks: K.
        sharing: what is before the heads; None = nothing.
    """

    def __init__(self, width: int, hidden: list[int], tasks: int, sharing: HeadSettings | None = None) -> None:
        super().__init__()
        self.experts = None
        if sharing is not None and sharing.kind == "mmoe":
            self.experts = MixtureOfExperts(width, sharing.experts, sharing.hidden, tasks)
        elif sharing is not None and sharing.kind == "ple":
            self.experts = ProgressiveExtraction(width, sharing.experts, sharing.hidden, tasks, sharing.levels)
        width = sharing.hidden if self.experts is not None else width
        self.towers = nn.CellList([MLP([width, *hidden, 1], final_relu=False) for _ in range(tasks)])
        self.join, self.cast = Join(tasks), ops.Cast()

    def construct(self, hidden_BD: Tensor) -> Tensor:
        hidden_BD = self.cast(hidden_BD, mstype.float32)
        logits = ()
        if self.experts is not None:
            own = self.experts(hidden_BD)
            for index in range(len(self.towers)):
                logits += (self.towers[index](own[index]),)
        else:
            for head in self.towers:
                logits += (head(hidden_BD),)
        return self.join(*logits)


class Ranker(nn.Cell):
    """Base of all rankers. A model's file derives from it and writes `represent`.

    Args:
        settings: sizes and choices.
        spec: features with their columns.
        tasks: K.
        compute_dtype: type of the matmuls.

    Inputs: ids_BM int32, numbers_BN float32. Output: logits_BK float32.
    """

    def __init__(self, settings: RankerSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        if settings.tasks and len(settings.tasks) != tasks:
            raise UserError(f"there are {tasks} labels", where="model.tasks", value=[t.name for t in settings.tasks],
                            hint="name the same number of tasks")
        self.settings, self.spec, self.tasks, self.compute_dtype = settings, spec, tasks, compute_dtype
        self.plan = TaskPlan.of(settings.tasks, tasks)
        self.calibration = None
        self.embedding = FeatureEmbedding(spec, settings.embedding_std, lookup=settings.lookup,
                                          compute_dtype=compute_dtype)
        self.drop, self.drop_keys = Dropout(settings.dropout, ("batch", None)), DropoutKeys()

    token_count: int | None = None  # feature tokens, in rankers that have them

    def auxiliary_heads(self) -> list[nn.Cell]:
        """Heads that only training has."""
        return []

    def make_head(self, width: int) -> None:
        """Makes the task heads on a representation of `width`; a model calls it last."""
        self.head = TaskHeads(width, self.settings.head_hidden, self.tasks, self.settings.head)
        if self.settings.head.calibration:
            self.calibration = Calibration(self.tasks)

    def served(self, logits_BK: Tensor) -> Tensor:
        """The logits that are evaluated and served: calibrated, where the model is."""
        if self.calibration is not None:
            return self.calibration(logits_BK)
        return logits_BK

    def represent(self, groups: tuple, sequences: tuple) -> tuple:
        """(hidden_BD for the heads, tuple of auxiliary logits_BK, tuple of scalar penalties)."""
        raise NotImplementedError

    def outputs(self, ids_BM: Tensor, numbers_BN: Tensor, rows_B: Tensor | None = None) -> tuple:
        """(logits_BK, auxiliary logits, penalties): what training needs; rows_B numbers the samples for dropout."""
        groups, sequences = self.embedding(ids_BM, numbers_BN)
        if self.settings.dropout > 0.0:
            dropped, keys = (), self.drop_keys(rows_B, 1) if rows_B is not None else None
            for group in groups:
                dropped += (self.drop(group, keys),)
            groups = dropped
        hidden_BD, auxiliary, penalties = self.represent(groups, sequences)
        return self.head(hidden_BD), auxiliary, penalties

    def construct(self, ids_BM: Tensor, numbers_BN: Tensor) -> Tensor:
        logits_BK, _, _ = self.outputs(ids_BM, numbers_BN)
        return self.served(logits_BK)

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]] | None:
        """Cells in forward order for pipeline stages; a model with a stack of blocks overrides it."""
        return None

    def check_layout(self, parallel: ParallelConfig, batch: int) -> None:
        """Checks that every axis divides what it shards; a model with axes of its own overrides `check_op` and
        `check_experts`.

        Args:
            parallel: resolved.
            batch: samples of a global batch.

        Raises:
            UserError: one does not.
        """
        if parallel.op > 1:
            for width, rows in self.spec.tables.items():
                divides(parallel.op if parallel.vocabulary else 1, rows, where="parallel.op",
                        what=f"table of width {width}, rows")
            self.check_op(parallel, batch)
        if parallel.expert > 1:
            self.check_experts(parallel)
        layers = len(self.pipeline_cells() or [None, None]) - 2
        if parallel.pipeline.stages > max(layers, 1):
            raise UserError("more stages than layers" if layers else f"{type(self).__name__} has no stack of blocks to "
                            "shard into stages", where="parallel.pipeline.stages", value=parallel.pipeline.stages)

    def check_op(self, parallel: ParallelConfig, batch: int) -> None:
        """Checks what tensor parallelism shards besides the tables: nothing in most rankers."""

    def check_experts(self, parallel: ParallelConfig) -> None:
        """Checks that routed experts are there and divide."""
        raise UserError("the model has no routed experts to shard", where="parallel.expert", value=parallel.expert)

    @property
    def auxiliary_weight(self) -> float:
        """Factor of the auxiliary heads' losses."""
        return 0.0


def check_token_axes(settings: RankerSettings, parallel: ParallelConfig, batch: int, counts: set[int]) -> None:
    """Checks what tensor parallelism shards in a ranker of feature tokens, by its `op_sharding`.

    Args:
        settings: of a model with `op_sharding`, `moe` and `inner`, the inner width of its per-token networks.
        parallel: resolved, op > 1.
        batch: samples of a global batch.
        counts: numbers of tokens (or mixing heads) that are sharded by tokens.

    Raises:
        UserError: an axis does not divide.
    """
    op = parallel.op
    if settings.op_sharding == "width":
        if settings.moe is not None:
            raise UserError("experts are not sharded along their width", where="parallel.op", value=op,
                            hint="choose model.op_sharding: tokens, or shard the experts with parallel.expert")
        divides(op, settings.inner, where="parallel.op", what="inner width")
        return
    for count in counts:
        divides(op, count, where="parallel.op", what="tokens (or mixing heads)", hint="choose model.op_sharding: width")
    divides(op * parallel.data, batch, where="parallel.op", what="train.global_batch_size")


class Scores(Layer, Trainable):
    """probabilities_BK of a ranker, float32; products of them and numbers where tasks are such."""

    inputs = 2
    """Number of the inputs that it takes of a `Task`: ids_BM and numbers_BN."""

    def __init__(self, model: Ranker) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.sigmoid = model, ops.Sigmoid()
        self.answers = None if model.plan.plain else Answers(model.plan)

    def construct(self, ids_BM: Tensor, numbers_BN: Tensor) -> Tensor:
        logits_BK = self.model(ids_BM, numbers_BN)
        if self.answers is not None:
            return self.answers(logits_BK)
        return self.sigmoid(logits_BK)

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]] | None:
        """See `Ranker.pipeline_cells`; what follows the model stands on its last stage."""
        return self.model.pipeline_cells()

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.sigmoid, (("batch", None),))]


class BinaryCrossEntropy(Layer):
    """-y log p - (1 - y) log(1 - p) of each sample from its logit, without overflow: max(z, 0) - z y + log(1 +
    e^-|z|)."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.times, self.minus, self.plus = ops.ReLU(), ops.Mul(), ops.Sub(), ops.Add()
        self.abs, self.negate, self.exp = ops.Abs(), ops.Neg(), ops.Exp()
        self.log1p, self.one_more = ops.Log(), ops.Add()

    def construct(self, logits_BK: Tensor, labels_BK: Tensor) -> Tensor:
        tail_BK = self.log1p(self.one_more(self.exp(self.negate(self.abs(logits_BK))), 1.0))
        return self.plus(self.minus(self.relu(logits_BK), self.times(logits_BK, labels_BK)), tail_BK)

    def sharding(self) -> list[OpSharding]:
        wide = ("batch", None)
        one = [self.relu, self.abs, self.negate, self.exp, self.log1p]
        return ([OpSharding(primitive, (wide,)) for primitive in one] + [OpSharding(self.one_more, (wide, ()))]
                + [OpSharding(primitive, (wide, wide)) for primitive in (self.times, self.minus, self.plus)])


class TaskMean(Layer):
    """sum over tasks of weight_K * mean over the batch of loss_BK: a scalar."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weight_of_tasks = Tensor([weights], mstype.float32)
        self.mean, self.weigh, self.sum, self.reshape = ops.ReduceMean(), ops.Mul(), ops.ReduceSum(), ops.Reshape()

    def construct(self, loss_BK: Tensor) -> Tensor:
        return self.mean(self.sum(self.weigh(loss_BK, self.weight_of_tasks), 1))

    def sharding(self) -> list[OpSharding]:
        wide = ("batch", None)
        return [OpSharding(self.weigh, (wide, (None, None))), OpSharding(self.sum, (wide,)),
                OpSharding(self.mean, (("batch",),))]


class TrainingLoss(Trainable):
    """Weighted sum of the tasks' mean losses, plus auxiliary heads, plus penalties: a scalar.

    Args:
        model: its plan says what the tasks are.
        sample_weights: bool [K, W], which column of weights each task's samples have; None = there are none.

    Inputs: ids_BM int32, numbers_BN float32, labels_BK float32 (0 or 1); where tasks are more than clicks, targets_BT
    (see `recsys.layers.tasks`).
    """

    shares_graph = False  # MindSpore 2.9 loses all but the first result of SplitWithSize in a shared graph

    def __init__(self, model: Ranker, sample_weights: Any = None) -> None:
        # No prefix: a parameter is called the same in training, evaluation and on disk.
        super().__init__(auto_prefix=False)
        self.model = model
        weights = [task.weight for task in model.settings.tasks] or [1.0] * model.tasks
        self.cross_entropy, self.mean = BinaryCrossEntropy(), TaskMean(weights)
        self.auxiliary_entropy, self.auxiliary_mean = BinaryCrossEntropy(), TaskMean(weights)
        self.auxiliary_weight = model.auxiliary_weight
        plan = model.plan
        self.extra, self.compared = None, None
        if not plan.plain or sample_weights is not None:
            self.cross_entropy = FunnelLoss(plan, sample_weights)
            self.auxiliary_entropy = FunnelLoss(plan, sample_weights)
        if plan.grouped:
            self.compared = Compared(plan)
        if model.calibration is not None:
            self.extra = FunnelLoss(plan, sample_weights)

    def construct(self, ids_BM: Tensor, numbers_BN: Tensor, labels_BK: Tensor,
                  rows_B: Tensor | None = None) -> Tensor:
        return self.total(self.model.outputs(ids_BM, numbers_BN, rows_B), labels_BK)

    def total(self, outputs: tuple, labels_BK: Tensor) -> Tensor:
        """The loss from what `Ranker.outputs` gives."""
        logits_BK, auxiliary, penalties = outputs
        loss = self.mean(self.cross_entropy(logits_BK, labels_BK))
        if self.compared is not None:
            loss = loss + self.compared(logits_BK, labels_BK)
        if self.extra is not None:
            loss = loss + self.mean(self.extra(self.model.served(logits_BK), labels_BK))
        if self.auxiliary_weight > 0.0:
            for other_BK in auxiliary:
                extra = self.auxiliary_mean(self.auxiliary_entropy(other_BK, labels_BK))
                loss = loss + self.auxiliary_weight * extra
        for penalty in penalties:
            loss = loss + penalty
        return loss

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]]:
        """See `Ranker.pipeline_cells`; the loss goes with the head."""
        units = self.model.pipeline_cells()
        if units is None:
            return None
        *rest, last = units
        return [*rest, [*last, self.cross_entropy, self.mean, self.auxiliary_entropy, self.auxiliary_mean]]
