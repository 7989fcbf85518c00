"""What a segment holds while a runtime runs it node by node: the fullest moment of its backward pass.

The backward pass is followed operation by operation, last first. What gradients read stays until the last of them has
run; a gradient lives from the operation that makes it to the one that takes it, and several of one tensor until they
are added; a gradient of a parameter stays. What is not counted here is counted once a stage: parameters, moments, and
what the segments before this one keep.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from parallel.planning.cost.forward import ForwardPass
from parallel.planning.cost.segments import Segment, SegmentWalk
from parallel.planning.describe import WIDTH, Op
from parallel.planning.mesh import Mesh
from parallel.planning.runtime.kernels import SegmentKernels, is_free
from parallel.planning.shapes import PRODUCTS

_SCRATCH = {"Sigmoid": 2.0, "RmsNorm": 4.0, "SiLU": 3.0, "Abs": 1.0, "ReLU": 1.0, "ReduceMean": 1.0}
"""Results that a gradient makes on the way, in parts of the operation's result."""


class Walker:
    """Walks a segment backward.

    Args:
        mesh, segment: whose bytes.
        done: the forward pass as it was traced.
        kernels: what the runtime fuses.
        kept: bytes of every tensor that the backward pass reads, by number (and layout).
        wide: whether gradients of parameters are kept in float32: they are summed over ranks or the update reads them
            so.
        staged: whether there are stages: gradients of weights wait for what is to be sent, and are added to others.
    """

    def __init__(self, mesh: Mesh, segment: Segment, done: ForwardPass, kernels: SegmentKernels,
                 kept: dict[tuple, int], wide: bool, staged: bool) -> None:
        self.mesh, self.segment, self.done, self.kernels = mesh, segment, done, kernels
        self.kept: Counter = Counter()
        for (number, _), size in kept.items():
            self.kept[number] += size
        self.last: dict[int, int] = {}
        for index, number in done.read_by:
            self.last[number] = min(index, self.last.get(number, index))
        self.gradients: dict[int, list[int]] = defaultdict(list)
        self.live = self.most = self.found = 0
        self.wide, self.staged, self.put_off, self.borrowed, self.tables = wide, staged, 0, 0, 0
        self.waiting: set[int] = set()

    def run(self) -> SegmentWalk:
        """The walk."""
        kept = sum(self.kept.values())
        self.live = self.most = kept
        for item in self._leaving():
            self._gradient(item, self._size(item))
        for index in reversed(range(len(self.segment.operations))):
            operation = self.segment.operations[index]
            if operation.needed:
                self._operation(index, operation)
        return SegmentWalk(self.most - kept, kept, self.found, self.put_off, self.borrowed, self.tables)

    def _leaving(self) -> list[int]:
        """Numbers of the tensors whose gradients come from other segments: those that nobody here reads last."""
        number, read = self.segment.number, set()
        for operation in self.segment.operations:
            if operation.needed:
                read |= {number[id(item)] for item in operation.inputs}
        return [number[id(item)] for operation in self.segment.operations if operation.needed
                for item in operation.outputs if item.differentiable and number[id(item)] not in read]

    def _size(self, number: int) -> int:
        item = self.segment.items[number]
        maker = self.done.maker.get(number)
        if maker is not None and self._inside(self.segment.operations[maker], number):
            return 0
        dims = self.done.layout.get(number, item.dims)
        return self.mesh.local(dims) * WIDTH[item.dtype]

    def _inside(self, operation: Op, number: int) -> bool:
        """Whether a tensor exists in a fused cell only."""
        names = self.kernels.attention + self.kernels.loss + self.kernels.lists
        if not any(f".{name}." in f".{operation.scope}." for name in names):
            return False
        if self.kernels.is_small_loss(operation):
            return False
        return not self._leaves(operation, number)

    def _leaves(self, operation: Op, number: int) -> bool:
        own = operation.scope
        item = self.segment.items[number]
        readers = [other for other in self.segment.operations if any(item is one for one in other.inputs)]
        return any(other.scope != own for other in readers) or not readers

    def _gradient(self, number: int, size: int) -> None:
        self.gradients[number].append(size)
        self.live += size
        self.most = max(self.most, self.live)

    def _operation(self, index: int, operation: Op) -> None:
        """The gradients of one operation: made, passed on or given up, and what is kept for them."""
        taken = left = self._taken(operation)
        waits = self.staged and operation.primitive in PRODUCTS and operation.inputs[-1].parameter is not None
        if waits:
            self._put_off(operation, taken)
        for place, (item, dims) in enumerate(zip(operation.inputs, self.done.operands[index], strict=True)):
            if not item.differentiable:
                continue
            if item.parameter is not None:
                self._parameter(operation, self.mesh.local(dims), WIDTH[item.dtype])
                continue
            number = self.segment.number[id(item)]
            size = self._size(number)
            if size == taken and self._passes_on(operation, place):
                self.gradients[number].append(left)  # both operands of an addition have the same memory
                left = 0
            else:
                self._gradient(number, size)
        if not waits:
            self.live -= left
        for number in [number for number, last in self.last.items() if last == index and number in self.kept]:
            size = self.kept.pop(number)
            if number not in self.waiting:
                self.live -= size

    def _taken(self, operation: Op) -> int:
        """Bytes of the gradients of an operation's results, added up where there are several of one."""
        own = [self.segment.number[id(item)] for item in operation.outputs]
        taken = 0
        for number in own:
            found = self.gradients.pop(number, [])
            if len(found) > 1:
                self.most = max(self.most, self.live + max(found))
                self.live -= sum(found) - max(found)
            taken += max(found, default=0)
        scratch = _SCRATCH.get(operation.primitive, 0.0) * self._size(own[0])
        self.most = max(self.most, self.live + int(scratch))
        return taken

    def _put_off(self, operation: Op, taken: int) -> None:
        number = source_of(self.segment, self.done, operation)
        size = taken + (0 if number in self.waiting else self.kept.get(number, 0))
        self.waiting.add(number)
        self.put_off += size
        self.borrowed = max(self.borrowed, size)

    def _parameter(self, operation: Op, count: int, width: int) -> None:
        """The gradient of a parameter of `count` elements of `width` bytes."""
        if operation.primitive == "Gather":
            self.tables += count * width
        if is_free(operation):
            return
        if self.staged:
            self.most = max(self.most, self.live + count * width)
            return
        own = count * (4 if self.wide else width)
        if self.wide and width < 4:
            self.most = max(self.most, self.live + own + count * width)
        self.live += own
        self.found += own
        self.most = max(self.most, self.live)

    def _passes_on(self, operation: Op, place: int) -> bool:
        """Whether the result's gradient is the operand's at `place`, in the same memory."""
        return is_free(operation) or operation.primitive in ("Add", "Transpose", "Concat") or (
            operation.primitive == "Sub" and place == 0)


def source_of(segment: Segment, done: ForwardPass, operation: Op) -> int:
    """The tensor whose memory a product's first operand is."""
    number = segment.number[id(operation.inputs[0])]
    while number in done.maker and is_free(segment.operations[done.maker[number]]):
        number = segment.number[id(segment.operations[done.maker[number]].inputs[0])]
    return number
