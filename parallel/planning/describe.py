"""What a network computes, counted from the network itself: every primitive with the shapes and shardings of its
inputs.

The forward pass is traced once with shapes instead of numbers: cells and primitives are called as always, but a
primitive only notes what it was given (`parallel.planning.shapes` says what comes out). The layouts are those that the
layers declare (`Layer.sharding()`), so there is no second list of formulas: a model that can be built can be planned.
Axes stay names here; `parallel.planning.cost.network` puts numbers on them for one `ParallelConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mindspore
from mindspore import Parameter, Tensor, nn, ops

from parallel.common.errors import UserError
from parallel.planning.shapes import (
    INTEGER_RESULTS,
    RULES,
    SIDE_RESULTS,
    Dim,
    Dims,
    Result,
    attended,
    broadcast,
    reshaped,
)
from parallel.sharding.layout import Layer
from parallel.sharding.trainable import pipeline_units, shared_parameters
from parallel.task import Task

WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8, "int8": 1, "bool": 1, "uint8": 1}
"""Bytes of an element."""

_NO_UNIT = -1
_ARITHMETIC = {"add": "Add", "sub": "Sub", "mul": "Mul", "truediv": "RealDiv", "floordiv": "FloorDiv", "gt": "Greater",
               "lt": "Less", "ge": "GreaterEqual", "le": "LessEqual"}
_FUNCTIONS = {"cast": "Cast", "reshape": "Reshape", "stop_gradient": "StopGradient", "depend": "Depend",
              "select": "Select", "zeros_like": "ZerosLike", "ones_like": "OnesLike", "assign": "Depend"}


class SymbolicTensor:
    """A tensor of the trace: dims, element type and where it comes from.

    Args:
        dims: sizes (what shards them is computed for one layout by `parallel.planning.cost.network`).
        dtype: name of the element type.
        parameter: name of the parameter that it is (also after casts), or None.
        differentiable: whether a gradient may flow to it.
        producer: index of the operation that made it, -1 for inputs and parameters.
        value: equal for results of equal primitives on equal inputs, which the compiler works out once on a stage.
    """

    def __init__(self, dims: Dims, dtype: str, parameter: str | None = None, differentiable: bool = False,
                 producer: int = -1, trace: Trace | None = None) -> None:
        self.dims, self.dtype, self.parameter = tuple(dims), dtype, parameter
        self.differentiable, self.producer, self.trace = differentiable, producer, trace
        self.value: object = self

    @property
    def shape(self) -> tuple[int, ...]:
        """The full shape."""
        return tuple(dim.size for dim in self.dims)

    @property
    def size(self) -> int:
        """Elements."""
        total = 1
        for dim in self.dims:
            total *= dim.size
        return total

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.dims)

    def __getitem__(self, key: Any) -> SymbolicTensor:
        keys = key if isinstance(key, tuple) else (key,)

        def rule(operands: list[Dims]) -> Result:
            dims = [Dim(len(range(*part.indices(dim.size))), dim.axis)
                    for part, dim in zip(keys, operands[0], strict=False) if isinstance(part, slice)]
            return Result(((*dims, *operands[0][len(keys):]),))

        return self.trace.record("StridedSlice", [self], rule)[0]

    def tile(self, times: tuple[int, ...]) -> SymbolicTensor:
        """As Tensor.tile."""
        return self.trace.record("Tile", [self], lambda operands: Result((tuple(
            Dim(dim.size * number, dim.axis) for dim, number in zip(operands[0], times, strict=True)),)))[0]

    def reshape(self, *shape: Any) -> SymbolicTensor:
        """As Tensor.reshape."""
        return self.trace.functional("Reshape", self, shape[0] if isinstance(shape[0], tuple) else shape)


def _arithmetic(primitive: str) -> Any:
    def method(self: SymbolicTensor, other: Any) -> SymbolicTensor:
        return self.trace.functional(primitive, self, other)

    return method


for _name, _primitive in _ARITHMETIC.items():
    setattr(SymbolicTensor, f"__{_name}__", _arithmetic(_primitive))
    if _name in ("add", "sub", "mul", "truediv"):
        setattr(SymbolicTensor, f"__r{_name}__", _arithmetic(_primitive))


@dataclass
class Op:
    """One primitive of the forward pass.

    Args:
        primitive: its name.
        scope: path of the cell that it belongs to.
        unit: index of the pipeline unit (0 before the layers, 1.. the layers, the last after them).
        inputs, outputs: tensors.
        rule: dims of the inputs -> dims of the results and what was summed over (`parallel.planning.shapes`).
        wanted: for each input the axes that the layer declares, or None where the primitive follows its input.
        declared: whether a layer declared a layout for it at all.
        out_wanted: axes of the result where the layer says so (used only under sequence parallelism), else None.
        plain: its arguments that are no tensors.
        one_hot_axis: what shards the classes of a OneHot (its strategy is that of its result).
        needed: whether a gradient flows through it to the parameters.
        layer: whether it is in the first cell of its unit, which full recomputation runs again.
        free: whether it is outside every unit: each stage that needs its result computes it for itself.
        attended: keys that each query of a fused attention is multiplied with; 0 for any other primitive.
    """

    primitive: str
    scope: str
    unit: int
    inputs: list[SymbolicTensor]
    outputs: list[SymbolicTensor]
    rule: Callable[[list[Dims]], Result]
    wanted: tuple[tuple[str | None, ...] | None, ...]
    declared: bool = False
    out_wanted: tuple[str | None, ...] | None = None
    plain: str = ""
    one_hot_axis: str | None = None
    needed: bool = False
    free: bool = False
    layer: bool = False
    attended: int = 0


@dataclass
class ParameterCount:
    """One trainable parameter.

    Args:
        name, shape, dtype: as it is stored, uncut.
        unit: the pipeline unit that owns it.
        shard_optimizer: whether its layer lets optimizer parallelism shard it.
        axes: named axes that shard its dims, those of the first primitive that takes it.
        order: all named axes of that primitive in the order of its device matrix.
        cast: element type in which that primitive takes it.
        user: name of that primitive.
        shared_units: all units that use it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    unit: int
    shard_optimizer: bool
    axes: tuple[str | None, ...] = ()
    order: tuple[str, ...] = ()
    cast: str | None = None
    user: str = ""
    shared_units: tuple[int, ...] = ()


@dataclass
class Description:
    """A network as counts. Batch sizes are those of one micro-batch over all data-parallel ranks."""

    operations: list[Op]
    parameters: list[ParameterCount]
    units: int
    scopes: list[list[str]]
    tokens: int
    inputs: list[SymbolicTensor] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def parameter_count(self) -> int:
        """Trainable parameters of the model."""
        return sum(_product(item.shape) for item in self.parameters)

    @cached_property
    def crossings(self) -> list[tuple[SymbolicTensor, int, set[int]]]:
        """(tensor, unit that makes it, other units that use it): what travels if they are on different stages."""
        made: dict[int, int] = {}
        users: dict[int, set[int]] = {}
        tensors: dict[int, SymbolicTensor] = {}
        for operation in self.operations:
            for item in operation.inputs:
                home = made.get(id(item))
                if home is not None and home != operation.unit:
                    users.setdefault(id(item), set()).add(operation.unit)
                    tensors[id(item)] = item
            if not operation.free:
                made |= {id(item): operation.unit for item in operation.outputs}
        return [(tensors[key], made[key], units) for key, units in users.items()]


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


class Trace:
    """State of one trace: the operations so far, the cell that runs, tensors of parameters."""

    def __init__(self, network: nn.Cell) -> None:
        self.operations: list[Op] = []
        self.sharding, self.names = {}, {}
        for name, cell in network.cells_and_names():
            self.names.setdefault(id(cell), name)
            if isinstance(cell, Layer):
                self.sharding |= {id(layout.primitive): layout for layout in cell.sharding()}
        self.units = unit_cells(network)
        self.unit_of = {id(cell): number for number, cells in enumerate(self.units) for cell in cells}
        self.first_cells = {id(cells[0]) for cells in self.units}
        self.stack: list[tuple[str, int, bool]] = [("", _NO_UNIT, False)]
        self.parameters: dict[int, SymbolicTensor] = {}
        self.values: dict[tuple, SymbolicTensor] = {}
        # The tensor beside its item: it must not die, or another one could get its id.
        self.constants: dict[int, tuple[Tensor, SymbolicTensor]] = {}
        self.first_use: dict[str, tuple] = {}

    def enter(self, cell: nn.Cell) -> None:
        """A cell begins."""
        _, unit, layer = self.stack[-1]
        self.stack.append((self.names.get(id(cell), ""), self.unit_of.get(id(cell), unit),
                           layer or id(cell) in self.first_cells))

    def leave(self) -> None:
        """It ends."""
        self.stack.pop()

    def item(self, value: Any) -> SymbolicTensor | None:
        """The trace's tensor for an argument, or None for plain values."""
        if isinstance(value, SymbolicTensor):
            return value
        if isinstance(value, Parameter):
            if id(value) not in self.parameters:
                dims = tuple(Dim(size) for size in value.shape)
                name = value.name if value.requires_grad else None
                self.parameters[id(value)] = SymbolicTensor(dims, _dtype(value.dtype), name, value.requires_grad,
                                                            trace=self)
            return self.parameters[id(value)]
        if isinstance(value, Tensor):
            if id(value) not in self.constants:
                item = SymbolicTensor(tuple(Dim(size) for size in value.shape), _dtype(value.dtype), trace=self)
                self.constants[id(value)] = (value, item)
            return self.constants[id(value)][1]
        return None

    def call(self, primitive: Any, arguments: tuple) -> Any:
        """A primitive is called: notes it and gives its results."""
        name = primitive.name
        # What is left out has no place in a strategy.
        arguments = tuple(value for value in arguments if value is not None)
        if name not in RULES:
            raise UserError("the planner has no shape rule for this primitive", where=self.stack[-1][0], value=name,
                            hint="add one line to parallel/planning/shapes.py")
        flat = list(arguments[0]) if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)) else None
        items = [self.item(value) for value in (flat if flat is not None else arguments)]
        tensors = [item for item in items if item is not None]
        layout = self.sharding.get(id(primitive))
        rest = [None if item is not None else value for item, value in zip(items, arguments, strict=False)]

        def rule(operands: list[Dims]) -> Result:
            return RULES[name](operands, primitive, rest)

        dtype = _dtype(arguments[1]) if name == "Cast" else None
        outputs = self.record(name, tensors, rule, _wanted(layout, items, name), layout is not None,
                              layout.outputs[0] if layout is not None and layout.outputs is not None else None, dtype,
                              repr(rest))
        if name == "OneHot" and layout is not None:
            self.operations[-1].one_hot_axis = layout.inputs[0][-1]
        if name == "FlashAttentionScore":
            self.operations[-1].attended = attended(primitive, tensors)
        return outputs[0] if len(outputs) == 1 and name != "SplitWithSize" else tuple(outputs)

    def functional(self, name: str, *arguments: Any) -> SymbolicTensor:
        """A function or operator outside any layer; it stays as its inputs are sharded."""
        items = [item for item in map(self.item, arguments) if item is not None]
        if not items:
            return arguments[0]
        if name == "Reshape":
            shape = tuple(arguments[1])
            return self.record(name, items, lambda operands: Result((reshaped(operands[0], shape),)))[0]
        if name in ("Cast", "StopGradient", "Depend", "ZerosLike", "OnesLike"):
            dtype = _dtype(arguments[1]) if name == "Cast" else None
            return self.record(name, items[:1], lambda operands: Result((operands[0],)), dtype=dtype)[0]
        return self.record(name, items, lambda operands: Result((broadcast(operands),)))[0]

    def record(self, name: str, inputs: list[SymbolicTensor], rule: Callable, wanted: tuple | None = None,
               declared: bool = False,
               out_wanted: tuple | None = None, dtype: str | None = None, plain: str = "") -> list[SymbolicTensor]:
        """Adds an operation and makes its results."""
        number, (scope, unit, layer) = len(self.operations), self.stack[-1]
        if dtype is None:
            dtype = "bool" if name in INTEGER_RESULTS else _widest(name, inputs)
        differentiable = any(item.differentiable for item in inputs) and name not in (
            *INTEGER_RESULTS, "OneHot", "StopGradient", "ZerosLike", "OnesLike")
        parameter = inputs[0].parameter if name == "Cast" else None
        kinds = SIDE_RESULTS.get(name, {})
        made = [SymbolicTensor(dims, kinds.get(index) or dtype, parameter, differentiable and index not in kinds,
                               number, self)
                for index, dims in enumerate(rule([item.dims for item in inputs]).outputs)]
        if plain:
            for index, item in enumerate(made):
                key = (name, tuple(id(other.value) for other in inputs), plain, dtype, item.dims, index)
                item.value = self.values.setdefault(key, item)
        wanted = wanted or (None,) * len(inputs)
        operation = Op(name, scope, unit, list(inputs), made, rule, wanted, declared, out_wanted, plain,
                       layer=layer)
        for item, axes in zip(inputs, wanted, strict=True):
            if item.parameter is not None and name != "Cast":
                self.first_use.setdefault(item.parameter, (axes, item.dtype, axes_in_order(operation), name))
        self.operations.append(operation)
        return made


def _wanted(layout: Any, items: list[SymbolicTensor | None], name: str) -> tuple | None:
    """The declared axes of each tensor among the arguments (a strategy has one entry for each, plain numbers ())."""
    if layout is None:
        return tuple(None for item in items if item is not None)
    if name == "OneHot":
        return tuple(layout.inputs[0][:-1] if index == 0 else None for index,
                     item in enumerate(items) if item is not None)
    entries = list(layout.inputs)
    wanted = []
    for index, item in enumerate(items):
        if item is not None:
            axes = entries[index] if index < len(entries) else None
            wanted.append(axes if axes is not None and len(axes) == len(item.dims) else None)
    return tuple(wanted)


def axes_in_order(operation: Op) -> tuple[str, ...]:
    """Named axes of a primitive in the order of its device matrix."""
    sides = [axes for axes in operation.wanted if axes]
    if operation.primitive == "Gather":
        sides.reverse()
    if operation.one_hot_axis:
        sides.append((operation.one_hot_axis,))
    names: list[str] = []
    for axes in sides:
        names += [axis for axis in axes if axis and axis not in names]
    return tuple(names)


def _dtype(kind: Any) -> str:
    return str(kind).lower().replace("mindspore.", "")


def _widest(name: str, inputs: list[SymbolicTensor]) -> str:
    if name == "OneHot":
        return "float32"
    if name == "Gather" or len({item.dtype for item in inputs}) == 1:
        return inputs[0].dtype
    return max((item.dtype for item in inputs), key=lambda dtype: (dtype.startswith(("float", "bf")), WIDTH[dtype]),
               default="float32")


def unit_cells(network: nn.Cell) -> list[list[nn.Cell]]:
    """Cells of each pipeline unit: before, layers, after; one unit for a network that cannot be staged."""
    return pipeline_units(network) or [[network]]


@contextmanager
def as_on_ascend() -> Iterator[None]:
    """Layers built within take the forms that they have on Ascend (several have another one for the CPU)."""
    real = mindspore.get_context

    def cpu_target(key: str) -> Any:
        return "Ascend" if key == "device_target" else real(key)

    mindspore.get_context = cpu_target
    try:
        yield
    finally:
        mindspore.get_context = real


def _primitive_classes(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        # What `ops.constexpr` makes is a primitive too, but works its constant out at once.
        if "__call__" in sub.__dict__ and sub.__name__ != "ProxyOp":
            yield sub
        yield from _primitive_classes(sub)


@contextmanager
def _noting(trace: Trace) -> Iterator[None]:
    """Within, calling cells and primitives notes instead of computing."""

    def call_primitive(self: Any, *arguments: Any, **named: Any) -> Any:
        return trace.call(self, (*arguments, *named.values()))

    def call_cell(self: nn.Cell, *arguments: Any, **named: Any) -> Any:
        trace.enter(self)
        try:
            return self.construct(*arguments, **named)
        finally:
            trace.leave()

    def function(name: str) -> Any:
        return lambda *arguments: trace.functional(name, *arguments)

    patches = [(nn.Cell, "__call__", call_cell), (ops.Primitive, "__call__", call_primitive)]
    patches += [(cls, "__call__", call_primitive) for cls in set(_primitive_classes(ops.Primitive))]
    patches += [(ops, name, function(primitive)) for name, primitive in _FUNCTIONS.items()]
    kept = [(owner, name, owner.__dict__[name]) for owner, name, _ in patches]
    try:
        for owner, name, value in patches:
            setattr(owner, name, value)
        # The operator would compute with a parameter that has no value yet.
        Parameter.__mul__ = lambda parameter, factor: trace.item(parameter) * factor
        yield
    finally:
        del Parameter.__mul__
        for owner, name, value in kept:
            setattr(owner, name, value)


def describe(task: Task, micro_batches: int = 1) -> Description:
    """Traces the network of `task` for one micro-batch.

    Args:
        task: built within `as_on_ascend()`; its network keeps nothing of the trace.
        micro_batches: parts of the global batch.

    Raises:
        UserError: a primitive without a rule in `parallel.planning.shapes`, or a batch that does not divide.
    """
    network = task.network
    network.set_train(True)
    trace = Trace(network)
    inputs = []
    for item in task.inputs:
        if item.shape[0] % micro_batches:
            raise UserError(f"the global batch {item.shape[0]} does not divide into micro-batches",
                            where="parallel.pipeline.micro_batches", value=micro_batches)
        rows = item.shape[0] // micro_batches
        inputs.append(SymbolicTensor((Dim(rows), *map(Dim, item.shape[1:])), item.dtype, trace=trace))
    with _noting(trace):
        loss = network(*inputs)
    _mark_needed(trace, loss)
    _unit_of_free(trace)
    parameters = _parameters(network, trace)
    return Description(trace.operations, parameters, len(trace.units), [[trace.names[id(cell)] for cell in cells]
                                                                        for cells in trace.units],
                       task.tokens // micro_batches, inputs, dict(task.figures))


def _mark_needed(trace: Trace, loss: Any) -> None:
    """Marks the operations that a gradient flows through, from the loss down."""
    losses = loss if isinstance(loss, tuple) else (loss,)
    wanted = {id(item) for item in losses[:1]}
    for operation in reversed(trace.operations):
        if any(id(item) in wanted and item.differentiable for item in operation.outputs):
            operation.needed = True
            wanted |= {id(item) for item in operation.inputs if item.differentiable}


def _unit_of_free(trace: Trace) -> None:
    """Gives operations outside all units (the loss's own slices, say) the unit of whoever uses them first."""
    first: dict[int, int] = {}
    for operation in reversed(trace.operations):
        if operation.unit == _NO_UNIT:
            operation.free = True
            operation.unit = min((first[id(item)] for item in operation.outputs if id(item) in first),
                                 default=len(trace.units) - 1)
        for item in operation.inputs:
            first[id(item)] = operation.unit


def _parameters(network: nn.Cell, trace: Trace) -> list[ParameterCount]:
    owners: dict[int, tuple[int, ...]] = {}
    for number, cells in enumerate(trace.units):
        for cell in cells:
            for parameter in cell.get_parameters():
                owners.setdefault(id(parameter), (number,))
    for parameter, cells in shared_parameters(network):
        units = tuple(sorted({trace.unit_of.get(id(cell), 0) for cell in cells}))
        owners[id(parameter)] = units
    counts = []
    for parameter in network.trainable_params():
        units = owners.get(id(parameter), (0,))
        axes, cast, order, user = trace.first_use.get(parameter.name, (None, None, (), ""))
        axes = axes or (None,) * len(parameter.shape)
        counts.append(ParameterCount(parameter.name, tuple(parameter.shape), _dtype(parameter.dtype), units[0],
                                     bool(parameter.parallel_optimizer), tuple(axes), order, cast, user, units))
    return counts
