"""One segment's forward pass under one mesh: layouts, collectives, work and what the backward pass reads.

Every operation of the segment is followed in order. Its operands are redistributed to the layouts that its layer
states, its rule gives the layouts of its results, and a dim that is summed over and sharded makes the result a sum of
the ranks' parts. `parallel.planning.cost.network` derives from the result what is kept and what a recomputation runs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from parallel.planning.cost.segments import Collective, Segment, Work
from parallel.planning.describe import WIDTH, Op, SymbolicTensor, axes_in_order
from parallel.planning.mesh import Mesh, redistribution
from parallel.planning.runtime.kernels import SegmentKernels
from parallel.planning.shapes import PRODUCTS, VIEWS, Dim, Dims

BACK = {"AllReduce": "AllReduce", "AllGather": "ReduceScatter", "ReduceScatter": "AllGather", "AlltoAll": "AlltoAll"}
"""Collective of the gradient for each collective of the forward pass."""

# Forward results that a primitive's gradient reads: i input, o output; cross: an input whose other operand has a
# gradient.
_READS: dict[str, str | tuple[str, ...]] = {
    "MatMul": "cross", "BatchMatMul": "cross", "Mul": "cross", "Maximum": ("i0", "i1"), "Minimum": ("i0", "i1"),
    "RealDiv": ("i1", "o0"), "Div": ("i1", "o0"), "Softmax": ("o0",), "LogSoftmax": ("o0",), "Sigmoid": ("o0",),
    "Exp": ("o0",), "Tanh": ("o0",), "ReLU": ("o0",), "Sqrt": ("o0",), "Rsqrt": ("o0",), "Reciprocal": ("o0",),
    "GeLU": ("i0", "o0"), "FastGeLU": ("i0",), "SiLU": ("i0",), "Log": ("i0",), "Log1p": ("i0",), "Square": ("i0",),
    "Abs": ("i0",), "Erf": ("i0",), "LayerNorm": ("i0", "o1", "o2"), "RmsNorm": ("i0", "o1"),
    "FlashAttentionScore": ("i0", "i1", "i2", "i3", "i4", "o0", "o1", "o2", "o3"),
    "ReduceMax": ("i0", "o0"), "ReduceMin": ("i0", "o0"), "Gather": ("i1",), "Select": ("i0",), "TopK": ("o1",),
}
_BACKWARD_PRODUCTS = 5  # of a fused attention: scores, and the gradients by probabilities, values, queries and keys
_NOTHING = frozenset({"Depend", "StopGradient", "Detach"})


class FusedCells:
    """The cells of a segment that run as one kernel each, and what leaves them.

    Args:
        names: ends of the cells' paths.
    """

    def __init__(self, segment: Segment, names: tuple[str, ...]) -> None:
        self.names = names
        self.leaving = self._leaving(segment)
        """Tensors made in such a cell that others read: it keeps and writes these and nothing else of its own."""

    def cell_of(self, operation: Op) -> str:
        """Path of the cell that an operation runs in; "" for none."""
        path = f".{operation.scope}."
        for name in self.names:
            if f".{name}." in path:
                return path[:path.index(f".{name}.") + len(name) + 1]
        return ""

    def _leaving(self, segment: Segment) -> set[int]:
        made: dict[int, str] = {}
        leaving: set[int] = set()
        for operation in segment.operations:
            cell = self.cell_of(operation)
            numbers = [segment.number[id(item)] for item in operation.inputs]
            leaving |= {number for number in numbers if made.get(number, cell) != cell}
            made |= {segment.number[id(item)]: cell for item in operation.outputs}
        return leaving


@dataclass
class ForwardPass:
    """What a segment does forward, and what its gradients will read.

    Args:
        layout: of every tensor, by its number in the segment.
        maker: index of the operation that made a tensor.
        works: work of every operation.
        emitted: collectives of an operation.
        collectives: all of them, forward and backward.
        reads: (tensor, layout) of the forward results that gradients read.
        read_by: (operation, tensor that it comes from) of the same.
        operands: layouts of every operation's operands.
        masks: (tensor, layout) of ids beside which a mask is kept.
        forward, backward: work of all operations.
        moved: redistributions of a tensor that is made here.
        arrivals, arrived_from, largest, divides: as in `SegmentCost`.
    """

    layout: dict[int, Dims]
    maker: dict[int, int] = field(default_factory=dict)
    works: list[Work] = field(default_factory=list)
    emitted: dict[int, list[Collective]] = field(default_factory=dict)
    collectives: Counter = field(default_factory=Counter)
    reads: list[tuple[int, Dims]] = field(default_factory=list)
    read_by: list[tuple[int, int]] = field(default_factory=list)
    operands: list[list[Dims]] = field(default_factory=list)
    masks: list[tuple[int, Dims]] = field(default_factory=list)
    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    arrivals: Counter = field(default_factory=Counter)
    arrived_from: dict[tuple, Dims] = field(default_factory=dict)
    moved: dict[int, list[Collective]] = field(default_factory=dict)
    largest: int = 0
    divides: bool = True


class ForwardTracer:
    """Follows a segment's operations under a mesh.

    Args:
        arriving: layouts of `segment.outside`.
        fused: cells that run as one kernel.
        kernels: of a runtime that runs node by node; None = of another.
    """

    def __init__(self, mesh: Mesh, segment: Segment, arriving: tuple[Dims, ...], fused: FusedCells,
                 kernels: SegmentKernels | None = None) -> None:
        self.mesh, self.segment, self.fused, self.kernels = mesh, segment, fused, kernels
        self.done = ForwardPass(dict(zip(segment.outside, arriving, strict=True)))
        self.redistributed: set[tuple] = set()

    def run(self) -> ForwardPass:
        """All of the segment."""
        for index, operation in enumerate(self.segment.operations):
            self._operation(index, operation)
        return self.done

    def _operation(self, index: int, operation: Op) -> None:
        done, number = self.done, self.segment.number
        placed = self.mesh.placement(list(axes_in_order(operation)))
        operands = [self._operand(index, operation, item, axes, placed)
                    for item, axes in zip(operation.inputs, operation.wanted, strict=True)]
        done.operands.append(operands)
        result = operation.rule(operands)
        outputs = result.outputs
        if operation.primitive == "OneHot" and operation.declared:
            axis = placed.get(operation.one_hot_axis, ()) if operation.one_hot_axis else ()
            outputs = ((*outputs[0][:-1], Dim(outputs[0][-1].size, axis)),)
        for item, dims in zip(operation.outputs, outputs, strict=True):
            done.layout[number[id(item)]] = dims
            done.maker[number[id(item)]] = index
        if result.summed and self.mesh.degree(result.summed) > 1:
            self._sum(index, operation, outputs[0], result.summed)
        self._work(index, operation, operands, outputs)
        if operation.needed:
            self._read(index, operation, operands)
            if operation.primitive == "Gather" and result.summed:
                # A table sharded by rows: a mask of the ids that it holds is kept beside the ids.
                done.masks.append((number[id(operation.inputs[1])], operands[1]))
        done.divides &= all(dim.size % self.mesh.degree(dim.axis) == 0
                            for dims in operands for dim in dims if dim.axis)

    # -- layouts and collectives --------------------------------------------------------------------------------------

    def _operand(self, index: int, operation: Op, item: SymbolicTensor, axes: tuple | None, placed: dict) -> Dims:
        """The operand's layout as the primitive wants it; records the redistribution that it takes."""
        done, number = self.done, self.segment.number[id(item)]
        here = done.layout.get(number, item.dims)
        if axes is None:
            return here
        target = tuple(Dim(dim.size, placed.get(axis, ()) if axis and dim.size > 1 else ())
                       for dim, axis in zip(item.dims, axes, strict=True))
        if target == here or item.parameter is not None or (item.producer < 0 and number not in done.layout):
            return target
        key = (source_tensor(self.segment, done.maker, number), target)
        if key not in self.redistributed:
            self.redistributed.add(key)
            back = operation.needed and item.differentiable
            for kind, factors, elements in redistribution(self.mesh, here, target):
                collective = self._emit(index, kind, factors, elements * WIDTH[item.dtype], back)
                if key[0] in done.maker:
                    done.moved.setdefault(key[0], []).append(collective)
                else:
                    done.arrivals[key[0], collective] += 1
                    done.arrived_from[key] = here
        return target

    def _sum(self, index: int, operation: Op, dims: Dims, summed: tuple[int, ...]) -> None:
        """The collective that adds up the ranks' parts of the first result."""
        item, layout = operation.outputs[0], self.done.layout
        number, kind = self.segment.number[id(item)], "AllReduce"
        if operation.out_wanted is not None and self.mesh.axes.sequence:
            kind = "ReduceScatter"
            placed = self.mesh.placement([name for name in operation.out_wanted if name])
            layout[number] = tuple(Dim(dim.size, placed.get(axis, ()) if axis else ())
                                   for dim, axis in zip(dims, operation.out_wanted, strict=True))
        replicated = not any(dim.axis for dim in dims)
        if operation.primitive == "Gather" and replicated and dims[0].size % self.mesh.degree(summed) == 0:
            # With all ids on every rank a lookup in a sharded table is scattered; a reader of all of it gathers it.
            kind = "ReduceScatter"
            layout[number] = (Dim(dims[0].size, summed), *dims[1:])
        size = self.mesh.local(dims) * WIDTH[item.dtype]
        self._emit(index, kind, summed, size, operation.needed, "loss" if not dims else "activation")

    def _emit(self, index: int, kind: str, factors: tuple[int, ...], size: int, back: bool,
              purpose: str = "activation") -> Collective:
        """Records a forward collective of operation `index` and, with `back`, its counterpart of the backward pass."""
        dimension = self.mesh.kind(factors)
        if kind == "AlltoAll" and self.mesh.config.expert > 1:
            dimension = "expert"
        forward = Collective(kind, factors, size, dimension, "forward", purpose)
        self.done.collectives[forward] += 1
        self.done.emitted.setdefault(index, []).append(forward)
        if back:
            self.done.collectives[Collective(BACK[kind], factors, size, dimension, "backward", purpose)] += 1
        return forward

    # -- work ---------------------------------------------------------------------------------------------------------

    def _work(self, index: int, operation: Op, operands: list[Dims], outputs: tuple[Dims, ...]) -> None:
        done, work, cell = self.done, Work(), self.fused.cell_of(operation)
        out_bytes = sum(self.mesh.local(dims) * WIDTH[item.dtype]
                        for dims, item in zip(outputs, operation.outputs, strict=True)
                        if not cell or self.segment.number[id(item)] in self.fused.leaving)
        in_bytes = sum(self.mesh.local(dims) * WIDTH[item.dtype]
                       for dims, item in zip(operands, operation.inputs, strict=True)
                       if not cell or not self._is_made_in(item, cell))
        if not _is_weight_copy(operation):
            done.largest = max(done.largest, out_bytes)
        if operation.attended:
            self._attention(operation, operands, work, in_bytes + out_bytes)
        elif operation.primitive in PRODUCTS:
            self._product(operation, operands, outputs, work, in_bytes + out_bytes)
        elif _moves_memory(operation) and (in_bytes + out_bytes or not cell):
            if operation.primitive == "Gather":
                in_bytes = out_bytes
            work.bytes, work.kernels = in_bytes + out_bytes, not cell
            if operation.needed:
                done.backward.bytes += in_bytes + out_bytes
                done.backward.kernels += not cell
        if self.kernels is not None:
            work.started, back = self.kernels.of(operation, operands, outputs, index in done.emitted)
            done.backward.started.update(back)
        done.forward.add(work)
        done.works.append(work)

    def _is_made_in(self, item: SymbolicTensor, cell: str) -> bool:
        maker = self.done.maker.get(self.segment.number[id(item)])
        return maker is not None and self.fused.cell_of(self.segment.operations[maker]) == cell

    def _product(self, operation: Op, operands: list[Dims], outputs: tuple[Dims, ...], work: Work, moved: int) -> None:
        rows = self.mesh.local(outputs[0])
        inner = self.mesh.local((_contracted(operation, operands[0]),))
        sides = [self.mesh.local((dim,)) for dim in outputs[0][-2:]]
        product = (2 * rows * inner, min(*sides, inner), moved)
        work.products[product] += 1
        if operation.needed:
            self.done.backward.products[product] += sum(item.differentiable for item in operation.inputs)

    def _attention(self, operation: Op, operands: list[Dims], work: Work, moved: int) -> None:
        """A fused attention: two products forward, and five backward, the scores being computed again."""
        width = operands[0][-1].size
        rows = self.mesh.local(operands[0]) // width  # times heads
        product = (2 * rows * operation.attended * width, min(operation.attended, width), moved // 2)
        work.products[product] += 2
        if operation.needed:
            self.done.backward.products[product] += _BACKWARD_PRODUCTS

    def _read(self, index: int, operation: Op, operands: list[Dims]) -> None:
        """Records the forward results that this operation's gradient reads."""
        rule, inputs = _READS.get(operation.primitive, ()), operation.inputs
        if rule == "cross":
            rule = tuple(f"i{1 - index}" for index, item in enumerate(inputs)
                         if item.differentiable and len(inputs) == 2)
        elif operation.primitive in ("RealDiv", "Div"):
            two = len(inputs) == 2
            rule = ("i1", "o0") if inputs[-1].differentiable and two else ("i1",) if two else ()
        if self.kernels is not None and self.kernels.keeps_input(operation):
            rule = ("i0",)
        for side, place in ((name[0], int(name[1])) for name in rule):
            items = inputs if side == "i" else operation.outputs
            if place < len(items):
                number = self.segment.number[id(items[place])]
                self.done.reads.append((number, operands[place] if side == "i" else self.done.layout[number]))
                self.done.read_by.append((index, source_tensor(self.segment, self.done.maker, number)))


def source_tensor(segment: Segment, maker: dict[int, int], number: int) -> int:
    """The tensor whose node the graph has: casts to the same type and markers are not in it."""
    while number in maker:
        operation = segment.operations[maker[number]]
        if operation.primitive not in _NOTHING and not _is_same_cast(operation):
            break
        number = segment.number[id(operation.inputs[0])]
    return number


def _moves_memory(operation: Op) -> bool:
    """Whether a primitive reads and writes memory of its own."""
    # Weights are cast once a step, not once a micro-batch: that is counted with the update.
    return not (operation.primitive in VIEWS | _NOTHING or _is_weight_copy(operation) or _is_same_cast(operation))


def _is_weight_copy(operation: Op) -> bool:
    return operation.primitive == "Cast" and operation.inputs[0].parameter is not None


def _is_same_cast(operation: Op) -> bool:
    return operation.primitive == "Cast" and operation.inputs[0].dtype == operation.outputs[0].dtype


def _contracted(operation: Op, a: Dims) -> Dim:
    """The dim that a product sums over: the one of its first operand that its result lacks."""
    out = operation.outputs[0].dims
    return a[-1] if a[-2].size == out[-2].size else a[-2]
