"""Work, memory and collectives of one micro-batch on one rank, computed from a `Description` and a `ParallelConfig`.

The rules are those of MindSpore's partitioner:
    a dim that is summed over and sharded     -> AllReduce of the result (ReduceScatter under sequence parallelism)
    an operand in another layout than wanted  -> the redistribution of `parallel.planning.mesh`
    every collective of the forward pass      -> its counterpart in the backward pass (AllReduce for AllReduce,
                                                 ReduceScatter for AllGather, and so on), where a gradient flows
    a parameter replicated on some ranks      -> AllReduce of its gradient over them once a step, or ReduceScatter and
                                                 AllGather under optimizer parallelism (`parallel.planning.memory`)
Segments that are alike are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallel.planning.cost.forward import ForwardPass, ForwardTracer, FusedCells, source_tensor
from parallel.planning.cost.segments import Segment, SegmentCost, segments
from parallel.planning.describe import WIDTH, Description, Op
from parallel.planning.mesh import Mesh
from parallel.planning.runtime.kernels import SegmentKernels
from parallel.planning.runtime.settings import RuntimeSettings
from parallel.planning.runtime.walk import Walker
from parallel.planning.shapes import Dim, Dims
from parallel.sharding.config import ParallelConfig

_MASK_BYTES = 4


@dataclass
class NetworkCost:
    """All segments of a network under one layout; pipeline, recompute and optimizer choices come later."""

    mesh: Mesh
    segments: list[Segment]
    costs: list[SegmentCost]
    layouts: dict[int, Dims]


def network_cost(description: Description, config: ParallelConfig, parts: list[Segment] | None = None,
                 fused: tuple[str, ...] = (), runtime: RuntimeSettings | None = None,
                 wide: bool = False) -> NetworkCost:
    """Cost of every segment of `description` under `config` (resolved): data, op, sequence, vocabulary and expert.

    Args:
        description: for one micro-batch.
        config: resolved.
        parts: `segments(description)`, where it is at hand.
        fused: ends of the paths of cells that run as one kernel.
        runtime: one that runs node by node, whose kernels are wanted.
        wide: whether its update reads gradients in float32 only.
    """
    mesh = Mesh(config)
    parts = parts or segments(description)
    layouts: dict[int, Dims] = {}
    batch = mesh.placement(["batch"])["batch"]
    for item in description.inputs:
        layouts[id(item)] = (Dim(item.dims[0].size, batch), *item.dims[1:])
    known: dict[tuple, SegmentCost] = {}
    costs = []
    for segment in parts:
        arriving = tuple(layouts.get(id(segment.items[index]), segment.items[index].dims) for index in segment.outside)
        key = (segment.alike, arriving)
        if key not in known:
            known[key] = segment_cost(mesh, segment, arriving, fused, runtime, wide)
        cost = known[key]
        for number, dims in cost.outputs.items():
            layouts[id(segment.items[number])] = dims
        costs.append(cost)
    return NetworkCost(mesh, parts, costs, layouts)


def segment_cost(mesh: Mesh, segment: Segment, arriving: tuple[Dims, ...], fused: tuple[str, ...],
                 runtime: RuntimeSettings | None = None, wide: bool = False) -> SegmentCost:
    """Cost of one segment.

    Args:
        arriving: layouts of `segment.outside`.
        fused, runtime, wide: as of `network_cost`.
    """
    cells = FusedCells(segment, fused)
    kernels = SegmentKernels(mesh, segment, tuple(runtime.attention), tuple(runtime.loss),
                             tuple(runtime.lists)) if runtime else None
    done = ForwardTracer(mesh, segment, arriving, cells, kernels).run()
    cost = SegmentCost(forward=done.forward, backward=done.backward, collectives=done.collectives,
                       arrivals=done.arrivals, arrived_from=done.arrived_from, largest=done.largest,
                       divides=done.divides, outputs={number: done.layout[number] for number in done.maker})
    kept = _Kept(mesh, segment, done, cells, cost, kernels)
    kept.all()
    kept.selective()
    if kernels is not None:
        cost.walk = Walker(mesh, segment, done, kernels, cost.kept, wide or mesh.config.data > 1,
                           mesh.config.pipeline.stages > 1).run()
    return cost


class _Kept:
    """Fills in what a segment keeps for its backward pass, and what a recomputation of it runs."""

    def __init__(self, mesh: Mesh, segment: Segment, done: ForwardPass, fused: FusedCells, cost: SegmentCost,
                 kernels: SegmentKernels | None) -> None:
        self.mesh, self.segment, self.done, self.fused, self.cost = mesh, segment, done, fused, cost
        self.kernels = kernels

    def all(self) -> None:
        """With and without recomputation of the unit."""
        cost, done = self.cost, self.done
        again: set[int] = set()
        todo = self._read_by_gradients()
        for number, dims in done.masks:
            cost.kept[number, (*dims, Dim(1))] = self.mesh.local(dims) * _MASK_BYTES
            cost.kept[number, dims] = self.mesh.local(dims) * WIDTH["int32"]
        while todo:
            number = todo.pop()
            index = done.maker.get(number)
            if index is None or not self.segment.operations[index].layer:
                item = self.segment.items[number]
                if item.producer >= 0 and not (self.kernels is not None and number in self.kernels.masks):
                    dims = done.layout[number]
                    cost.kept_recomputed[number, dims] = self.mesh.local(dims) * WIDTH[item.dtype]
            elif index not in again:
                again.add(index)
                todo += self._inputs(index)
        for index in again:
            cost.recompute.add(done.works[index])
            for collective in done.emitted.get(index, ()):
                cost.collectives[replace(collective, phase="recompute")] += 1

    def _read_by_gradients(self) -> list[int]:
        """Tensors that gradients read and that are not there anyway; notes them as kept."""
        cost, done, found = self.cost, self.done, []
        for number, dims in done.reads:
            item = self.segment.items[number]
            if item.parameter is not None:
                continue
            number = source_tensor(self.segment, done.maker, number)
            maker = done.maker.get(number)
            if maker is None:
                if item.producer < 0:
                    continue  # the batch itself is there anyway
            elif self.fused.cell_of(self.segment.operations[maker]) and number not in self.fused.leaving:
                continue
            cost.kept[number, dims] = self.mesh.local(dims) * WIDTH[item.dtype]
            found.append(number)
        return found

    def selective(self) -> None:
        """Where only some cells are recomputed: their inputs are kept instead of what they make inside."""
        cost, done, again, todo = self.cost, self.done, set(), []
        outside = self._read_outside()
        for (number, dims), size in cost.kept.items():
            if self._in_selected(number) and number in outside:
                cost.kept_selective[number, dims] = size
                todo.append(number)
            elif self._in_selected(number):
                todo.append(number)
                # What was redistributed is kept as it was before, and redistributed again.
                for collective in done.moved.get(number, ()):
                    cost.selective_collectives[replace(collective, phase="recompute")] += 1
                    own = done.layout[number]
                    cost.kept_selective[number, own] = self.mesh.local(own) * WIDTH[self.segment.items[number].dtype]
            else:
                cost.kept_selective[number, dims] = size
        while todo:
            number = todo.pop()
            if not self._in_selected(number):
                item, dims = self.segment.items[number], done.layout.get(number)
                if dims is not None and (number in done.maker or item.producer >= 0):
                    cost.kept_selective[number, dims] = self.mesh.local(dims) * WIDTH[item.dtype]
                continue
            index = done.maker[number]
            if index not in again:
                again.add(index)
                todo += self._inputs(index)
        for index in again:
            cost.selective.add(done.works[index])

    def _read_outside(self) -> set[int]:
        """Under a runtime that runs node by node: results of the recomputed cells that other cells' gradients read. The
        graph reads the first ones there, and only the cell's own gradients read what is computed again."""
        if self.kernels is None:
            return set()
        return {number for index, number in self.done.read_by
                if not self._is_selected(self.segment.operations[index])}

    def _in_selected(self, number: int) -> bool:
        """Whether a tensor is made in a cell that the config recomputes."""
        index = self.done.maker.get(number)
        return index is not None and self._is_selected(self.segment.operations[index])

    def _is_selected(self, operation: Op) -> bool:
        scope = f".{operation.scope}."
        return any(f".{name}." in scope for name in self.mesh.config.recompute.cells)

    def _inputs(self, index: int) -> list[int]:
        """What an operation reads beside parameters."""
        return [source_tensor(self.segment, self.done.maker, self.segment.number[id(item)])
                for item in self.segment.operations[index].inputs if item.parameter is None]
