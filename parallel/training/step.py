"""One training step as one graph: forward, backward, averaging, norm, clip, update; non-finite steps change nothing.

They are separate cells so that each way to shard a network can replace its own: `BlockGradient` (one forward and
backward), `MeanGradient` (micro-batches and data-parallel ranks), `GlobalNorm` (replication weights and groups),
`LossScale` (static or dynamic) and `TrainStep`, which joins them.

A network is any cell `network(*batch) -> loss`, or `-> (loss, weight)` where `loss` is a mean over `weight` items (the
unmasked tokens of a language model, say; finite where the weight is 0): micro-batches and ranks are then averaged by
weight, so that the result is the mean over the global batch however it is sharded. A network with dropout takes
the numbers of its samples, int32 [B], as its last input (`parallel.layers.dropout`).
"""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from parallel.layers.dropout import connect_dropout
from parallel.layers.fused import squares_kernel
from parallel.sharding.trainable import Trainable
from parallel.training.one_stream import last_reduction
from parallel.training.optimizers.budget import replicas_in_norm
from parallel.training.optimizers.row_gradients import separated, slots_for
from parallel.training.optimizers.run import Optimizer
from parallel.training.settings import LossScaleSettings, TrainSettings


def enable_weighted_loss(network: nn.Cell) -> bool:
    """Makes a network that has a weight return (loss, weight); whether it can."""
    if not isinstance(network, Trainable) or not network.can_weigh:
        return False
    network.weighted = True
    return True


class BlockGradient(nn.Cell):
    """Gradient of one block of rows: `(loss, weight, gradients)`, the gradients times `sensitivity`.

    Args:
        network: the network with its loss.
        parameters: what to differentiate by.
        weighted: whether the network returns (loss, weight).
    """

    def __init__(self, network: nn.Cell, parameters: ParameterTuple, weighted: bool) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        slots, self.row_numbers = slots_for(network, parameters)
        self.parameters = ParameterTuple(slots)
        self.weighted = weighted
        self.differentiate = ops.value_and_grad(self.objective, None, self.parameters, has_aux=True)
        self.one = Tensor(1.0, ms.float32)

    def objective(self, sensitivity: Tensor, by_weight: bool, *batch: Tensor) -> tuple:
        """(loss x sensitivity [x weight], loss, weight): the first is differentiated."""
        if self.weighted:
            loss, weight = self.network(*batch)
            weight = ops.cast(weight, ms.float32)
        else:
            loss = self.network(*batch)
            weight = self.one
        loss = ops.cast(loss, ms.float32)
        value = loss * sensitivity
        if by_weight:
            value = value * weight
        return value, ops.stop_gradient(loss), ops.stop_gradient(weight)

    def construct(self, sensitivity: Tensor, by_weight: bool, *batch: Tensor) -> tuple:
        """Scalars loss and weight, one gradient per parameter, and the rows of those that are of rows (`separated`)."""
        (_, loss, weight), gradients = self.differentiate(sensitivity, by_weight, *batch)
        if len(self.row_numbers) > 0:
            gradients, rows = separated(gradients, self.row_numbers)
            return loss, weight, gradients, rows
        return loss, weight, gradients, ()


class MeanGradient(nn.Cell):
    """Gradient sums over `accumulation` micro-batches and the data-parallel ranks, and the factor to means.

    Returns `(loss, gradients, factor, rows)`: the gradient of the mean loss over the global batch is `gradient * factor
    / sensitivity`. Nothing is multiplied here, since clipping multiplies anyway. Gradients of rows (`rows` has their
    numbers) are those of one block: they are not added.

    Args:
        block: gradient of one block.
        accumulation: micro-batches; each has a rows-th part of the rank's rows.
        group: communication group of the data-parallel ranks, or None.
        ranks: size of the group.
    """

    def __init__(self, block: nn.Cell, accumulation: int, group: str | None = None, ranks: int = 1) -> None:
        super().__init__(auto_prefix=False)
        self.block = block
        self.accumulation = accumulation
        self.reduce = ops.AllReduce(ops.ReduceOp.SUM, group) if group is not None and ranks > 1 else None
        self.by_weight = accumulation * ranks > 1
        self.map = ops.HyperMap()
        self.one = Tensor(1.0, ms.float32)

    def construct(self, sensitivity: Tensor, *batch: Tensor) -> tuple:
        """batch: tensors with the rank's rows first."""
        if not self.by_weight:
            loss, _, gradients, rows = self.block(sensitivity, False, *batch)
            return loss, gradients, self.one, rows
        # Divided here and multiplied back in `factor`, lest half-precision gradients grow with the number of tokens.
        size = 1.0 * batch[0].size if self.block.weighted else 1.0
        loss_sum, weight_sum, gradients = self.accumulate(sensitivity / size, batch)
        if self.reduce is not None:
            loss_sum, weight_sum = self.reduce(loss_sum), self.reduce(weight_sum)
            gradients = self.added(gradients)
        return loss_sum / weight_sum, gradients, size / weight_sum, ()

    def added(self, gradients: tuple) -> tuple:
        """The gradients, added over the ranks."""
        return self.map(self.reduce, gradients)

    def accumulate(self, sensitivity: Tensor, batch: tuple) -> tuple:
        """Sums over this rank's micro-batches, one after the other so that only one's activations are alive."""
        loss_sum = weight_sum = self.one * 0.0
        total = ()
        rows = batch[0].shape[0] // self.accumulation
        for number in range(self.accumulation):
            piece = ()
            for tensor in batch:
                piece = piece + (ops.depend(tensor[number * rows:(number + 1) * rows], weight_sum),)
            loss, weight, gradients, _ = self.block(sensitivity, True, *piece)
            if number == 0:
                total = gradients
            else:
                total = self.map(ops.add, total, gradients)
            loss_sum = loss_sum + loss * weight
            weight_sum = ops.depend(weight_sum + weight, total)
        return loss_sum, weight_sum, total


class GlobalNorm(nn.Cell):
    """Euclidean norm of all gradients together, float32.

    `sqrt(sum_p sum(g_p^2) / replicas_p)`, summed over the ranks of `groups`: a gradient that is replicated on k ranks
    of the groups is counted k times by the sum, hence divided by k (rule of the released PanGu-alpha code).

    Args:
        replicas: for each gradient, on how many ranks of the groups the same values are; infinite = it does not count.
        groups: communication groups over which partial sums are added, one after the other.
    """

    def __init__(self, replicas: Sequence[float], groups: Sequence[str] = ()) -> None:
        super().__init__(auto_prefix=False)
        self.shares = tuple(1.0 / count for count in replicas)
        self.map = ops.HyperMap()
        self.reduces = tuple(ops.AllReduce(ops.ReduceOp.SUM, group) for group in groups)
        self.kernel = squares_kernel()

    def construct(self, gradients: tuple) -> Tensor:
        """Scalar norm; not finite as soon as one gradient of one rank is not."""
        if self.kernel is None:
            total = ops.addn(self.map(shared_square, gradients, self.shares))
        else:
            total = ops.addn(self.map(ops.partial(kernel_square, self.kernel), gradients, self.shares))
        for reduce in self.reduces:
            total = reduce(total)
        return ops.sqrt(total)


def shared_square(gradient: Tensor, share: float) -> Tensor:
    """A gradient's sum of squares times `share`."""
    square = sum_of_squares(ops.cast(gradient, ms.float32))
    if share != 1.0:
        square = square * share
    return square


def kernel_square(kernel: ops.Primitive, gradient: Tensor, share: float) -> Tensor:
    """`shared_square` in one pass over memory, on the CPU."""
    square = ops.reshape(kernel(ops.cast(gradient, ms.float32)), ())
    if share != 1.0:
        square = square * share
    return square


def times(factor: Tensor, gradient: Tensor) -> Tensor:
    """gradient x factor, in the gradient's type."""
    return gradient * ops.cast(factor, gradient.dtype)


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum over all elements of x^2, dim by dim from the last: fewer float32 additions into one large sum."""
    x = ops.square(x)
    for _ in range(len(x.shape)):
        x = ops.reduce_sum(x, -1)
    return x


class LossScale(nn.Cell):
    """The scale of the loss and how it moves: halved by a non-finite step, doubled after a clean window (dynamic)."""

    def __init__(self, settings: LossScaleSettings, precision: str) -> None:
        super().__init__(auto_prefix=False)
        kind = settings.name if settings.name != "auto" else ("dynamic" if precision == "fp16" else "none")
        self.kind, self.dynamic = kind, kind == "dynamic"
        self.factor, self.window = settings.factor, settings.window
        first = 1.0 if kind == "none" else settings.initial
        self.value = Parameter(Tensor(first, ms.float32), name="loss_scale", requires_grad=False)
        self.clean_steps = Parameter(Tensor(0, ms.int32), name="loss_scale_clean_steps", requires_grad=False)

    def construct(self, finite: Tensor) -> Tensor:
        """Moves the scale after a step; returns the new one."""
        if not self.dynamic:
            return self.value
        clean = self.clean_steps + 1
        grow = clean >= self.window
        next_value = ops.select(finite, ops.select(grow, self.value * self.factor, self.value * 1.0),
                                ops.maximum(self.value / self.factor, Tensor(1.0, ms.float32)))
        next_clean = ops.select(ops.logical_and(finite, ops.logical_not(grow)), clean, clean * 0)
        ops.assign(self.clean_steps, next_clean)
        return ops.assign(self.value, next_value)


class TrainStep(nn.Cell):
    """`step(*batch) -> (loss, global_norm, finite, loss_scale, learning_rate)`, all scalars.

    A step whose gradients are not all finite (on any rank) leaves parameters, moments and `step` as they were and
    lowers a dynamic loss scale; `iteration` counts it all the same. `global_norm` is that of the unscaled gradients
    before clipping.

    Args:
        network: the network with its loss (see the top of this file).
        optimizer: made from `network.trainable_params()`.
        settings: accumulation, clip norm, loss scale, precision, seed.
        weighted: whether the network returns (loss, weight).
        group, rank, ranks: data-parallel group, this rank's index in it and its size.
        gradient: replaces `MeanGradient` (a pipeline accumulates by itself).
        norm: replaces the `GlobalNorm` of unsharded gradients.
    """

    def __init__(self, network: nn.Cell, optimizer: Optimizer, settings: TrainSettings, *, weighted: bool = False,
                 group: str | None = None, rank: int = 0, ranks: int = 1, gradient: nn.Cell | None = None,
                 norm: nn.Cell | None = None) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        parameters = ParameterTuple(network.trainable_params())
        self.numbered = connect_dropout(network, settings.seed)
        self.gradient = gradient or MeanGradient(BlockGradient(network, parameters, weighted), settings.accumulation,
                                                 group, ranks)
        self.norm = norm or GlobalNorm(replicas_in_norm(parameters))
        self.optimizer = optimizer
        self.loss_scale = LossScale(settings.loss_scale, settings.precision)
        self.clip_norm = settings.clip_norm
        # Gradients then need no multiplication, which would go through all of them.
        self.unscaled = (gradient is None and self.loss_scale.kind == "none" and settings.clip_norm is None
                         and settings.accumulation * ranks == 1)
        # Maps, not loops: a loop over n gradients that builds tuples makes the compiler hold n^2 nodes.
        self.map = ops.HyperMap()
        self.weighted, self.group, self.rank, self.ranks = weighted, group, rank, ranks
        self.share = (rank, ranks)  # which rows of a global batch this process is fed with
        self.step = Parameter(Tensor(0, ms.int32), name="step", requires_grad=False)
        self.iteration = Parameter(Tensor(0, ms.int32), name="iteration", requires_grad=False)
        self.last = last_reduction()
        self.set_train(True)

    def construct(self, *batch: Tensor) -> tuple:
        """batch: this rank's rows of the global batch, micro-batches after each other."""
        scalars, _, _ = self.advance(batch)
        return scalars

    def advance(self, batch: tuple) -> tuple:
        """(the five scalars, gradients, factor) of a step; `gradients * factor` are the clipped gradients of the mean
        loss, the norm is that before clipping."""
        scale = Tensor(1.0, ms.float32)
        if not self.unscaled:
            scale = self.loss_scale.value * scale
        loss, gradients, factor, rows = self.gradient(scale, *batch)
        factor = factor / scale
        norm, finite = self.measure(gradients, factor)
        if self.clip_norm is not None:
            factor = factor * (self.clip_norm / ops.maximum(norm, Tensor(self.clip_norm, ms.float32)))
        rate = self.optimizer.learning_rate(self.step)
        if self.last is not None:
            # What a branch asks for, so that it comes before the branch, where the other AllReduces are.
            finite = ops.depend(finite, self.last(ops.depend(rate, (loss, norm))))
        self.apply_gradients(gradients, factor, finite, rows)
        return (loss, norm, finite, scale, rate), gradients, factor

    def measure(self, gradients: tuple, factor: Tensor) -> tuple:
        """(norm of `gradients * factor`, whether the step counts)."""
        norm = self.norm(gradients) * factor
        return norm, ops.isfinite(norm)

    def apply_gradients(self, gradients: tuple, factor: Tensor, finite: Tensor, rows: tuple) -> Tensor:
        """Moves parameters, moments and counters, or the counters alone if the step is not `finite`; returns the new
        `iteration`, since a None that comes out of a branch is made by Python on the host, which no device takes."""
        if finite:
            self.update(gradients, factor, rows)
        iteration = ops.assign(self.iteration, ops.depend(self.iteration, finite) + 1)
        if self.loss_scale.dynamic:
            self.loss_scale(finite)
        return iteration

    def update(self, gradients: tuple, factor: Tensor, rows: tuple) -> Tensor:
        """Moves parameters, moments and `step`."""
        if not self.unscaled:
            gradients = self.map(ops.partial(times, factor), gradients)
        done = self.optimizer(gradients, self.step, None, rows)
        return ops.assign(self.step, ops.depend(self.step, done) + 1)

    def counters(self) -> list[Parameter]:
        """The scalars of the step that a checkpoint keeps."""
        return [self.step, self.iteration, self.loss_scale.value, self.loss_scale.clean_steps]
