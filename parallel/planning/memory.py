"""What one rank holds and communicates in a step: parameters, states, gradients, activations, collectives.

`parallel.planning.cost.network` knows one micro-batch of every unit; here units are put on stages and the choices that
come on
top are added: pipeline, micro-batches, recomputation, optimizer parallelism. The figures mean what the dry run's mean
(`parallel.proof.dryrun.accounting`), so the two can be held against each other; two kinds that a graph
before memory planning does not show are listed apart: copies of weights in the compute type, and communication
buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from parallel.planning.cost.network import NetworkCost
from parallel.planning.cost.segments import Collective, Segment, SegmentCost
from parallel.planning.describe import WIDTH, Description, ParameterCount
from parallel.planning.mesh import Mesh
from parallel.planning.shapes import Dim, Dims
from parallel.planning.timeline import most_held
from parallel.sharding.config import ParallelConfig
from parallel.sharding.parallelize import stage_of_layers
from parallel.training.settings import OptimizerSettings

STATES = {"adamw": 2, "adam": 2, "lamb": 2, "adagrad": 1, "rmsprop": 1, "lazy_adam": 2, "rowwise_adagrad": 0, "sgd": 0}
"""Float32 states for each parameter (rmsprop with momentum has one more; rowwise_adagrad one a row, left out)."""
_SCALAR = 4


@dataclass
class Memory:
    """Bytes on one rank of a stage.

    `reused` is negative: gradients of a single micro-batch come layer by layer while that layer's activations and
    copies of weights go, so they are never all there at once. Micro-batches accumulate into gradients that are there
    all along.
    """

    parameters: int = 0
    optimizer: int = 0
    gradients: int = 0
    activations: int = 0
    weight_copies: int = 0
    communication: int = 0
    workspace: int = 0
    reused: int = 0

    @property
    def total(self) -> int:
        """Everything together."""
        return sum(vars(self).values())

    def parts(self) -> dict[str, int]:
        """By kind, for tables and JSON."""
        return {**vars(self), "total": self.total}


@dataclass(frozen=True)
class Slice:
    """One parameter on one rank.

    Args:
        full: bytes of what is left after the layers' sharding.
        bytes: bytes of what is stored, after the optimizer shard.
        replicas: factors of the mesh whose ranks hold the same slice before the optimizer shard.
        shard: factors of the optimizer's shards, () for none.
    """

    count: ParameterCount
    full: int
    bytes: int
    replicas: tuple[int, ...]
    shard: tuple[int, ...]


def parameter_slices(description: Description, mesh: Mesh) -> list[Slice]:
    """Every trainable parameter as one rank holds it."""
    config, slices = mesh.config, []
    for item in description.parameters:
        dims = parameter_layout(item, mesh)
        full = mesh.local(dims) * WIDTH[item.dtype]
        replicas = mesh.rest(dims)
        shard = _shard(item, dims, full, replicas, mesh, config)
        slices.append(Slice(item, full, full // mesh.degree(shard), replicas, shard))
    return slices


def parameter_layout(item: ParameterCount, mesh: Mesh) -> Dims:
    """Full dims with the factors that shard them: those of the first primitive that takes the parameter."""
    placed = mesh.placement(list(item.order))
    return tuple(Dim(size, placed.get(axis, ()) if axis else ()) for size, axis in zip(item.shape, item.axes,
                                                                                       strict=True))


def _shard(item: ParameterCount, dims: Dims, full: int, replicas: tuple[int, ...], mesh: Mesh,
           config: ParallelConfig) -> tuple[int, ...]:
    """Factors of the optimizer shard: dim 0 of the slice must divide; -1 takes every rank that holds the same slice."""
    wanted = config.optimizer_shard
    if wanted <= 1 or not item.shard_optimizer or not dims or full < config.optimizer.threshold_kb * 1024:
        return ()
    shard = replicas
    if wanted != config.data:
        while shard and mesh.degree(shard) > wanted:
            shard = shard[1:]
        if mesh.degree(shard) != wanted:
            return ()
    first = -(-dims[0].size // mesh.degree(dims[0].axis))
    return shard if shard and mesh.degree(shard) > 1 and first % mesh.degree(shard) == 0 else ()


def stages_of_units(units: int, config: ParallelConfig) -> list[int]:
    """Stage of every pipeline unit."""
    if units == 1 or config.pipeline.stages == 1:
        return [0] * units
    stages = stage_of_layers(units - 2, config)
    return [stages[0][0], *(stage for stage, _ in stages), stages[-1][0]]


def chunks_of_units(units: int, config: ParallelConfig) -> list[int]:
    """Chunk of every unit within its stage under the interleaved schedule."""
    if units == 1 or config.pipeline.stages == 1:
        return [0] * units
    stages = stage_of_layers(units - 2, config)
    return [stages[0][1], *(chunk for _, chunk in stages), stages[-1][1]]


def is_recomputed(unit: int, units: int, config: ParallelConfig) -> bool:
    """Whether a unit's activations are thrown away: layers under `full`."""
    return config.recompute.policy == "full" and (units == 1 or 0 < unit < units - 1)


@dataclass
class Stage:
    """One rank of one stage.

    Args:
        memory: bytes by kind.
        collectives: all of one step with how often they run.
        parameters: elements of this stage's model part, uncut.
        tensors: its parameters.
        copied: elements that have a half-precision copy.
        tied: elements that several of the stage's units use.
    """

    memory: Memory = field(default_factory=Memory)
    collectives: Counter = field(default_factory=Counter)
    parameters: int = 0
    tensors: int = 0
    copied: int = 0
    tied: int = 0


class Holdings:
    """All parameters under one mesh and optimizer shard, added up by the units that use them.

    Args:
        slices: `parameter_slices`.
        mesh: the mesh they were made with.
        optimizer: whose states they have.
    """

    def __init__(self, slices: list[Slice], mesh: Mesh, optimizer: OptimizerSettings) -> None:
        self.optimizer = optimizer.name
        self.states = STATES[optimizer.name] + (1 if optimizer.name == "rmsprop" and optimizer.momentum else 0)
        groups: dict[tuple[int, ...], list[Slice]] = {}
        for item in slices:
            groups.setdefault(item.count.shared_units, []).append(item)
        self.groups = [(units, members, self._sum(members, mesh)) for units, members in groups.items()]

    def _sum(self, members: list[Slice], mesh: Mesh) -> Stage:
        total = Stage()
        for item in members:
            total.memory.parameters += item.bytes
            total.memory.optimizer += self.states * 4 * (item.bytes // WIDTH[item.count.dtype])
            total.memory.gradients += item.full
            total.parameters += item.full // WIDTH[item.count.dtype]
            total.tensors += 1
            if item.count.cast not in (None, item.count.dtype):
                total.memory.weight_copies += item.full // WIDTH[item.count.dtype] * WIDTH[item.count.cast]
                total.copied += item.full // WIDTH[item.count.dtype]
            _gradient(total, item, mesh)
        return total


def stage_figures(description: Description, cost: NetworkCost, config: ParallelConfig, micro_batches: int,
                  holdings: Holdings, stage: int) -> Stage:
    """Memory and collectives of one rank of `stage` in one step."""
    figures = Stage()
    homes = stages_of_units(description.units, config)
    _parameters(figures, holdings, config, micro_batches, homes, stage)
    _activations(figures, description, cost, config, micro_batches, stage, homes)
    _crossing(figures, description, cost, micro_batches, stage, homes)
    _norm(figures, cost.mesh, config)
    memory = figures.memory
    memory.communication = 2 * max((entry.bytes for entry in figures.collectives), default=0)
    if micro_batches == 1:
        memory.reused = -min(memory.gradients, memory.activations + memory.weight_copies)
    return figures


def _parameters(figures: Stage, holdings: Holdings, config: ParallelConfig, micro_batches: int, homes: list[int],
                stage: int) -> None:
    memory = figures.memory
    for units, members, total in holdings.groups:
        shared = {homes[unit] for unit in units}
        if stage not in shared:
            continue
        memory.parameters += total.memory.parameters
        memory.optimizer += total.memory.optimizer
        if config.optimizer.level == 3:  # gathered for one layer at a time
            memory.weight_copies = max(memory.weight_copies, total.memory.weight_copies)
        else:
            memory.weight_copies += total.memory.weight_copies
        # Micro-batches accumulate full gradients; a single one's are sharded as they come.
        full = micro_batches > 1 and config.optimizer.level == 1
        memory.gradients += total.memory.gradients if full else total.memory.parameters
        figures.parameters += total.parameters
        figures.tensors += total.tensors
        figures.copied += total.copied
        if len(units) > 1 and len(shared) == 1:
            figures.tied += total.parameters
        if stage == min(shared) or config.optimizer_shard > 1:
            # Else a borrower sends its part as it is: the owner sums over the ranks once they are added.
            for collective, times in total.collectives.items():
                figures.collectives[collective] += times * _times_a_step(collective, config, micro_batches)
        if len(shared) > 1:
            there, back = ("Send", "Receive") if stage == min(shared) else ("Receive", "Send")
            for item in members:
                figures.collectives[Collective(there, (), item.full, "pipeline", "forward", "parameter")] += 1
                figures.collectives[Collective(back, (), item.full, "pipeline", "backward", "parameter")] += 1


def _times_a_step(collective: Collective, config: ParallelConfig, micro_batches: int) -> int:
    """How often weights or gradients travel: level 2 scatters the gradients of every micro-batch, level 3 gathers the
    weights for every micro-batch as well."""
    if collective.dimension != "optimizer" or config.optimizer.level == 1:
        return 1
    return micro_batches if collective.kind == "ReduceScatter" or config.optimizer.level == 3 else 1


def _gradient(figures: Stage, item: Slice, mesh: Mesh) -> None:
    """The gradient's sum over the ranks that hold the same slice, and the gathering of what was sharded."""
    if mesh.degree(item.replicas) == 1:
        return
    if not item.shard:
        dimension = "data" if set(item.replicas) & mesh.data_factors else "op"
        figures.collectives[Collective("AllReduce", item.replicas, item.full, dimension, "backward", "gradient")] += 1
        return
    cast = WIDTH[item.count.cast or item.count.dtype]
    gathered = item.full // WIDTH[item.count.dtype] * cast
    figures.collectives[Collective("ReduceScatter", item.shard, item.full, "optimizer", "backward", "gradient")] += 1
    figures.collectives[Collective("AllGather", item.shard, gathered, "optimizer", "forward", "parameter")] += 1
    if mesh.config.optimizer.level == 3 and item.count.user != "Add":  # a bias is not read backward
        figures.collectives[Collective("AllGather", item.shard, gathered, "optimizer", "backward", "parameter")] += 1
    rest = tuple(factor for factor in item.replicas if factor not in item.shard)
    if mesh.degree(rest) > 1:
        figures.collectives[Collective("AllReduce", rest, item.bytes, "data", "backward", "gradient")] += 1


def _activations(figures: Stage, description: Description, cost: NetworkCost, config: ParallelConfig,
                 micro_batches: int, stage: int, homes: list[int]) -> None:
    kept: list[dict[tuple, int]] = [{} for _ in range(config.pipeline.interleave)]
    chunks = chunks_of_units(description.units, config)
    for segment, part in zip(cost.segments, cost.costs, strict=True):
        if homes[segment.unit] != stage:
            continue
        again = is_recomputed(segment.unit, description.units, config)
        for number, dims, size in kept_on_stage(segment, part, again, description, cost, homes):
            kept[chunks[segment.unit]][id(segment.items[number].value), dims] = size
            if again and size < cost.mesh.local(dims) * WIDTH[segment.items[number].dtype]:
                figures.collectives[_gather_back(cost.mesh, size)] += micro_batches
        figures.memory.workspace = max(figures.memory.workspace, _workspace(part, again))
        for collective, times in part.collectives.items():
            if collective.phase != "recompute" or (again and config.recompute.communication):
                figures.collectives[collective] += times * micro_batches
        if config.recompute.policy == "selective" and config.recompute.communication:
            for collective, times in part.selective_collectives.items():
                figures.collectives[collective] += times * micro_batches
        for (number, collective), times in part.arrivals.items():
            # A redistribution belongs to the cell whose result it brings on, and is run again with that cell.
            made_again = _is_made_again(segment.items[number].producer, description, config)
            if made_again and not again and config.recompute.communication:
                figures.collectives[replace(collective, phase="recompute")] += times * micro_batches
    figures.memory.activations = most_held([sum(chunk.values()) for chunk in kept], config.pipeline.schedule,
                                           config.pipeline.stages, stage, micro_batches)


def kept_on_stage(segment: Segment, part: SegmentCost, again: bool, description: Description, cost: NetworkCost,
                   homes: list[int]) -> Iterator[tuple[int, Dims, int]]:
    """(number, layout, bytes) of every tensor that one segment keeps."""
    config = cost.mesh.config
    for (number, dims), size in kept_of(part, again, config).items():
        producer = segment.items[number].producer
        from_recomputed = _is_made_again(producer, description, config)
        if from_recomputed and not again and (number, dims) in part.arrived_from:
            # What brings it here is run again, so it waits as it was made.
            dims = part.arrived_from[number, dims]
            size = cost.mesh.local(dims) * WIDTH[segment.items[number].dtype]
        if (from_recomputed and again and config.recompute.slice_activations and _can_be_sliced(cost.mesh, dims)
            and homes[description.operations[producer].unit] == homes[segment.unit]):
            size //= config.op
        yield number, dims, size


def _is_made_again(producer: int, description: Description, config: ParallelConfig) -> bool:
    """Whether the tensor that operation `producer` makes (-1: nobody) comes out of a layer that is recomputed."""
    if producer < 0:
        return False
    operation = description.operations[producer]
    return operation.layer and is_recomputed(operation.unit, description.units, config)


def _can_be_sliced(mesh: Mesh, dims: Dims) -> bool:
    """Whether the op axis, which does not shard a tensor yet, can shard its first dim on top of what does."""
    rest = mesh.rest(dims)
    first = -(-dims[0].size // mesh.degree(dims[0].axis))
    return mesh.degree(rest) == mesh.config.op > 1 and first % mesh.config.op == 0


def kept_of(part: SegmentCost, again: bool, config: ParallelConfig) -> dict[tuple, int]:
    """What a segment keeps for its backward pass under the config's recomputation."""
    if again:
        return part.kept_recomputed
    return part.kept_selective if config.recompute.policy == "selective" else part.kept


def _gather_back(mesh: Mesh, size: int) -> Collective:
    """What brings a sliced activation of `size` bytes back before it is recomputed from."""
    factors = tuple(factor for factor in mesh.everything if factor not in mesh.data_factors)
    return Collective("AllGather", factors, size * mesh.config.op, "op", "recompute")


def _workspace(part: SegmentCost, again: bool) -> int:
    """Beside what is kept: a few of the largest tensors, and under recomputation one unit's activations at a time."""
    return 3 * part.largest + (sum(part.kept.values()) if again else 0)


def _crossing(figures: Stage, description: Description, cost: NetworkCost, micro_batches: int, stage: int,
              homes: list[int]) -> None:
    """Tensors that another stage made or needs: one Send or Receive for each micro-batch and direction."""
    for item, unit, units in description.crossings:
        home = homes[unit]
        users = {homes[user] for user in units} - {home}
        if not users or stage not in (home, *users):
            continue
        size = cost.mesh.local(cost.layouts[id(item)]) * WIDTH[item.dtype]
        for user in users:
            if stage not in (home, user):
                continue
            there, back = ("Send", "Receive") if home == stage else ("Receive", "Send")
            figures.collectives[Collective(there, (), size, "pipeline", "forward", "stage")] += micro_batches
            if item.differentiable:
                figures.collectives[Collective(back, (), size, "pipeline", "backward", "stage")] += micro_batches


def _norm(figures: Stage, mesh: Mesh, config: ParallelConfig) -> None:
    if mesh.degree(mesh.everything) > 1 or config.pipeline.stages > 1:
        figures.collectives[Collective("AllReduce", mesh.everything, _SCALAR, "norm", "forward", "norm")] += 1
    if config.pipeline.stages > 1:
        figures.collectives[Collective("AllReduce", (), _SCALAR, "norm", "forward", "norm")] += 1
        # The last stage sends the others loss and weight.
        figures.collectives[Collective("AllReduce", (), 2 * _SCALAR, "pipeline", "forward", "loss")] += 1
