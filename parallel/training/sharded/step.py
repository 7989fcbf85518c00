"""The training step of a sharded network: one graph per rank under MindSpore's semi-automatic parallelism.

Here a network sees the global batch; the partitioner shards it, so nothing is averaged by hand over ranks. What differs
from `parallel.training.step` on one device: micro-batches run through the pipeline inside one graph, gradients are
accumulated in parameters of their own, and the norm is summed over slices by the framework, which knows each gradient's
layout.
"""

from __future__ import annotations

import math
import os

import mindspore as ms
from mindspore import ParameterTuple, Tensor, nn, ops
from mindspore.communication import get_rank
from mindspore.nn.utils import no_init_parameters
from mindspore.parallel.auto_parallel import AutoParallel

from parallel.common.errors import UserError
from parallel.sharding.config import ParallelConfig, divides
from parallel.sharding.parallelize import parallelize
from parallel.sharding.trainable import shared_parameters
from parallel.task import Input, Task
from parallel.training.one_stream import on_gpu
from parallel.training.optimizers.budget import holds_budget
from parallel.training.optimizers.row_gradients import row_tables, separated, slots_for
from parallel.training.optimizers.run import run_optimizer
from parallel.training.settings import TrainSettings
from parallel.training.sharded.micro_batches import Interleaved, LossAndWeight, MicroBatch, SumOverStages
from parallel.training.sharded.stage_only import held_parameters, leave_out_other_stages
from parallel.training.step import TrainStep, enable_weighted_loss, sum_of_squares

# Functions mapped over all gradients: a loop over a thousand of them would be analysed as a thousand nested calls.
_EXPAND = ops.ExpandDims().add_prim_attr("grad_scale", True)
_ZERO = ops.auto_generate.InplaceZero()
_marked_square_sum = ops.MultitypeFuncGraph("marked_square_sum")
_counted = ops.MultitypeFuncGraph("counted")
_clear = ops.MultitypeFuncGraph("clear")
_assign_zeros = ops.MultitypeFuncGraph("assign_zeros")


@_marked_square_sum.register("Tensor")
def _(gradient: Tensor) -> Tensor:
    return _EXPAND(sum_of_squares(ops.cast(gradient, ms.float32)), 0)


@_counted.register("Tensor", "Tensor", "Tensor")
def _(factor: Tensor, skipped: Tensor, gradient: Tensor) -> Tensor:
    return ops.masked_fill(gradient * ops.cast(factor, gradient.dtype), skipped, ops.cast(0.0, gradient.dtype))


@_clear.register("Tensor")
def _(accumulated: Tensor) -> Tensor:
    return _ZERO(accumulated)


@_assign_zeros.register("Tensor")
def _(accumulated: Tensor) -> Tensor:
    return ops.assign(accumulated, ops.zeros_like(accumulated))


class FullGradient(nn.Cell):
    """Gradients of the mean loss of one global batch without micro-batches; replaces `step.MeanGradient`.

    Args:
        network: (loss x weight, weight), as `LossAndWeight` gives them.
        parameters: what to differentiate by.
    """

    def __init__(self, network: nn.Cell, parameters: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        slots, self.row_numbers = slots_for(network, parameters)
        self.network, self.parameters = network, ParameterTuple(slots)
        # The plain form: the partitioner looks for exactly this shape of a forward graph (one tensor out).
        self.differentiate = ops.GradOperation(get_by_list=True, sens_param=True)
        self.first = Tensor([1.0, 0.0], ms.float32)
        # Left to itself the partitioner would shard even these two numbers.
        self.part, self.reshape = ops.StridedSlice().shard(((1,),)), ops.Reshape()

    def construct(self, sensitivity: Tensor, *batch: Tensor) -> tuple:
        """(loss, gradients, factor, rows) as `MeanGradient` gives them."""
        sums = self.network(*batch)
        gradients = self.differentiate(self.network, self.parameters)(*batch, sensitivity * self.first)
        loss, factor = self.mean(self.on_all_stages(sums, gradients))
        if len(self.row_numbers) > 0:
            gradients, rows = separated(gradients, self.row_numbers)
            return loss, gradients, factor, rows
        return loss, self.accumulated_by(gradients), factor, ()

    def on_all_stages(self, sums: Tensor, gradients: tuple) -> Tensor:
        """The network's result, where only the last stage has it."""
        return sums

    def accumulated_by(self, gradients: tuple) -> tuple:
        """Where the gradients are after all micro-batches."""
        return gradients

    def mean(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, 1 / weight) from [loss x weight, weight]."""
        total = self.reshape(self.part(sums, (0,), (1,), (1,)), ())
        factor = 1.0 / self.reshape(self.part(sums, (1,), (2,), (1,)), ())
        return total * factor, factor

    def clear(self) -> None:
        """Nothing is accumulated here."""


class PipelineGradient(FullGradient):
    """Gradients of the mean loss over micro-batches that run through one graph, weighed as in `step.MeanGradient`.

    Args:
        network: see `FullGradient`; of one micro-batch.
        parameters: what to differentiate by.
        config: resolved.
        micro_batches: micro-batches in one step.
        dims: dims of each input.
    """

    def __init__(self, network: nn.Cell, parameters: ParameterTuple, config: ParallelConfig, micro_batches: int,
                 dims: list[int]) -> None:
        many = config.pipeline.stages > 1
        wrapped = (nn.PipelineCell if many else nn.GradAccumulationCell)(network, micro_batches)
        wrapped.micro_inputs = nn.CellList([MicroBatch(micro_batches, dims, config.data, many)
                                            for _ in range(micro_batches)])
        for add in wrapped.add_list:
            add.shard(((1,), (1,)))
        super().__init__(wrapped, parameters)
        # The partitioner finds these by name and adds each micro-batch's gradient to them.
        self.accumulated = parameters.clone("accu_grads", init="zeros")
        for item in self.accumulated:
            item.sliced = not item.shape
        self.sharded = config.optimizer_shard > 1
        self.sum_over_stages = SumOverStages(config) if many else None
        self.map, self.on_gpu = ops.HyperMap(), on_gpu()

    def on_all_stages(self, sums: Tensor, gradients: tuple) -> Tensor:
        """The last stage's sums, on every stage."""
        if self.sum_over_stages is None:
            return sums
        if self.on_gpu:
            # On NVIDIA GPUs all of a rank's communication is one queue. Were the first stage to ask for the sum before
            # its backward pass, it would wait for the last stage, which waits for the first stage's activations.
            sums = ops.depend(sums, gradients)
        return self.sum_over_stages(sums)

    def accumulated_by(self, gradients: tuple) -> tuple:
        """The parameters that accumulate; under optimizer sharding the gradients, which the partitioner reduces."""
        return gradients if self.sharded else ops.depend(self.accumulated, gradients)

    def clear(self) -> None:
        """Sets the accumulated gradients back to 0 in place; on GPUs, which have no such kernel, zeros are assigned and
        cost their memory again."""
        self.map(_assign_zeros if self.on_gpu else _clear, self.accumulated)


class ShardedNorm(nn.Cell):
    """Global norm of gradients of which each rank holds slices; replaces `step.GlobalNorm`.

    The mark on ExpandDims makes the partitioner divide each sum of squares by the number of ranks that hold the same
    slice and add the total over the ranks of the stage and over the stages.

    Args:
        left_out: numbers of gradients that do not count on this rank (`borrowed`, `Task.given`), but make the norm NaN
            where they are not finite.
    """

    def __init__(self, left_out: tuple[int, ...] = ()) -> None:
        super().__init__(auto_prefix=False)
        self.left_out = left_out
        self.map, self.add, self.root, self.reshape = ops.HyperMap(), ops.AddN(), ops.Sqrt(), ops.Reshape()

    def construct(self, gradients: tuple) -> Tensor:
        """Scalar norm; not finite as soon as one gradient of one rank is not."""
        squares = self.map(_marked_square_sum, gradients)
        for number in self.left_out:
            # Times 0 and not taken out: the norm must go on waiting for the Send of this gradient to its owner, or its
            # AllReduce between the stages may come first and both stages wait for ever.
            squares = squares[:number] + (squares[number] * 0.0,) + squares[number + 1:]
        return self.reshape(self.root(self.add(squares)), ())


def borrowed(network: nn.Cell, parameters: ParameterTuple, config: ParallelConfig) -> tuple[int, ...]:
    """Numbers (largest first) of the parameters that this rank's stage only borrows from an earlier one.

    The partitioner sends a shared parameter from its first stage to the others at every step and their gradients back,
    where they are added. What the others keep is a copy that nobody reads; its partial gradient must not enter the
    norm a second time.
    """
    shared = shared_parameters(network)
    if config.pipeline.stages == 1 or not shared:
        return ()
    stage = get_rank() // (config.data * config.op)
    copies = {parameter.name for parameter, cells in shared
              if min(cell.pipeline_stage for cell in cells) < stage}
    return tuple(i for i in reversed(range(len(parameters))) if parameters[i].name in copies)


class ShardedStep(TrainStep):
    """`TrainStep` in one flat graph: a skipped step keeps its values by selection, not by a branch.

    The partitioner drops other stages' gradients from a graph, which a branch over all gradients does not survive.
    """

    map = ops.HyperMap()

    def apply_gradients(self, gradients: tuple, factor: Tensor, finite: Tensor, rows: tuple) -> Tensor:
        """See `TrainStep.apply_gradients`."""
        counted = self.map(ops.partial(_counted, factor, ops.logical_not(finite)), gradients)
        self.optimizer(counted, self.step, finite, rows)
        ops.assign(self.step, self.step + ops.cast(finite, ms.int32))
        iteration = ops.assign(self.iteration, self.iteration + 1)
        self.loss_scale(finite)
        self.gradient.clear()
        return iteration


def micro_batches(settings: TrainSettings, config: ParallelConfig) -> int:
    """Micro-batches in one step: those of the pipeline, or of gradient accumulation where there is no pipeline.

    Raises:
        UserError: both are asked for, and differ.
    """
    if config.pipeline.stages > 1 and settings.accumulation not in (1, config.pipeline.micro_batches):
        raise UserError("under pipeline stages the micro-batches accumulate", where="train.accumulation",
                        value=settings.accumulation, hint="set it to 1 and use parallel.pipeline.micro_batches")
    return max(config.pipeline.micro_batches, settings.accumulation)


def sharded_step(task: Task, settings: TrainSettings, config: ParallelConfig, *, reuse: bool = True,
                 start_values: bool = False, stage: int | None = None) -> AutoParallel:
    """The training step of `task` sharded by `config`, ready to compile or run on rank `RANK_ID` of `RANK_SIZE`.

    Its inputs are those of the task, this rank's rows of them (`input_shapes`).

    Args:
        task: as a package's `build` made it; its network is sharded in place.
        settings: the `train:` block.
        config: resolved for the world.
        reuse: micro-batches share one copy of the network's graph until the back end (faster compile, same result),
            unless the network's `shares_graph` or `mindspore.share_graph` is False; False inlines each (flat graph).
        start_values: True gives parameters their values while compiling; a proof needs none.
        stage: leave out the layers of other stages than this one, which the partitioner would drop (faster compile,
            same result for ranks of this stage; `parallel.training.sharded.stage_only`).
    """
    network, count = parallelize(task.network, config), micro_batches(settings, config)
    if stage is not None:
        leave_out_other_stages(network, config, stage)
    with no_init_parameters():
        parameters = ParameterTuple(held_parameters(network))
        gradient = gradient_of(network, parameters, config, count, task.inputs, reuse)
        optimizer = run_optimizer(parameters, settings, task.is_sparse, row_tables(network), given=task.given)
        given = [i for i in range(len(parameters)) if holds_budget(parameters[i])
                 or (task.given and task.is_sparse(parameters[i].name))]
        left_out = tuple(sorted({*borrowed(network, parameters, config), *given}, reverse=True))
        step = ShardedStep(network, optimizer, settings, gradient=gradient, norm=ShardedNorm(left_out))
    degree = [(config.data, *[1] * (len(item.shape) - 1)) for item in task.inputs]
    return switch_on(step, config, degree, start_values)


def needs_shared_graph(config: ParallelConfig, count: int) -> bool:
    """Whether MindSpore compiles the layout only with micro-batches that share one copy of the network's graph.

    Args:
        config: resolved.
        count: micro-batches.
    """
    scheduled = config.pipeline.stages > 1 and config.pipeline.schedule != "1f1b"
    return scheduled or (config.optimizer.level > 1 and count > 1)


def gradient_of(network: nn.Cell, parameters: ParameterTuple, config: ParallelConfig, count: int, inputs: list[Input],
                reuse: bool) -> FullGradient:
    """Forward and backward pass of a global batch in `count` micro-batches, each perhaps in interleaved parts."""
    dims, parts, size = [len(item.shape) for item in inputs], config.micro_batch_interleave, 1.0
    if enable_weighted_loss(network):
        size = 1.0 * math.prod(inputs[0].shape)
    wrapped = LossAndWeight.of(len(inputs), network, size)
    if parts > 1:
        wrapped = Interleaved.of(len(inputs), wrapped, parts, dims, config.data)
    if count == 1:
        return FullGradient(wrapped, parameters)
    if reuse and network.shares_graph and config.mindspore.share_graph:
        wrapped.cell_init_args = f"lazy_inline_{type(wrapped).__name__}"
    return PipelineGradient(wrapped, parameters, config, count, dims)


def switch_on(step: nn.Cell, config: ParallelConfig, inputs: list[tuple[int, ...]], start_values: bool, *,
              broadcast: bool = True) -> AutoParallel:
    """`step` under MindSpore's semi-automatic parallelism with the dimensions of `config`.

    Args:
        step: a training step.
        config: resolved.
        inputs: degrees by which each dim of each input is sharded.
        start_values: see `sharded_step`.
        broadcast: whether the last stage gives the others the result.
    """
    os.environ["PIPELINE_SLICE_SKIP_REDISTRIBUTION"] = "1"
    sharded = AutoParallel(step, "semi_auto")
    sharded.dataset_strategy(tuple(inputs))
    if config.optimizer_shard > 1:
        sharded.hsdp(shard_size=-1 if config.optimizer_shard == config.data else config.optimizer_shard,
                     threshold=config.optimizer.threshold_kb, optimizer_level=f"level{config.optimizer.level}")
    if config.pipeline.stages > 1:
        schedule = config.pipeline.schedule
        sharded.pipeline(config.pipeline.stages, output_broadcast=broadcast, interleave=schedule != "1f1b",
                         scheduler="1f1b" if schedule == "interleaved" else schedule)
    if not start_values:
        sharded.no_init_parameters_in_compile()
        # On one device MindSpore would fill them all the same, after compiling.
        sharded.init_parameters_data = _no_values
    sharded.set_train(True)
    return sharded


def _no_values(auto_parallel_mode: bool = False) -> dict:
    """In place of `Cell.init_parameters_data`: no parameter gets values."""
    return {}


def input_shapes(task: Task, settings: TrainSettings, config: ParallelConfig) -> list[tuple[int, ...]]:
    """Shape of each input on one rank: its rows of the global batch.

    Raises:
        UserError: the global batch does not divide, or the network does not take so large a micro-batch.
    """
    parts = micro_batches(settings, config) * config.data * config.micro_batch_interleave
    for item in task.inputs:
        divides(parts, item.shape[0], where="train.global_batch_size", what="the global batch",
                hint="it must divide by data x micro-batches x micro_batch_interleave")
    check_rows(task.most_rows, task.inputs[0].shape[0] // parts)
    return [(item.shape[0] // config.data, *item.shape[1:]) for item in task.inputs]


def check_rows(most: int | None, rows: int) -> None:
    """Raises a `UserError` if a device's micro-batch has more than `most` samples (None = any number)."""
    if most is not None and rows > most:
        raise UserError(f"a device's micro-batch has {rows} samples, and the network takes {most}",
                        where="train.global_batch_size", hint="more micro-batches, or a smaller model.most_documents "
                        "where attention is told where documents end")
