"""The kernels that a runtime starts for each operation of a segment, forward and backward.

A runtime that runs a graph node by node reads every operand from memory and writes every result there. Views cost
nothing until something needs them in order; a bias that follows a product is added by it; attention and cross entropy
are a few kernels each. What a gradient takes differs from one primitive to the next (`_BACKWARD`).
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from parallel.planning.cost.segments import Segment
from parallel.planning.describe import WIDTH, Op
from parallel.planning.mesh import Mesh
from parallel.planning.shapes import PRODUCTS, VIEWS, Dims


class Kernel(NamedTuple):
    """One kernel.

    Args:
        kind: "product", "weight" (that of a weight's gradient), "attention", "attention_grad", or what a pass over
            memory does.
        moved: bytes that it reads and writes; 0 for products.
        shape: of a product (element type, batch, rows, columns, inner); of attention (batch x heads, length, width);
            of a lookup and its gradient (rows,).
    """

    kind: str
    moved: int = 0
    shape: tuple = ()


_BACKWARD: dict[str, tuple[tuple[str, float], ...]] = {
    "GeLU": (("gelu_grad", 1.5),), "Sigmoid": (("pass", 1.5), ("pass", 1.0), ("pass", 1.5)),
    "SiLU": (("pass", 1.0), ("pass", 1.0), ("pass", 1.5), ("pass", 1.0), ("pass", 1.5)),
    "ReLU": (("pass", 0.7), ("pass", 1.2)), "Tanh": (("pass", 1.0), ("pass", 1.0), ("pass", 1.5)),
    "Softmax": (("pass", 1.5),), "LayerNorm": (("norm_grad", 1.5),), "Square": (("pass", 1.5),),
    "Exp": (("pass", 1.5),), "Log": (("pass", 1.5),), "Abs": (("pass", 1.0), ("pass", 1.5)),
    "RmsNorm": (("column", 1.0), ("column", 1.0), ("column", 1.0), ("column", 1.0), ("pass", 1.5), ("pass", 1.5),
                ("pass", 1.5), ("sum", 0.5), ("sum", 0.5)),
    "SplitWithSize": (("join", 1.0),), "Split": (("join", 1.0),), "ReduceSum": (("copy", 1.0),),
    "ReduceMean": (("pass", 1.0), ("copy", 1.0)), "Tile": (("sum", 1.0),), "Neg": (("pass", 1.0),),
}
"""Passes of a primitive's gradient: kind, and bytes in parts of what the primitive itself reads and writes. Concat
gives views; Transpose, Add and the like are worked out from their operands."""
_FORWARD: dict[str, tuple[tuple[str, float], ...]] = {
    "LayerNorm": (("norm", 1.0),), "GeLU": (("gelu", 1.0),), "Concat": (("join", 1.0),), "Stack": (("copy", 1.0),),
    "Tile": (("copy", 1.0),), "ReduceSum": (("sum", 1.0),), "ReduceMean": (("sum", 1.0),), "ReduceMax": (("sum", 1.0),),
    "RmsNorm": (("pass", 1.0), ("sum", 0.5), ("column", 1.0), ("column", 1.0)),
    "SplitWithSize": (), "Split": (), "Transpose": (), "StridedSlice": (), "OneHot": (("pass", 1.0),),
}
"""Passes of a primitive, in the same way; one over everything where nothing is said."""
_COLUMNS = 64
_LIST = (4, 8)  # small kernels beside attention to a list, forward and backward
_UNARY = frozenset({"Cast", "GeLU", "Sigmoid", "SiLU", "ReLU"})


class SegmentKernels:
    """The kernels of a segment's operations.

    Args:
        mesh: of the layout.
        segment: whose operations.
        attention: ends of the paths of cells that compute attention, each a kernel.
        loss: ends of the paths of cells that compute cross entropy over the last dim.
        lists: names of cells whose parts attend to a list of rows each.
    """

    def __init__(self, mesh: Mesh, segment: Segment, attention: tuple[str, ...], loss: tuple[str, ...],
                 lists: tuple[str, ...]) -> None:
        self.mesh, self.segment = mesh, segment
        self.attention, self.loss, self.lists = attention, loss, lists
        self.attending = {scope for operation in segment.operations if operation.primitive == "Sigmoid"
                          and self._within(operation, lists) for scope in [operation.scope]}
        self.readers = Counter(segment.number[id(item)] for operation in segment.operations if operation.needed
                               for item in operation.inputs if item.differentiable and item.parameter is None)
        self.maker = {segment.number[id(item)]: operation for operation in segment.operations
                      for item in operation.outputs}
        self.ordered: dict[int, bool] = {}
        self.summed: set[int] = set()
        self.masks: set[int] = set()
        """Numbers of the masks of scores that attention's kernels do not read."""
        self.unread = self._only_for_attention()

    def of(self, operation: Op, operands: list[Dims], outputs: tuple[Dims, ...],
           talks: bool) -> tuple[Counter, Counter]:
        """(forward, backward) kernels of one operation.

        Args:
            operation: the next of the segment's.
            operands, outputs: layouts of its tensors.
            talks: whether a collective follows, so that nothing is fused with what comes next.
        """
        if talks:
            self.summed.add(self.segment.number[id(operation.outputs[0])])
        if id(operation) in self.unread:
            return Counter(), Counter()
        if self._within(operation, self.attention):
            return self._attention(operation, operands)
        if self._within(operation, self.loss):
            found = self._loss(operation, operands)
            if found is not None:
                return found
        if any(f"{operation.scope}.".startswith(f"{scope}.") for scope in self.attending):
            return self._list(operation, operands)
        forward, backward = Counter(), Counter()
        self._forward(forward, operation, operands, outputs)
        if operation.needed:
            self._backward(backward, operation, operands, outputs)
            self._added(backward, operation, operands)
        return forward, backward

    def _only_for_attention(self) -> set[int]:
        """Operations without a gradient that make nothing but attention's mask: its kernels tell it by themselves."""
        found: set[int] = set()
        wanted: set[int] = set()  # tensors that somebody else reads
        masks: set[int] = set()
        for operation in reversed(self.segment.operations):
            outputs = {id(item) for item in operation.outputs}
            mask = bool(outputs & masks) and not outputs & wanted and not operation.needed
            if mask:
                found.add(id(operation))
            inputs = {id(item) for item in operation.inputs}
            if mask or self._within(operation, self.attention):
                masks |= inputs
            else:
                wanted |= inputs
        read = [item for operation in self.segment.operations for item in operation.inputs]
        self.masks = {self.segment.number[id(item)] for item in read
                      if id(item) in masks - wanted and not item.differentiable}
        return found

    def bytes_of(self, dims: Dims, dtype: str) -> int:
        """On this rank."""
        return self.mesh.local(dims) * WIDTH[dtype]

    def _within(self, operation: Op, names: tuple[str, ...]) -> bool:
        return any(f".{name}." in f".{operation.scope}." for name in names)

    # -- plain operations ---------------------------------------------------------------------------------------------

    def _forward(self, found: Counter, operation: Op, operands: list[Dims], outputs: tuple[Dims, ...]) -> None:
        name, number = operation.primitive, self.segment.number
        own = number[id(operation.outputs[0])]
        before = number[id(operation.inputs[0])]
        moved = self._moved(operation, operands, outputs)
        self.ordered[own] = True
        if is_free(operation):
            self.ordered[own] = self.ordered.get(before, True)
            if name == "Reshape" and not self.ordered[own]:
                found[Kernel("copy", moved)] += 1
                self.ordered[own] = True
        elif name in PRODUCTS:
            found[self._product(operation, operands, outputs, "forward")] += 1
        elif name == "Gather":
            size = self.bytes_of(outputs[0], operation.outputs[0].dtype)
            found[Kernel("gather", 2 * size, (self._rows(outputs[0]),))] += 1
        elif self._joins_product(operation):
            pass
        elif name == "Cast":
            found[self._cast(operation, moved, True)] += 1
        elif name in ("Add", "Sub", "Mul") and self._spreads(operands):
            found[Kernel("spread", moved)] += 1
        else:
            for kind, part in _FORWARD.get(name, (("pass", 1.0),)):
                found[Kernel(kind, int(part * moved))] += 1
            if name == "Transpose":  # attention's kernels write in the order that they read
                maker = self.maker.get(before)
                self.ordered[own] = maker is not None and self._within(maker, self.attention)
            elif name in _UNARY:
                self.ordered[own] = self.ordered.get(before, True)

    def _moved(self, operation: Op, operands: list[Dims], outputs: tuple[Dims, ...]) -> int:
        read = {self.segment.number[id(item)]: self.bytes_of(dims, item.dtype)
                for item, dims in zip(operation.inputs, operands, strict=True)}
        return sum(read.values()) + sum(self.bytes_of(dims, item.dtype)
                                        for item, dims in zip(operation.outputs, outputs, strict=True))

    def _joins_product(self, operation: Op) -> bool:
        """Whether an addition is of a bias to a plain product that nothing else reads."""
        if operation.primitive != "Add" or len(operation.inputs) != 2 or operation.inputs[1].parameter is None:
            return False
        number = self.segment.number[id(operation.inputs[0])]
        maker = self.maker.get(number)
        return (maker is not None and maker.primitive == "MatMul" and number not in self.summed
                and len(operation.inputs[1].dims) == 1)

    def _product(self, operation: Op, operands: list[Dims], outputs: tuple[Dims, ...], way: str) -> Kernel:
        out = [self.mesh.local((dim,)) for dim in outputs[0]]
        first, whole = operands[0], operation.outputs[0].dims
        inner = self.mesh.local((first[-1] if first[-2].size == whole[-2].size else first[-2],))
        batch = 1
        for size in out[:-2]:
            batch *= size
        rows, columns = out[-2:]
        shapes = {"forward": (rows, columns, inner), "left": (rows, inner, columns), "right": (inner, columns, rows)}
        kind = "weight" if way == "right" and operation.inputs[-1].parameter is not None else "product"
        return Kernel(kind, 0, (operation.inputs[0].dtype, batch, *shapes[way]))

    def _backward(self, found: Counter, operation: Op, operands: list[Dims], outputs: tuple[Dims, ...]) -> None:
        name = operation.primitive
        item = operation.outputs[0]
        gradient = self.bytes_of(outputs[0], item.dtype)
        if name in PRODUCTS:
            for way, side in zip(("left", "right"), operation.inputs, strict=False):
                if side.differentiable:
                    found[self._product(operation, operands, outputs, way)] += 1
        elif name == "Gather":
            table = self.bytes_of(operands[0], operation.inputs[0].dtype)
            found[Kernel("zero", table)] += 1
            found[Kernel("scatter", 3 * gradient, (self._rows(outputs[0]),))] += 1
        elif name in ("Add", "Sub", "Mul", "RealDiv", "Div", "AddN"):
            self._elementwise_gradient(found, operation, operands, gradient)
        elif is_free(operation):
            if name == "Reshape" and self._from_transpose(operation):
                found[Kernel("copy", 2 * gradient)] += 1
        elif name in ("Concat", "Stack", "Transpose", "StridedSlice", "OneHot"):
            pass
        elif name == "Cast":
            found[self._cast(operation, self._moved(operation, operands, outputs), False)] += 1
        else:
            moved = self._moved(operation, operands, outputs)
            for kind, part in _BACKWARD.get(name, (("pass", 1.0),)):
                found[Kernel(kind, int(part * moved))] += 1

    def _cast(self, operation: Op, moved: int, forward: bool) -> Kernel:
        wider = WIDTH[operation.outputs[0].dtype] > WIDTH[operation.inputs[0].dtype]
        return Kernel("widen" if wider == forward else "narrow", moved)

    def _spreads(self, operands: list[Dims]) -> bool:
        """Whether one operand is repeated along the other's dims."""
        sizes = sorted(map(self.mesh.local, operands))
        return len(sizes) == 2 and sizes[0] < sizes[1]

    def _rows(self, dims: Dims) -> int:
        return self.mesh.local(dims[:-1])

    def _from_transpose(self, operation: Op) -> bool:
        """Whether a view's gradient comes back out of order: its result is transposed next."""
        own = id(operation.outputs[0])
        return any(own == id(other.inputs[0]) and other.primitive == "Transpose" and
                   not self._feeds_product(other) for other in self.segment.operations)

    def _feeds_product(self, operation: Op) -> bool:
        own = id(operation.outputs[0])
        return any(own in map(id, other.inputs) and self._within(other, self.attention)
                   for other in self.segment.operations)

    def _elementwise_gradient(self, found: Counter, operation: Op, operands: list[Dims], gradient: int) -> None:
        name, size = operation.primitive, self.mesh.local(operation.outputs[0].dims)
        for place, (item, dims) in enumerate(zip(operation.inputs, operands, strict=True)):
            if not item.differentiable:
                continue
            other = operation.inputs[1 - place] if len(operation.inputs) == 2 else None
            if name == "Sub" and place == 1:
                found[Kernel("pass", 2 * gradient)] += 1
            elif name == "Mul":
                read = self.bytes_of(operands[1 - place], other.dtype) if other is not None else 0
                found[Kernel("pass", 2 * gradient + read)] += 1
            elif name in ("RealDiv", "Div"):
                found[Kernel("pass", 2 * gradient)] += 1
            if len(operands) == 2 and self.mesh.local(dims) < max(self.mesh.local(one) for one in operands) <= size:
                found[Kernel("sum", gradient + self.bytes_of(dims, item.dtype))] += 1

    def _added(self, found: Counter, operation: Op, operands: list[Dims]) -> None:
        """Sums of the gradients of what several operations read, noted at the first of them."""
        for item, dims in zip(operation.inputs, operands, strict=True):
            number = self.segment.number[id(item)]
            times = self.readers.pop(number, 1) - 1
            if times > 0:
                found[Kernel("pass", 3 * self.bytes_of(dims, item.dtype))] += times

    # -- attention, cross entropy -------------------------------------------------------------------------------------

    def _attention(self, operation: Op, operands: list[Dims]) -> tuple[Counter, Counter]:
        forward, backward = Counter(), Counter()
        if operation.primitive == "Mul":  # the scale of the queries
            size = self.bytes_of(operands[0], operation.inputs[0].dtype)
            forward[Kernel("pass", 2 * size)] += 1
            backward[Kernel("pass", 2 * size)] += 1
        keys = operation.attended
        if operation.primitive == "BatchMatMul" and operation.outputs[0].shape[-1] == operation.inputs[1].shape[-2]:
            keys = operation.inputs[1].shape[-2]  # queries times keys; the product with the values is the same kernel
        if keys:
            width = operands[0][-1].size
            shape = (self.mesh.local(operands[0]) // width // keys, keys, width)
            forward[Kernel("attention", 0, shape)] += 1
            if operation.needed:
                backward[Kernel("attention_grad", 0, shape)] += 1
        return forward, backward

    def _list(self, operation: Op, operands: list[Dims]) -> tuple[Counter, Counter]:
        """Attention to a list's rows, which are read once forward; backward also written, and read again."""
        forward, backward = Counter(), Counter()
        if operation.primitive == "ReduceSum":
            rows = self.bytes_of(operands[0], operation.inputs[0].dtype)
            forward.update({Kernel("pass", rows): 1, Kernel("pass", 0): _LIST[0]})
            backward.update({Kernel("pass", 3 * rows): 1, Kernel("pass", 0): _LIST[1]})
        return forward, backward

    def _loss(self, operation: Op, operands: list[Dims]) -> tuple[Counter, Counter] | None:
        """Cross entropy: the largest of each row, sums, and one gradient. None where it is of a few columns only."""
        if self.is_small_loss(operation):
            return None
        forward, backward = Counter(), Counter()
        if operation.primitive == "Cast":
            size = self.bytes_of(operands[0], operation.inputs[0].dtype)
            forward[Kernel("sum", size)] += 1
            forward[Kernel("rows", size)] += 1
            backward[Kernel("rows_grad", 2 * size)] += 1
        return forward, backward


    def keeps_input(self, operation: Op) -> bool:
        """Whether a fused cell's gradient reads what this operation of it takes: logits, queries."""
        logits = operation.primitive == "Cast" and self._within(operation, self.loss) and \
            not self.is_small_loss(operation) and not is_free(operation)
        return logits or (operation.primitive == "Mul" and self._within(operation, self.attention))

    def is_small_loss(self, operation: Op) -> bool:
        """Whether a cell of the loss is of a few columns only, as a ranker's: plain operations."""
        if not self._within(operation, self.loss):
            return False
        scope = operation.scope
        return not any(item.dims and item.shape[-1] >= _COLUMNS for other in self.segment.operations
                       if other.scope == scope for item in other.inputs)


def is_free(operation: Op) -> bool:
    """Whether a primitive starts no kernel for itself: views, marks, casts to the same type, copies of weights."""
    same = operation.primitive == "Cast" and operation.inputs[0].dtype == operation.outputs[0].dtype
    weight = operation.primitive == "Cast" and operation.inputs[0].parameter is not None
    return operation.primitive in VIEWS or same or weight
