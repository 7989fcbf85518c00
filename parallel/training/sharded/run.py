"""A sharded network on real devices: what the trainer needs beside the step where every process holds slices.

Everything here that MindSpore can do without an Ascend device is tried by the tests in a simulated cluster: building,
compiling, start values, checkpoints, resuming. Executing the step is not: compiled, not run. On NVIDIA GPUs it runs, as
an experiment (docs/mindspore_cuda.md).
"""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.graph.api import _cell_graph_executor

from parallel.checkpoint.writing import Holder
from parallel.common.errors import UserError
from parallel.layers.dropout import drops
from parallel.layers.parameter import start_value
from parallel.sharding.config import ParallelConfig, divides
from parallel.sharding.layout import Axes
from parallel.sharding.parallelize import parallelize, recompute
from parallel.sharding.slices import Extent, holders, sharded_parameters
from parallel.sharding.trainable import is_weighted, shared_parameters
from parallel.task import Input, Task
from parallel.training.data_source import SAMPLE_NUMBERS
from parallel.training.device import DeviceSum, Processes
from parallel.training.one_stream import OneStream, on_gpu
from parallel.training.operation.stall import waiting
from parallel.training.settings import TrainSettings
from parallel.training.sharded.step import ShardedStep, input_shapes, micro_batches, sharded_step, switch_on


def needs_sharding(config: ParallelConfig, processes: Processes) -> bool:
    """Whether a run takes the step of a sharded network: everything but what `unsharded_network` does.

    Raises:
        UserError: it does, and the processes run on the CPU, where MindSpore shards nothing, or there is one.
    """
    sharded = config.beyond_data()
    if sharded and (processes.target == "CPU" or config.world == 1):
        what = "on the CPU MindSpore runs data parallelism only"
        hint = "parallel.backend=torch (or auto) runs the others"
        if processes.target != "CPU":
            what, hint = f"one {processes.target} device runs an unsharded network", "set it to 1"
        raise UserError(what, where="parallel", hint=hint,
                        value=", ".join(f"{name} {degree}" for name, degree in sharded.items()))
    if processes.target == "CPU" or config.world == 1:
        return False
    # The partitioner does these, and the dry run shows how.
    return bool(sharded) or config.fuses_otherwise or config.recompute.policy != "none" \
        or config.pipeline.micro_batches > 1


def unsharded_network(network: nn.Cell, settings: TrainSettings, config: ParallelConfig) -> TrainSettings:
    """Does with an unsharded network, on one device or under plain data parallelism, what the block asks for: its
    layers are marked for recomputation; the settings that come back have its micro-batches.

    Args:
        network: with its loss; marked in place.
        settings: the `train:` block.
        config: resolved.

    Raises:
        UserError: recomputation of a network without layers, or with dropout; micro-batches that do not divide the
            batch.
    """
    if config.recompute.policy != "none" and drops(network):
        raise UserError("MindSpore 2.9 does not compile the recomputation of a whole network with dropout",
                        where="parallel.recompute.policy", value=config.recompute.policy,
                        hint="parallel.backend=torch (or auto) runs it; or set it to none, or model.dropout to 0")
    recompute(network, config)
    count = micro_batches(settings, config)
    divides(count * config.data, settings.global_batch_size, where="train.global_batch_size", what="the global batch",
            hint="it must divide by data x micro-batches")
    return settings.model_copy(update={"accumulation": count})


class ShardedRun:
    """The training step of a sharded network on this process's device.

    After construction the step is compiled and every parameter of this process's stage holds its slice of the start
    values, which are those of one device.

    Args:
        task: as a package's `build` made it.
        settings: the `train:` block.
        config: resolved.
        processes: this process among all.
        validated, scored: whether the loss without gradients, or a ranker's scores, are wanted too.
        all_reduce: adds lists of floats over all processes; None = AllReduce on the device.

    Attributes: `cell`, what is called with this process's rows; `step`, the step in it; `holder`, for checkpoints;
    `reads`, whether a graph of this process looks at a batch (see `Backend`).
    """

    def __init__(self, task: Task, settings: TrainSettings, config: ParallelConfig, processes: Processes, *,
                 validated: bool = False, scored: bool = False,
                 all_reduce: Callable[[list[float]], list[float]] | None = None) -> None:
        self.task, self.settings, self.config, self.processes = task, settings, config, processes
        self.stage, place = divmod(processes.rank, config.data * config.op)
        self.rows = (place // config.op, config.data)
        self.all_reduce = all_reduce or DeviceSum(processes.group)
        listed = sharded_parameters(task.network, config)
        full_parameters = {full.name: full for full in listed}
        # MindSpore's CUDA backend cannot call a graph that micro-batches share.
        self.cell = sharded_step(task, settings, config, start_values=True, reuse=processes.target != "GPU")
        self.step: ShardedStep = self.cell.network
        self.step.rank, self.step.ranks, self.step.group = processes.rank, processes.ranks, processes.group
        self.step.share = self.rows
        self.full_parameters, self.copies_are_old = full_parameters, False
        extents = {name: full.slice_of_rank(processes.rank) for name, full in full_parameters.items()}
        self.holder = Holder(processes.rank, processes.ranks,
                             {name: extent for name, extent in extents.items() if extent is not None},
                             {name: full.shape for name, full in full_parameters.items()}, self.barrier,
                             lambda: holders(listed, config, processes.rank))
        self.inputs = [Tensor(np.zeros(shape, item.dtype))
                       for shape, item in zip(input_shapes(task, settings, config), task.inputs, strict=True)]
        # From here on parameters have the shape of their slices, which MindSpore would shard again in another graph: so
        # the loss comes first.
        self.loss = self._compiled("loss") if validated else None
        self.scores = self._compiled("scores") if scored else None
        self.cell.set_train(True)
        self.cell.compile(*self.inputs)
        self.give_start_values()
        between = 0 < self.stage < config.pipeline.stages - 1
        arrays = sum(item.name != SAMPLE_NUMBERS for item in task.inputs)
        self.reads = not between or any(reads_batches(cell, arrays) for cell in (self.cell, self.loss, self.scores)
                                        if cell is not None)

    @property
    def reports_loss(self) -> bool:
        """Whether this process reports the loss, which every process of the last stage knows of the global batch."""
        return self.processes.rank == (self.config.pipeline.stages - 1) * self.config.data * self.config.op

    def give_start_values(self) -> None:
        """Gives every parameter of this stage its slice of what one device starts from. While compiling MindSpore gave
        the moments their start, and slices random values that depend on the layout."""
        for parameter in self.task.network.get_parameters():
            if parameter.name in self.holder.extents:
                full = start_value(parameter.name, self.holder.shapes[parameter.name], parameter.start,
                                   self.settings.seed)
                put_slice(parameter, full[_slices(self.holder.extents[parameter.name])])

    def refresh_copies(self) -> None:
        """Gives stages that borrow a parameter its values of now; called by all processes. A step sends them along; the
        graphs without gradients do not, and read what the borrower keeps, which drifts."""
        if not self.copies_are_old:
            return
        self.copies_are_old = False
        per_stage = self.config.data * self.config.op
        for parameter, cells in shared_parameters(self.task.network) if self.config.pipeline.stages > 1 else []:
            owner, own = min(cell.pipeline_stage for cell in cells), parameter.name in self.holder.extents
            rule = self.full_parameters[parameter.name].slice_of_rank
            extent = rule(owner * per_stage + self.processes.rank % per_stage)
            value = np.zeros([last - first for first, last in extent], ms.dtype_to_nptype(parameter.dtype))
            if self.stage == owner:
                value = parameter.asnumpy()
            with waiting(f"the stages' sum of {parameter.name}"):
                value = self.step.gradient.sum_over_stages.everywhere(value)
            if own and self.stage != owner:
                put_slice(parameter, value)

    def barrier(self) -> None:
        """Returns when all processes have called it."""
        self.all_reduce([0.0])

    def _compiled(self, graph: str) -> nn.Cell:
        """The loss without its gradient, or the scores, on this process's rows of a batch."""
        cell, fed = _evaluation_cell(self.task, self.config, graph)
        given = {item.name: tensor for item, tensor in zip(self.task.inputs, self.inputs, strict=True)}
        cell.compile(*(given[item.name] for item in fed))
        return cell


def evaluation_graph(task: Task, config: ParallelConfig, graph: str) -> tuple[nn.Cell, list[Input]]:
    """The sharded network without gradients, dropout off, ready to compile, and the inputs that it takes.

    Args:
        task: as a package's `build` made it; its network is sharded in place.
        config: resolved.
        graph: "loss" (`ForwardLoss`) or "scores" (the cell that `task.scores` makes).
    """
    parallelize(task.network, config)
    return _evaluation_cell(task, config, graph)


def inference_graph(task: Task, config: ParallelConfig) -> nn.Cell:
    """The sharded network of a task of `ModelPackage.inference`, ready to compile; see `evaluation_graph`."""
    network = parallelize(task.network, config)
    # Where the graph broadcasts the result, the others add zeros of another shape.
    sharded = switch_on(network, config, [(1,) * len(item.shape) for item in task.inputs], False, broadcast=False)
    sharded.set_train(False)
    return sharded


def _evaluation_cell(task: Task, config: ParallelConfig, graph: str) -> tuple[nn.Cell, list[Input]]:
    fed = [item for item in task.inputs if item.name != SAMPLE_NUMBERS]
    cell = ForwardLoss(task.network)
    if graph == "scores":
        cell = task.scores(task.network)
        cell.apply_sharding(Axes(config))
        fed = fed[:cell.inputs]
    if on_gpu() and config.data * config.op > 1:
        divides(config.data * config.op, fed[0].shape[0], where="train.global_batch_size", what="the global batch",
                hint="on GPUs it must divide by data x op")
        cell = OneStream(cell, config.data * config.op, len(fed[0].shape))
    degrees = [(config.data, *[1] * (len(item.shape) - 1)) for item in fed]
    # The last stage gives the result. Broadcast by the graph, it would meet zeros sharded over two devices of a
    # stage, whatever the result's own shape: no rank would ever have it.
    sharded = switch_on(cell, config, degrees, False, broadcast=False)
    sharded.set_train(False)
    return sharded, fed


class ForwardLoss(nn.Cell):
    """The mean loss of a batch, and its weight where the network has one (else 1): float32 [2]."""

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.weighted = network, is_weighted(network)
        self.cast, self.reshape, self.join = ops.Cast(), ops.Reshape(), ops.Concat()

    def construct(self, *batch: Tensor) -> Tensor:
        if self.weighted:
            loss, weight = self.network(*batch)
        else:
            loss = self.network(*batch)
            weight = ops.ones_like(loss)
        parts = self.reshape(self.cast(loss, ms.float32), (1,)), self.reshape(self.cast(weight, ms.float32), (1,))
        return self.join(parts)


def reads_batches(cell: nn.Cell, arrays: int) -> bool:
    """Whether the compiled graph of a cell looks at any of its first `arrays` inputs, the arrays of a batch."""
    from mindspore.train import mind_ir_pb2

    model = mind_ir_pb2.ModelProto()
    model.ParseFromString(_cell_graph_executor._get_func_graph_proto(cell, cell.phase_cache[cell.phase], "mind_ir"))
    names = {item.name for item in model.graph.input[:arrays]}
    return any(name.removeprefix("REF::") in names for node in model.graph.node for name in node.input)


def put_slice(parameter: Parameter, value: np.ndarray) -> None:
    """Sets a sliced parameter, whose Python object may still have the full shape."""
    parameter.set_data(Tensor(np.ascontiguousarray(value), parameter.dtype), slice_shape=True)


def _slices(extent: Extent) -> tuple[slice, ...]:
    return tuple(slice(*pair) for pair in extent)
