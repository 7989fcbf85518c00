"""Memory, communication and time of one training step of any model on a described cluster.

Conventions: model FLOPs are those of the matrix products of the forward pass, three times (backward twice the forward);
attention is counted in full (not halved for causality), recomputation is not counted; MFU = model FLOPs / (step seconds
x devices x peak). A token of a ranker is a sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from parallel.common.settings import load_settings
from parallel.layers.experts.routed import CapacityExperts
from parallel.planning.cluster import ClusterSettings, Network
from parallel.planning.cost.network import NetworkCost, network_cost
from parallel.planning.cost.segments import Collective, Segment, SegmentCost, segments
from parallel.planning.describe import Description, as_on_ascend, describe
from parallel.planning.memory import (
    Holdings,
    Memory,
    Stage,
    chunks_of_units,
    is_recomputed,
    parameter_slices,
    stage_figures,
    stages_of_units,
)
from parallel.planning.runtime.memory import by_walking
from parallel.planning.runtime.update import update_seconds
from parallel.planning.timeline import Timeline, bound, timeline
from parallel.sharding.config import ParallelConfig
from parallel.task import Task, load_run
from parallel.training.settings import COMPUTE_DTYPES, RunSettings, TrainSettings

_UPDATE_BYTES = 28  # float32: parameter, gradient and two moments read, three of them written


@dataclass
class Estimate:
    """One layout on one cluster.

    Args:
        config: resolved.
        micro_batches: in one step.
        memory: of each stage.
        step_seconds: of one optimizer step.
        parts: seconds of the slowest path by what they go for: compute, recompute, op, bubble, gradients, update.
        model_flops: of one step by the convention above.
        tokens: of one step.
        mfu, bubble: shares.
        communication_bytes: of one rank in one step by dimension (the largest over the stages).
        limit: bytes a device may take.
        timeline: of the pipeline, where it was worked out.
    """

    config: ParallelConfig
    micro_batches: int
    memory: list[Memory]
    step_seconds: float
    parts: dict[str, float]
    model_flops: float
    tokens: int
    mfu: float
    bubble: float
    communication_bytes: dict[str, int]
    limit: int
    timeline: Timeline | None = None
    stages: list[Stage] = field(default_factory=list)

    @property
    def devices(self) -> int:
        """Product of the axes."""
        return self.config.world

    @property
    def fullest(self) -> Memory:
        """Memory of the stage that holds most."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def missing(self) -> int:
        """Bytes by which the fullest stage does not fit; 0 or less = it fits."""
        return self.fullest.total - self.limit

    @property
    def tokens_per_second_per_device(self) -> float:
        """Tokens (samples) that one device gets through."""
        return self.tokens / self.step_seconds / self.devices


class Planner:
    """A model, its training settings and a cluster; works out layouts and remembers what they share.

    Args:
        build: `build(parallel, compute_dtype) -> Task` of one model.
        train: the `train:` block.
        cluster: the machine.
    """

    def __init__(self, build: Callable[[ParallelConfig, str], Task], train: TrainSettings,
                 cluster: ClusterSettings) -> None:
        self.train, self.cluster = train, cluster
        with as_on_ascend():
            self.task: Task = build(ParallelConfig(), COMPUTE_DTYPES[train.precision])
        # Routed experts split the batch into parts, one for each data-parallel rank, before the partitioner does.
        self.parted = [cell for _, cell in self.task.network.cells_and_names()
                       if isinstance(cell, CapacityExperts)]
        self._descriptions: dict[tuple, tuple[Description, list[Segment]]] = {}
        self._costs: dict[tuple, NetworkCost] = {}
        self._known_holdings: dict[tuple, Holdings] = {}
        full, parts = self.description(1, 1)
        plain = network_cost(full, ParallelConfig(), parts)
        self.model_flops = 3.0 * sum(cost.forward.flops for cost in plain.costs)
        self.units, self.parameters = full.units, full.parameter_count

    def description(self, micro_batches: int, data: int) -> tuple[Description, list[Segment]]:
        """The network for one micro-batch, traced once for each size."""
        key = (micro_batches, data if self.parted else 1)
        if key not in self._descriptions:
            for cell in self.parted:
                cell.parts = data
            found = describe(self.task, micro_batches)
            self._descriptions[key] = (found, segments(found))
        return self._descriptions[key]

    def cost(self, config: ParallelConfig, micro_batches: int) -> NetworkCost:
        """The cost of a micro-batch; equal for all layouts that differ in pipeline, optimizer or recompute alone."""
        key = (config.data, config.op, config.expert, config.sequence, config.vocabulary, micro_batches,
               tuple(config.recompute.cells), config.optimizer_shard if config.optimizer_shard < config.data else 0,
               config.pipeline.stages > 1 and self.cluster.runtime is not None)
        if key not in self._costs:
            found, parts = self.description(micro_batches, config.data)
            runtime = self.cluster.runtime
            wide = runtime is not None and runtime.update_of(self.train.optimizer.name).wide
            self._costs[key] = network_cost(found, config, parts, tuple(self.cluster.fused), runtime, wide)
        known = self._costs[key]
        known.mesh.config = config
        return known

    def divides(self, config: ParallelConfig, micro_batches: int) -> bool:
        """Whether every axis divides what it shards."""
        if self.task.inputs[0].shape[0] % (micro_batches * config.data):
            return False
        return all(cost.divides for cost in self.cost(config, micro_batches).costs)

    def evaluate(self, config: ParallelConfig, *, exact: bool = True, ends_only: bool = False) -> Estimate:
        """Memory, communication and time of one layout.

        Args:
            config: resolved.
            exact: follow the pipeline's passes one by one; False takes a quick bound.
            ends_only: work out memory and communication of the first, second and last stage alone (others hold less).

        Raises:
            UserError: the batch or the layers do not divide.
        """
        count = max(config.pipeline.micro_batches, self.train.accumulation)
        found, _ = self.description(count, config.data)
        cost = self.cost(config, count)
        held = self._held(found, cost, config, count)
        last = config.pipeline.stages - 1
        wanted = sorted({0, min(1, last), last}) if ends_only else range(last + 1)
        figures = [stage_figures(found, cost, config, count, held, stage) for stage in wanted]
        if self.cluster.runtime is not None:
            for stage, own in zip(wanted, figures, strict=True):
                by_walking(own, found, cost, config, count, held, stage, self.cluster.runtime)
        times = _Times(self.cluster, found, cost, config, figures, list(wanted), self.train.optimizer.name)
        return times.estimate(count, self, exact)


    def _held(self, found: Description, cost: NetworkCost, config: ParallelConfig, count: int) -> Holdings:
        key = (config.data, config.op, config.expert, config.vocabulary, config.sequence, config.optimizer_shard,
               config.optimizer.threshold_kb, config.optimizer.level)
        if key not in self._known_holdings:
            slices = parameter_slices(found, cost.mesh)
            self._known_holdings[key] = Holdings(slices, cost.mesh, self.train.optimizer)
        return self._known_holdings[key]


class _Times:
    """Seconds of one layout."""

    def __init__(self, cluster: ClusterSettings, found: Description, cost: NetworkCost, config: ParallelConfig,
                 figures: list[Stage], stages_given: list[int], optimizer: str) -> None:
        self.optimizer = optimizer
        self.cluster, self.config, self.figures, self.stages_given = cluster, config, figures, stages_given
        self.network = Network(cluster, cost.mesh)
        self.transfer = self._transfer(cost, found)
        stages, chunks = config.pipeline.stages, config.pipeline.interleave
        self.forward = [[0.0] * chunks for _ in range(stages)]
        self.backward = [[0.0] * chunks for _ in range(stages)]
        self.late = [[0.0] * chunks for _ in range(stages)] if cluster.runtime is not None else None
        self.shares = [Counter() for _ in range(stages)]
        homes, pieces = stages_of_units(found.units, config), chunks_of_units(found.units, config)
        known: dict[tuple, tuple] = {}
        for segment, part in zip(cost.segments, cost.costs, strict=True):
            again = is_recomputed(segment.unit, found.units, config)
            key = (id(part), again)
            if key not in known:
                known[key] = self._segment(part, again)
            forward, backward, shares = known[key]
            self.forward[homes[segment.unit]][pieces[segment.unit]] += forward
            self.backward[homes[segment.unit]][pieces[segment.unit]] += backward
            self.shares[homes[segment.unit]].update(shares)
            if self.late is not None:
                self.late[homes[segment.unit]][pieces[segment.unit]] += cluster.runtime.late_seconds(
                    part.backward.started)

    def _segment(self, part: SegmentCost, again: bool) -> tuple[float, float, dict[str, float]]:
        cluster = self.cluster
        compute = [cluster.seconds_of(part.forward), cluster.seconds_of(part.backward)]
        recompute = cluster.seconds_of(part.recompute) if again else 0.0
        if self.config.recompute.policy == "selective":
            recompute = cluster.seconds_of(part.selective)
        communication = Counter()
        for collective, times in part.collectives.items():
            if collective.phase != "recompute" or (again and self.config.recompute.communication):
                communication[collective.phase] += times * self.network.seconds_of(collective)
        if self.config.recompute.policy == "selective" and self.config.recompute.communication:
            for collective, times in part.selective_collectives.items():
                communication["recompute"] += times * self.network.seconds_of(collective)
        forward, exposed_forward = self._overlapped(compute[0], communication["forward"])
        backward, exposed_backward = self._overlapped(compute[1] + recompute,
                                                      communication["backward"] + communication["recompute"])
        shares = {"compute": compute[0] + compute[1], "recompute": recompute,
                  "op": exposed_forward + exposed_backward}
        return forward, backward, shares

    def _overlapped(self, compute: float, communication: float) -> tuple[float, float]:
        """(time, exposed communication): with k interleaved parts all but the first part's can hide under compute,
        and a share of it where the software runs products in parts."""
        share = 1 - 1 / self.config.micro_batch_interleave
        if self.cluster.overlapped:
            share = max(share, self.cluster.efficiency.op_overlap)
        hidden = min(communication, compute) * share
        return compute + communication - hidden, communication - hidden

    def _transfer(self, cost: NetworkCost, found: Description) -> float:
        if self.config.pipeline.stages == 1:
            return 0.0
        sizes = [collective.bytes for stage in self.figures for collective in stage.collectives
                 if collective.kind == "Send" and collective.purpose == "stage"]
        return self.network.transfer(max(sizes, default=0))

    def estimate(self, count: int, planner: Planner, exact: bool) -> Estimate:
        config, stages = self.config, self.config.pipeline.stages
        chunks, line = config.pipeline.interleave, None
        loads = [sum(forward) + sum(backward) for forward, backward in zip(self.forward, self.backward, strict=True)]
        if stages == 1:
            passes = count * loads[0]
        elif exact:
            line = timeline(config.pipeline.schedule, self.forward, self.backward, count, self.transfer,
                            self.late)
            passes = line.end
        else:
            passes = bound(loads, count, chunks) + 2 * (stages - 1) * self.transfer
        ends = [self._end(stage, figures, count) for stage,
                figures in zip(self.stages_given, self.figures, strict=True)]
        gradients, update = max(ends, key=sum)
        work, factor, beyond = passes + gradients + update, 1.0, config.world / self.cluster.devices_per_node
        while beyond > 1:
            factor *= 1 + self.cluster.efficiency.jitter * min(1.0, beyond - 1)
            beyond /= 2
        step = work * factor
        slowest = max(range(stages), key=lambda stage: loads[stage])
        parts = {name: seconds * count for name, seconds in self.shares[slowest].items()}
        parts |= {"bubble": max(0.0, passes - loads[slowest] * count), "gradients": gradients, "update": update,
                  "waiting": step - work}
        collective = [Counter() for _ in self.figures]
        for counter, stage in zip(collective, self.figures, strict=True):
            for entry, times in stage.collectives.items():
                counter[entry.dimension] += entry.bytes * times
        largest = {name: max(counter[name] for counter in collective) for name in
                   ("data", "op", "pipeline", "optimizer", "expert", "norm")}
        mfu = planner.model_flops / (step * config.world * self.cluster.peak_tflops * 1e12)
        idle = 1 - sum(loads) * count / (passes * stages) if passes else 0.0
        return Estimate(config, count, [stage.memory for stage in self.figures], step, parts, planner.model_flops,
                        planner.task.tokens, mfu, idle, largest, self.cluster.usable_bytes, line, self.figures)

    def _end(self, stage: int, figures: Stage, count: int) -> tuple[float, float]:
        """(exposed gradient and parameter communication, update) of a stage.

        Weights are gathered under the forward passes that come first, gradients summed under the backward passes that
        come last: those of one micro-batch, and with several chunks those of the other chunks' last round too.
        """
        communication: Counter = Counter()
        for collective, times in figures.collectives.items():
            if collective.purpose in ("gradient", "parameter") and collective.kind not in ("Send", "Receive"):
                communication[collective.kind, collective.factors, collective.dimension] += collective.bytes * times
        seconds = Counter()
        for (kind, factors, dimension), size in communication.items():
            way = "forward" if kind == "AllGather" else "backward"
            seconds[way] += self.network.seconds_of(Collective(kind, factors, size, dimension, way))
        pipeline = self.config.pipeline
        rounds = 1 + (pipeline.stages - 1) * (1 - 1 / pipeline.interleave)
        if self.config.optimizer.level > 1:  # under every micro-batch
            rounds = count
        overlap, exposed = self.cluster.efficiency.overlap, 0.0
        for way, passes in (("forward", self.forward), ("backward", self.backward)):
            exposed += max((1 - overlap) * seconds[way], seconds[way] - overlap * rounds * sum(passes[stage]))
        if self.cluster.runtime is not None:
            return exposed, update_seconds(self.cluster.runtime, figures, self.optimizer, self.config.data, count)
        update = figures.memory.parameters / 4 * _UPDATE_BYTES
        rate = self.cluster.memory_bandwidth_gb * 1e9 * self.cluster.efficiency.memory
        return exposed, update / rate


def planner_for(config: str | Path, overrides: list[str], cluster: str | Path) -> tuple[Planner, RunSettings]:
    """(planner, run settings) of a config file of any model."""
    package, settings = load_run(config, overrides)

    def build(parallel: ParallelConfig, compute_dtype: str) -> Task:
        return package.build(settings, parallel, compute_dtype)

    return Planner(build, settings.train, load_settings(ClusterSettings, cluster_file(cluster))), settings


def cluster_file(cluster: str | Path) -> Path:
    """The file of a cluster, given by its path or by the name of one that comes with the project."""
    path, known = Path(cluster), Path(__file__).resolve().parents[2] / "configs" / "cluster" / f"{cluster}.yaml"
    return known if not path.exists() and not path.suffix and known.is_file() else path
