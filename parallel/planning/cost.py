"""Work, memory and collectives of one micro-batch on one rank, worked out from a `Description` and a `ParallelConfig`.

The rules are those of MindSpore's partitioner:
    a dim that is summed over and cut        -> AllReduce of the result (ReduceScatter under sequence parallelism)
    an operand that lies otherwise than asked -> the redistribution of `parallel.planning.mesh`
    every collective on the way forward       -> its counterpart on the way back (AllReduce for AllReduce, ReduceScatter
                                                 for AllGather, and so on), where a gradient flows
    a parameter that lies whole on some ranks -> AllReduce of its gradient over them once a step, or ReduceScatter and
                                                 AllGather under optimizer parallelism (`parallel.planning.memory`)
Layers that are alike are worked out once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from parallel.planning.describe import WIDTH, Description, Op, SymbolicTensor, axes_in_order
from parallel.planning.mesh import Mesh, redistribution
from parallel.planning.shapes import PRODUCTS, VIEWS, Dim, Dims
from parallel.sharding.config import ParallelConfig

BACK = {"AllReduce": "AllReduce", "AllGather": "ReduceScatter", "ReduceScatter": "AllGather", "AlltoAll": "AlltoAll"}
"""Collective of the gradient for each collective of the forward pass."""

# Forward results that a primitive's gradient reads: i input, o output; cross: an input whose fellow has a gradient.
_READS: dict[str, str | tuple[str, ...]] = {
    "MatMul": "cross", "BatchMatMul": "cross", "Mul": "cross", "Maximum": ("i0", "i1"), "Minimum": ("i0", "i1"),
    "RealDiv": ("i1", "o0"), "Div": ("i1", "o0"), "Softmax": ("o0",), "LogSoftmax": ("o0",), "Sigmoid": ("o0",),
    "Exp": ("o0",), "Tanh": ("o0",), "ReLU": ("o0",), "Sqrt": ("o0",), "Rsqrt": ("o0",), "Reciprocal": ("o0",),
    "GeLU": ("i0", "o0"), "FastGeLU": ("i0",), "SiLU": ("i0",), "Log": ("i0",), "Log1p": ("i0",), "Square": ("i0",),
    "Abs": ("i0",), "Erf": ("i0",), "LayerNorm": ("i0", "o1", "o2"), "RmsNorm": ("i0", "o1"),
    "ReduceMax": ("i0", "o0"), "ReduceMin": ("i0", "o0"), "Gather": ("i1",), "Select": ("i0",), "TopK": ("o1",),
}
_MASK_BYTES = 4
_NOTHING = frozenset({"Depend", "StopGradient", "Detach"})


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a micro-batch (or of a step, for gradients).

    Args:
        kind: AllReduce, AllGather, ReduceScatter, AlltoAll, Send or Receive.
        factors: factors of the mesh in which the ranks of the group differ; () for pipeline and the norm over stages.
        bytes: of the whole tensor that it is about (as in the dry run).
        dimension: data, op, pipeline, optimizer, expert or norm.
        phase: forward, recompute or backward.
        purpose: activation, loss, gradient, parameter, stage or norm.
    """

    kind: str
    factors: tuple[int, ...]
    bytes: int
    dimension: str
    phase: str
    purpose: str = "activation"


@dataclass
class Work:
    """What the cores of one rank do: products as (FLOPs, least dim, bytes moved), everything else as bytes moved."""

    products: Counter = field(default_factory=Counter)
    bytes: int = 0
    kernels: int = 0

    @property
    def flops(self) -> int:
        """Of the products."""
        return sum(flops * times for (flops, _, _), times in self.products.items())

    def add(self, other: Work) -> None:
        """Adds another's work."""
        self.products.update(other.products)
        self.bytes += other.bytes
        self.kernels += other.kernels


@dataclass
class SegmentCost:
    """One stretch of operations of one pipeline unit, for one micro-batch on one rank.

    Args:
        forward, backward, recompute: work; recompute is what the backward pass needs again if nothing was kept.
        collectives: all of them; those with phase recompute count only where the unit is recomputed.
        kept: bytes of each forward result that the backward pass reads, by the tensor's number in the segment.
        kept_recomputed: the same if the unit is recomputed: what reaches it from outside.
        kept_selective, selective: what is kept, and worked out again, if only the cells named in the config are.
        arrivals: (number, collective) of the redistributions of tensors that come from outside.
        arrived_from: for each (tensor, layout) in `kept` that was brought into this layout from outside, how it came.
        largest: bytes of the largest result.
        divides: whether every axis divides what it cuts.
        outputs: layouts of the tensors that it makes.
    """

    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    recompute: Work = field(default_factory=Work)
    collectives: Counter = field(default_factory=Counter)
    kept: dict[tuple, int] = field(default_factory=dict)
    kept_recomputed: dict[tuple, int] = field(default_factory=dict)
    kept_selective: dict[tuple, int] = field(default_factory=dict)
    selective: Work = field(default_factory=Work)
    arrivals: Counter = field(default_factory=Counter)
    arrived_from: dict[tuple, Dims] = field(default_factory=dict)
    largest: int = 0
    divides: bool = True
    outputs: dict[int, Dims] = field(default_factory=dict)


@dataclass
class Segment:
    """Consecutive operations of one unit, with its tensors numbered in order of appearance."""

    unit: int
    operations: list[Op]
    items: list[SymbolicTensor] = field(default_factory=list)
    number: dict[int, int] = field(default_factory=dict)
    outside: list[int] = field(default_factory=list)
    alike: int = 0


def segments(description: Description) -> list[Segment]:
    """The operations cut into stretches of one unit each; those that are alike have the same number `alike`."""
    found: list[Segment] = []
    for operation in description.operations:
        if not found or found[-1].unit != operation.unit:
            found.append(Segment(operation.unit, []))
        found[-1].operations.append(operation)
    known: dict[tuple, int] = {}
    for segment in found:
        # A number for each kind of stretch: hashing the whole signature again for every layout would cost most of it.
        segment.alike = known.setdefault(_number(segment), len(known))
    return found


def _number(segment: Segment) -> tuple:
    """Numbers the tensors of a segment and returns its signature."""
    made: set[int] = set()
    marks = []
    for operation in segment.operations:
        for item in operation.inputs:
            if id(item) not in segment.number:
                segment.number[id(item)] = len(segment.items)
                segment.items.append(item)
                if item.parameter is None and id(item) not in made:
                    segment.outside.append(segment.number[id(item)])
        for item in operation.outputs:
            segment.number[id(item)] = len(segment.items)
            segment.items.append(item)
            made.add(id(item))
        marks.append((operation.primitive, operation.layer, operation.wanted, operation.out_wanted, operation.needed,
                      operation.plain, tuple(segment.number[id(item)] for item in operation.inputs),
                      tuple((item.shape, item.dtype, item.differentiable) for item in operation.outputs)))
    heads = tuple((segment.items[place].shape, segment.items[place].dtype, segment.items[place].differentiable,
                   segment.items[place].producer < 0) for place in segment.outside)
    return tuple(marks), heads


@dataclass
class NetworkCost:
    """All segments of a network under one layout; pipeline, recompute and optimizer choices come later."""

    mesh: Mesh
    segments: list[Segment]
    costs: list[SegmentCost]
    layouts: dict[int, Dims]


def network_cost(description: Description, config: ParallelConfig, parts: list[Segment] | None = None,
                 fused: tuple[str, ...] = ()) -> NetworkCost:
    """Cost of every segment of `description` under `config` (resolved): data, op, sequence, vocabulary and expert.

    Args:
        description: for one micro-batch.
        config: resolved.
        parts: `segments(description)`, where it is at hand.
        fused: ends of the paths of cells that run as one kernel.
    """
    mesh = Mesh(config)
    parts = parts or segments(description)
    layouts: dict[int, Dims] = {}
    batch = mesh.place(["batch"])["batch"]
    for item in description.inputs:
        layouts[id(item)] = (Dim(item.dims[0].size, batch), *item.dims[1:])
    known: dict[tuple, SegmentCost] = {}
    costs = []
    for segment in parts:
        arriving = tuple(layouts.get(id(segment.items[place]), segment.items[place].dims) for place in segment.outside)
        key = (segment.alike, arriving)
        if key not in known:
            known[key] = _Evaluation(mesh, segment, arriving, fused).run()
        cost = known[key]
        for place, dims in cost.outputs.items():
            layouts[id(segment.items[place])] = dims
        costs.append(cost)
    return NetworkCost(mesh, parts, costs, layouts)


class _Evaluation:
    """One segment under one mesh."""

    def __init__(self, mesh: Mesh, segment: Segment, arriving: tuple[Dims, ...], fused: tuple[str, ...]) -> None:
        self.mesh, self.segment, self.fused, self.cost = mesh, segment, fused, SegmentCost()
        self.layout: dict[int, Dims] = dict(zip(segment.outside, arriving, strict=True))
        self.redistributed: set[tuple] = set()
        self.maker: dict[int, int] = {}
        self.reads: list[tuple[int, tuple]] = []
        self.masks: list[tuple[int, tuple]] = []
        # What each operation communicates forward: filled while walking, read again for the recomputation.
        self.emitted: dict[int, list[Collective]] = {}
        self.works: list[Work] = []
        self.divides = True
        self.leaves_fused: set[int] | None = None

    def run(self) -> SegmentCost:
        for place, operation in enumerate(self.segment.operations):
            self._operation(place, operation)
        self._keep()
        self._keep_selective()
        self.cost.divides = self.divides
        self.cost.outputs = {number: self.layout[number] for number in self.maker}
        return self.cost

    def _operation(self, place: int, operation: Op) -> None:
        number = self.segment.number
        operands = []
        placed = self.mesh.place(list(axes_in_order(operation)))
        for item, axes in zip(operation.inputs, operation.wanted, strict=True):
            operands.append(self._arrive(place, operation, item, axes, placed))
        result = operation.rule(operands)
        outputs = result.outputs
        if operation.primitive == "OneHot" and operation.declared:
            outputs = ((*outputs[0][:-1], Dim(outputs[0][-1].size, self._one_hot_axis(operation, placed))),)
        for item, dims in zip(operation.outputs, outputs, strict=True):
            self.layout[number[id(item)]] = dims
            self.maker[number[id(item)]] = place
        if result.summed and self.mesh.degree(result.summed) > 1:
            self._sum(place, operation, outputs[0], result.summed)
        self._work(operation, operands, outputs)
        if operation.needed:
            self._read(operation, operands)
            if operation.primitive == "Gather" and result.summed:
                # A table cut by rows: which ids are its own is kept beside the ids.
                self.masks.append((number[id(operation.inputs[1])], operands[1]))
        self.divides &= all(dim.size % self.mesh.degree(dim.axis) == 0 for dims in operands for dim in dims if dim.axis)

    def _one_hot_axis(self, operation: Op, placed: dict) -> tuple[int, ...]:
        name = operation.one_hot_axis
        return placed.get(name, ()) if name else ()

    def _arrive(self, place: int, operation: Op, item: SymbolicTensor, axes: tuple | None, placed: dict) -> Dims:
        """The operand as the primitive wants it; whatever brings it there is noted."""
        number = self.segment.number[id(item)]
        here = self.layout.get(number, item.dims)
        if axes is None:
            return here
        target = tuple(Dim(dim.size, placed.get(axis, ()) if axis and dim.size > 1 else ())
                       for dim, axis in zip(item.dims, axes, strict=True))
        if target == here or item.parameter is not None or (item.producer < 0 and number not in self.layout):
            return target
        key = (self._before_views(number), target)
        if key not in self.redistributed:
            self.redistributed.add(key)
            back = operation.needed and item.differentiable
            for kind, factors, elements in redistribution(self.mesh, here, target):
                collective = self._emit(place, kind, factors, elements * WIDTH[item.dtype], back)
                if key[0] not in self.maker:
                    self.cost.arrivals[key[0], collective] += 1
                    self.cost.arrived_from[key] = here
        return target

    def _sum(self, place: int, operation: Op, dims: Dims, summed: tuple[int, ...]) -> None:
        item = operation.outputs[0]
        size = self.mesh.local(dims) * WIDTH[item.dtype]
        kind = "AllReduce"
        if operation.out_wanted is not None and self.mesh.axes.sequence:
            kind = "ReduceScatter"
            placed = self.mesh.place([name for name in operation.out_wanted if name])
            self.layout[self.segment.number[id(item)]] = tuple(
                Dim(dim.size, placed.get(axis, ()) if axis else ())
                for dim, axis in zip(dims, operation.out_wanted, strict=True))
        full = not any(dim.axis for dim in dims)
        if operation.primitive == "Gather" and full and dims[0].size % self.mesh.degree(summed) == 0:
            # With the ids whole on every rank a lookup in a cut table is scattered; who needs it whole gathers it.
            kind = "ReduceScatter"
            self.layout[self.segment.number[id(item)]] = (Dim(dims[0].size, summed), *dims[1:])
        self._emit(place, kind, summed, size, operation.needed, "loss" if not dims else "activation")

    def _emit(self, place: int, kind: str, factors: tuple[int, ...], size: int, back: bool,
               purpose: str = "activation") -> Collective:
        dimension = self.mesh.kind(factors)
        if kind == "AlltoAll" and self.mesh.config.expert > 1:
            dimension = "expert"
        forward = Collective(kind, factors, size, dimension, "forward", purpose)
        self.cost.collectives[forward] += 1
        self.emitted.setdefault(place, []).append(forward)
        if back:
            self.cost.collectives[Collective(BACK[kind], factors, size, dimension, "backward", purpose)] += 1
        return forward

    def _work(self, operation: Op, operands: list[Dims], outputs: tuple[Dims, ...]) -> None:
        forward, cost = Work(), self.cost
        inside = self._fused_in(operation)
        out_bytes = sum(self.mesh.local(dims) * WIDTH[item.dtype]
                        for dims, item in zip(outputs, operation.outputs, strict=True)
                        if not inside or self.segment.number[id(item)] in self._leaving_fused())
        in_bytes = sum(self.mesh.local(dims) * WIDTH[item.dtype]
                       for dims, item in zip(operands, operation.inputs, strict=True)
                       if not inside or not self._is_made_in(item, inside))
        if not _is_weight_copy(operation):
            cost.largest = max(cost.largest, out_bytes)
        if operation.primitive in PRODUCTS:
            self._product(operation, operands, outputs, forward, in_bytes + out_bytes)
        elif self._moves(operation) and (in_bytes + out_bytes or not inside):
            if operation.primitive == "Gather":
                in_bytes = out_bytes
            forward.bytes, forward.kernels = in_bytes + out_bytes, not inside
            if operation.needed:
                cost.backward.bytes += in_bytes + out_bytes
                cost.backward.kernels += not inside
        cost.forward.add(forward)
        self.works.append(forward)

    def _fused_in(self, operation: Op) -> str:
        """Path of the cell that runs as one kernel with this operation inside; "" for none."""
        path = f".{operation.scope}."
        for name in self.fused:
            if f".{name}." in path:
                return path[:path.index(f".{name}.") + len(name) + 1]
        return ""

    def _is_made_in(self, item: SymbolicTensor, cell: str) -> bool:
        place = self.maker.get(self.segment.number[id(item)])
        return place is not None and self._fused_in(self.segment.operations[place]) == cell

    def _moves(self, operation: Op) -> bool:
        """Whether a primitive reads and writes memory of its own."""
        # Weights are cast once a step, not once a micro-batch: that is counted with the update.
        return not (operation.primitive in VIEWS | _NOTHING or _is_weight_copy(operation) or _is_same_cast(operation))

    def _product(self, operation: Op, operands: list[Dims], outputs: tuple[Dims, ...], forward: Work,
                 moved: int) -> None:
        rows = self.mesh.local(outputs[0])
        inner = self.mesh.local((_contracted(operation, operands[0]),))
        sides = [self.mesh.local((dim,)) for dim in outputs[0][-2:]]
        product = (2 * rows * inner, min(*sides, inner), moved)
        forward.products[product] += 1
        if operation.needed:
            self.cost.backward.products[product] += sum(item.differentiable for item in operation.inputs)

    def _read(self, operation: Op, operands: list[Dims]) -> None:
        """Notes which forward results this operation's gradient reads."""
        rule = _READS.get(operation.primitive, ())
        items = operation.inputs
        if rule == "cross":
            rule = tuple(f"i{1 - place}" for place, item in enumerate(items)
                         if item.differentiable and len(items) == 2)
        elif operation.primitive in ("RealDiv", "Div"):
            rule = ("i1", "o0") if items[-1].differentiable and len(items) == 2 else ("i1",) if len(items) == 2 else ()
        for name in rule:
            place = int(name[1])
            side = items if name[0] == "i" else operation.outputs
            if place >= len(side):
                continue
            number = self.segment.number[id(side[place])]
            dims = operands[place] if name[0] == "i" else self.layout[number]
            self.reads.append((number, dims))

    def _keep(self) -> None:
        """Tensors kept for the backward pass, and what a recomputation would run."""
        cost, operations = self.cost, self.segment.operations
        again: set[int] = set()
        todo: list[int] = []
        for number, dims in self.reads:
            item = self.segment.items[number]
            if item.parameter is not None:
                continue
            number = self._before_views(number)
            maker = self.maker.get(number)
            if maker is not None and self._fused_in(operations[maker]) and number not in self._leaving_fused():
                continue
            if number not in self.maker and item.producer < 0:
                continue  # the batch itself is there anyway
            cost.kept[number, dims] = self.mesh.local(dims) * WIDTH[item.dtype]
            todo.append(number)
        for number, dims in self.masks:
            cost.kept[number, (*dims, Dim(1))] = self.mesh.local(dims) * _MASK_BYTES
            cost.kept[number, dims] = self.mesh.local(dims) * WIDTH["int32"]
        while todo:
            number = todo.pop()
            place = self.maker.get(number)
            if place is None or not operations[place].layer:
                item = self.segment.items[number]
                if item.producer >= 0:
                    dims = self.layout[number]
                    cost.kept_recomputed[number, dims] = self.mesh.local(dims) * WIDTH[item.dtype]
                continue
            if place in again:
                continue
            again.add(place)
            todo += [self._before_views(self.segment.number[id(item)]) for item in operations[place].inputs
                     if item.parameter is None]
        for place in again:
            cost.recompute.add(self.works[place])
            for collective in self.emitted.get(place, ()):
                cost.collectives[Collective(collective.kind, collective.factors, collective.bytes,
                                            collective.dimension, "recompute",
                                            collective.purpose)] += 1

    def _keep_selective(self) -> None:
        """As `_keep` where only some cells are recomputed: their inputs are kept instead of what they make inside."""
        cost, again, todo = self.cost, set(), []
        for number, dims in cost.kept:
            if self._in_selected(number):
                todo.append(number)
            else:
                cost.kept_selective[number, dims] = cost.kept[number, dims]
        while todo:
            number = todo.pop()
            if not self._in_selected(number):
                item, dims = self.segment.items[number], self.layout.get(number)
                if dims is not None and (number in self.maker or item.producer >= 0):
                    cost.kept_selective[number, dims] = self.mesh.local(dims) * WIDTH[item.dtype]
                continue
            place = self.maker[number]
            if place not in again:
                again.add(place)
                inputs = self.segment.operations[place].inputs
                todo += [self._before_views(self.segment.number[id(item)]) for item in inputs if item.parameter is None]
        for place in again:
            cost.selective.add(self.works[place])

    def _in_selected(self, number: int) -> bool:
        place = self.maker.get(number)
        if place is None:
            return False
        scope = f".{self.segment.operations[place].scope}."
        return any(f".{name}." in scope for name in self.mesh.config.recompute.cells)

    def _leaving_fused(self) -> set[int]:
        """Results of fused cells that others read: such a kernel keeps and writes these and nothing else of its own."""
        if self.leaves_fused is None:
            made, self.leaves_fused = {}, set()
            for operation in self.segment.operations:
                cell = self._fused_in(operation)
                self.leaves_fused |= {number for number in (self.segment.number[id(item)] for item in operation.inputs)
                                 if made.get(number, cell) != cell}
                made |= {self.segment.number[id(item)]: cell for item in operation.outputs}
        return self.leaves_fused

    def _before_views(self, number: int) -> int:
        """The tensor whose node the graph has: casts to the same type and markers are not in it."""
        while number in self.maker:
            operation = self.segment.operations[self.maker[number]]
            if operation.primitive not in _NOTHING and not _is_same_cast(operation):
                break
            number = self.segment.number[id(operation.inputs[0])]
        return number


def _is_weight_copy(operation: Op) -> bool:
    return operation.primitive == "Cast" and operation.inputs[0].parameter is not None


def _is_same_cast(operation: Op) -> bool:
    return operation.primitive == "Cast" and operation.inputs[0].dtype == operation.outputs[0].dtype


def _contracted(operation: Op, a: Dims) -> Dim:
    """The dim that a product sums over: the one of its first operand that its result lacks."""
    out = operation.outputs[0].dims
    return a[-1] if a[-2].size == out[-2].size else a[-2]
