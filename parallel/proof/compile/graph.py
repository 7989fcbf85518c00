"""Reader of the graphs that MindSpore's partitioner leaves: nodes, types, functions and how often each runs.

A graph is read from the bytes of a `mind_ir` ModelProto (`_get_func_graph_proto(cell, phase, "mind_ir")`). Names are
truncated: what MindSpore writes as `<graph>:<name>` is `name` here, unique within its function.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

_DTYPES = {
    1: ("float32", 4), 2: ("uint8", 1), 3: ("int8", 1), 4: ("uint16", 2), 5: ("int16", 2), 6: ("int32", 4),
    7: ("int64", 8), 8: ("string", 1), 9: ("bool", 1), 10: ("float16", 2), 11: ("float64", 8), 12: ("uint32", 4),
    13: ("uint64", 8), 14: ("complex64", 8), 15: ("complex128", 16), 16: ("bfloat16", 2),
}  # fmt: skip
_PASS_THROUGH = ("Depend", "Load", "Cast", "Reshape")


@dataclass(frozen=True)
class TensorType:
    """Shape and element type of one tensor on one rank."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        size = next((size for name, size in _DTYPES.values() if name == self.dtype), 4)
        return math.prod(self.shape) * size


@dataclass
class Node:
    """One application of a primitive or of a function.

    Args:
        name: name of its (first) result.
        op: the primitive ("MatMul"), "Constant", or "call".
        inputs: names of results, parameters, graph inputs or functions.
        outputs: types of its results.
        attributes: of the primitive.
        instance: the primitive's instance name; the partitioner's own collectives carry their purpose in it.
        scope: path of cells, slash-separated; starts with "Gradients/" in the backward pass.
        marks: attributes of the node (micro, recompute, ...).
        callee: for a call: name of the function, or of the node whose value is called.
        value: the protobuf attribute of a constant.
    """

    name: str
    op: str
    inputs: list[str]
    outputs: list[TensorType]
    attributes: dict[str, Any] = field(default_factory=dict)
    instance: str = ""
    scope: str = ""
    marks: dict[str, Any] = field(default_factory=dict)
    callee: str | None = None
    value: Any = None

    @property
    def backward(self) -> bool:
        """Whether it belongs to the backward pass (recomputation not included)."""
        return self.scope.startswith("Gradients/")

    @property
    def recomputed(self) -> bool:
        """Whether it is a second computation of a forward node."""
        return "duplicated" in self.marks


@dataclass
class Function:
    """A graph: its inputs, nodes in execution order, and the name of its result."""

    name: str
    inputs: list[str]
    nodes: list[Node]
    result: str

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """Its nodes by the names of their results."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def users(self) -> dict[str, list[Node]]:
        """The nodes that read each name."""
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                users.setdefault(name, []).append(node)
        return users

    def source(self, name: str) -> Node | None:
        """The node that computed `name`, seen through casts, reshapes and depends; None for inputs and parameters."""
        node = self.by_name.get(name)
        while node is not None and node.op in _PASS_THROUGH and node.inputs:
            node = self.by_name.get(node.inputs[0])
        return node


@dataclass
class Graph:
    """All functions of one rank's step.

    Args:
        main: the function that is run.
        functions: those it calls, by name.
        parameters: type of every parameter that the graph uses, as this rank holds it.
    """

    main: Function
    functions: dict[str, Function]
    parameters: dict[str, TensorType]

    @cached_property
    def runs(self) -> dict[str, int]:
        """How often each function is run in one step, `main.name` included (1)."""
        runs: Counter[str] = Counter()
        pending = [(self.main, 1)]
        while pending:
            function, times = pending.pop()
            runs[function.name] += times
            for name, count in self._called(function).items():
                pending.append((self.functions[name], times * count))
        return dict(runs)

    def walk(self) -> list[tuple[Function, Node, int]]:
        """Every node with its function and how often it runs in one step."""
        functions = [self.main, *self.functions.values()]
        return [(function, node, self.runs.get(function.name, 0)) for function in functions for node in function.nodes]

    def operations(self) -> Counter[str]:
        """How often each primitive runs in one step."""
        counts: Counter[str] = Counter()
        for _, node, times in self.walk():
            if node.op not in ("Constant", "call"):
                counts[node.op] += times
        return counts

    def _called(self, function: Function) -> Counter[str]:
        counts: Counter[str] = Counter()
        for node in function.nodes:
            if node.op == "call":
                counts.update(self._targets(function, node.callee or "", ()))
            elif node.op == "Switch":  # one of two runs; both branches are counted, they are never both collective
                for name in node.inputs[1:]:
                    counts.update(self._targets(function, name, ()))
        return counts

    def _targets(self, function: Function, name: str, path: tuple[int, ...], depth: int = 0) -> set[str]:
        """Functions that the value `name` (element `path` of it) may be, found through tuples, partials and calls."""
        if name in self.functions:
            return {name}
        node = function.by_name.get(name)
        if node is None or depth > 64:
            return set()
        if node.op == "Partial" or (node.op == "Depend"):
            return self._targets(function, node.inputs[0], path if node.op == "Depend" else (), depth + 1)
        if node.op == "TupleGetItem":
            index = _integer(function.by_name.get(node.inputs[1]))
            return self._targets(function, node.inputs[0], (index, *path), depth + 1)
        if node.op == "MakeTuple" and path:
            return self._targets(function, node.inputs[path[0]], path[1:], depth + 1)
        if node.op == "Switch":
            return set().union(*(self._targets(function, item, path, depth + 1) for item in node.inputs[1:]))
        if node.op == "call":
            found = set()
            for target in self._targets(function, node.callee or "", (), depth + 1):
                callee = self.functions[target]
                found |= self._targets(callee, callee.result, path, depth + 1)
            return found
        return set()


def read_graph(data: bytes) -> Graph:
    """Reads the bytes of a ModelProto.

    Raises:
        ValueError: the bytes are no such message.
    """
    from google.protobuf.message import DecodeError
    from mindspore.train import mind_ir_pb2

    model = mind_ir_pb2.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(f"not a mind_ir graph: {error}") from None
    primitives = {item.name: item for item in model.primitives}
    functions = {item.name for item in model.functions}
    made = [_function(item, primitives, functions) for item in (model.graph, *model.functions)]
    parameters = {_short(item.name): _type(item) for item in model.graph.parameter}
    return Graph(made[0], {item.name: item for item in made[1:]}, parameters)


def _function(proto: Any, primitives: dict[str, Any], functions: set[str]) -> Function:
    nodes = [_node(item, primitives, functions) for item in proto.node]
    inputs = [_short(item.name) for item in (*proto.input, *proto.parameter)]
    return Function(proto.name, inputs, nodes, _short(proto.output[0].name) if proto.output else "")


def _node(proto: Any, primitives: dict[str, Any], functions: set[str]) -> Node:
    target = proto.op_type.removeprefix("REF::")
    primitive = primitives.get(target)
    marks = {item.name: attribute_value(item) for item in (*proto.node_attr, *proto.primal_attr)}
    types = [_type(item) for attribute in proto.attribute if attribute.name == "shape" for item in attribute.tensors]
    inputs = [name if name in functions else _short(name.removeprefix("REF::")) for name in proto.input]
    node = Node(_short(proto.output[0]), "", inputs, types, scope=proto.domain, marks=marks)
    if primitive is not None:
        node.op, node.instance = primitive.op_type, primitive.instance_name
        node.attributes = {item.name: attribute_value(item) for item in primitive.attribute}
    elif proto.op_type == "Constant":
        node.op, node.value = "Constant", proto.attribute[0] if proto.attribute else None
    else:
        node.op, node.callee = "call", target if target in functions else _short(target)
    return node


def attribute_value(attribute: Any) -> Any:
    """The Python value of an AttributeProto: number, string, list of such, or a list of tensor types."""
    kinds = type(attribute)
    if attribute.values:
        return [attribute_value(item) for item in attribute.values]
    if attribute.tensors:
        return [_type(item) for item in attribute.tensors]
    for name in ("ints", "floats", "doubles", "strings"):
        values = list(getattr(attribute, name, ()))
        if values:
            return [item.decode() if isinstance(item, bytes) else item for item in values]
    if attribute.type == kinds.FLOAT:
        return attribute.f
    if attribute.type == kinds.DOUBLE:
        return attribute.d
    if attribute.HasField("s"):
        return attribute.s.decode(errors="replace")
    return attribute.i if attribute.HasField("i") else None


def _integer(node: Node | None) -> int:
    value = attribute_value(node.value) if node is not None and node.value is not None else 0
    return value if isinstance(value, int) else 0


def _type(proto: Any) -> TensorType:
    return TensorType(tuple(proto.dims), _DTYPES.get(proto.data_type, (f"type{proto.data_type}", 4))[0])


def _short(name: str) -> str:
    """`<graph>:<name>[:<number>]` without the graph."""
    return name.partition(":")[2] or name
