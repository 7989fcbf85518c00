"""Execution of one rank's graph, node by node: constants folded, collectives overlapped, parameters changed in place.

A graph is bound once: every node becomes a call with the indices of its inputs, of its result, and of what is freed
after it. Results have the value that they had when they were computed, as in the replay; where a result shares memory
with a parameter that is written before the result is read, it is copied first (`hazards`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parallel.common.errors import UserError
from parallel.torch_runtime.buckets import bucketed
from parallel.torch_runtime.graph import COLLECTIVES, Graph, Literal, Node
from parallel.torch_runtime.groups import Communicator, Pending
from parallel.torch_runtime.rules import ANSWERS, RULES, UPDATES, VIEWS, WRITES

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64,
          "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64,
          "bool": torch.bool}
_FOLDED_ELEMENTS = 1 << 16
_FREE_OF_TENSORS = {"UpdateState"}
_ONE_VIEW = {"Depend", "StopGradient", "Reshape", "Transpose", "TransposeExt", "ExpandDims", "Squeeze", "Flatten",
             "Cast", "Contiguous"}
"""Those of VIEWS that pass the memory of one input on as a whole."""


@dataclass
class Step:
    """A bound node: `function(values)` gives the result, or a list of results for the places `more`. Which places it
    waits for first, which are free after it, and whether its results are collectives under way."""

    node: Node
    function: Callable[[list], Any]
    position: int
    waits: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()
    more: tuple[int, ...] | None = None
    begins: bool = False


@dataclass
class Bound:
    """A graph ready to run.

    Args:
        graph: what was bound.
        steps: in order.
        values: template of the table of values: parameters and constants at their indices.
        unread: collectives whose results nobody reads; they are waited for at the end.
        copied: how many results are copied because a parameter is written while they are in use.
    """

    graph: Graph
    steps: list[Step]
    values: list[Any]
    communicator: Communicator | None
    unread: tuple[int, ...] = ()
    copied: int = 0
    observer: Callable[[Node, Any], None] | None = field(default=None, repr=False)

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """One step: the graph's result.

        Args:
            inputs: what is fed, in the order of the graph's inputs.
        """
        values = list(self.values)
        values[:len(inputs)] = inputs
        for step in self.steps:
            for position in step.waits:
                values[position] = values[position].wait()
            result = step.function(values)
            if step.more is None:
                values[step.position] = result
            else:
                for position, item in zip(step.more, result, strict=True):
                    values[position] = item
            if self.observer is not None:
                self.observer(step.node, result)
            for position in step.frees:
                values[position] = None
        for position in self.unread:
            values[position].wait()
        result = values[self.graph.result]
        if self.communicator is not None:
            self.communicator.wait_for_sends()
        return result.wait() if isinstance(result, Pending) else result


class Binder:
    """Makes a `Bound` of a graph.

    Args:
        graph: one rank's, perhaps changed by passes.
        state: the rank's parameters by name; written in place.
        device: where to compute.
        floating: "declared", or "float64": every floating type becomes this one (exact mode).
        communicator: None in a world of one.
        rules: beside RULES and UPDATES, those of fused nodes.
        joins: groups whose collectives may begin together (`buckets`); None = op by op, nothing joined and every
            result a tensor of its own.
    """

    def __init__(self, graph: Graph, state: dict[str, Tensor], device: torch.device, *, floating: str = "declared",
                 communicator: Communicator | None = None, rules: dict[str, Callable] | None = None,
                 joins: frozenset[tuple[int, ...]] | None = None) -> None:
        self.graph, self.device, self.floating, self.communicator = graph, device, floating, communicator
        self.joins = joins if communicator is not None else None
        self.by_number = {node.number: node for node in graph.nodes}
        self.overwritten: set[int] = set()  # results whose place a collective's sum takes
        self.readers = Counter(number for node in graph.nodes for number in read_by(node))
        self.rules = {**RULES, **UPDATES, **(rules or {})}
        self.values: list[Any] = [None] * (graph.first_node + len(graph.nodes))
        self.state = state
        for number, (name, _) in enumerate(graph.parameters, graph.first_parameter):
            self.values[number] = state[name]
        for number, value in enumerate(graph.constants, graph.first_constant):
            self.values[number] = self.literal(value)
        # A graph that was reordered keeps the numbers of its nodes.
        self.values += [None] * (1 + max([node.number for node in graph.nodes], default=0) - len(self.values))
        self.known = set(range(graph.first_constant, graph.first_node))

    def dtype(self, name: str) -> torch.dtype | None:
        """The torch type of a declared one; None where nothing is declared."""
        found = DTYPES.get(name)
        if found is not None and found.is_floating_point and self.floating != "declared":
            return DTYPES[self.floating]
        return found

    def literal(self, value: Any) -> Any:
        """A constant as a rule takes it: one number as a Python number, more as a tensor."""
        if isinstance(value, tuple):
            return tuple(self.literal(item) for item in value)
        if not isinstance(value, Literal):
            return value
        if not value.kind.shape:
            return value.array().item()
        dtype = self.dtype(value.kind.dtype)
        if value.fill is not None:
            return torch.full(value.kind.shape, value.fill, dtype=dtype, device=self.device)
        return torch.from_numpy(value.array().copy()).to(self.device, dtype)

    def bind(self) -> Bound:
        """The bound graph.

        Raises:
            UserError: a primitive without a rule.
        """
        self.aliases = aliases_of(self.graph)
        self.sharing, self.copied = hazards(self.graph, self.aliases)
        nodes: list[Node] = []
        for node in self.graph.nodes:
            if node.op in _FREE_OF_TENSORS:
                self.known.add(node.number)
            elif node.number in self.aliases:
                self.values[node.number] = self.values[self.aliases[node.number]]
            elif not self._fold(node):
                nodes.append(node)
        steps = self._steps(nodes)
        unread = self._lifetimes(steps)
        return Bound(self.graph, steps, self.values, self.communicator, unread, len(self.copied))

    def _steps(self, nodes: list[Node]) -> list[Step]:
        """The nodes that are left after folding, as steps in the order of execution."""
        return [self._together(item) if isinstance(item, list) else self._step(item)
                for item in self._bucketed(nodes, read_by)]

    def _step(self, node: Node) -> Step:
        return Step(node, self._function(node, self.aliases, node.number in self.copied), node.number,
                    begins=node.op in COLLECTIVES)

    def _bucketed(self, items: list, reads: Callable[[Any], list[int]]) -> list:
        """Items with lists of the collectives that begin together; `items` as they are where nothing is joined."""
        if not self.joins:
            return items
        senders: dict[int, set[int]] = {}  # parameter -> collectives that send what shares its memory
        for node in self.graph.nodes:
            if node.op in COLLECTIVES and node.inputs:
                source = self.aliases.get(node.inputs[0], node.inputs[0])
                roots = {parameter for parameter, _ in self.sharing.get(source, ())}
                for parameter in roots | ({source} if self.graph.is_parameter(source) else set()):
                    senders.setdefault(parameter, set()).add(node.number)

        def harms(item: Any) -> set[int]:
            if not isinstance(item, Node) or item.op not in WRITES:
                return set()
            return {number for parameter in written_by(self.graph, item, self.aliases)
                    for number in senders.get(parameter, ())}

        return bucketed(items, self.graph, self.joins, reads, harms)

    def _together(self, nodes: list[Node]) -> Step:
        """Collectives that begin as one."""
        communicator, members = self.communicator, tuple(self.graph.groups[nodes[0].attributes["group"]])
        sources = [self._sent(node) for node in nodes]

        def begin(values: list) -> list[Pending]:
            return communicator.start_together(nodes, [source(values) for source, _ in sources], members,
                                               [own for _, own in sources])

        lead = Node("Together", [node.inputs[0] for node in nodes], [], {}, nodes[0].scope, {}, nodes[0].number)
        return Step(lead, begin, lead.number, more=tuple(node.number for node in nodes), begins=True)

    def _fold(self, node: Node) -> bool:
        """Computes a node of constants alone, once; whether it was."""
        if node.op in WRITES or node.op in COLLECTIVES or any(number not in self.known for number in node.inputs):
            return False
        inputs = [self._tensor(self.values[number]) for number in node.inputs]
        if node.op in ("Range", "Zeros", "Ones", "FillV2", "Full", "MakeTuple", "TupleGetItem", "Shape", "Reshape"):
            inputs = [self.values[number] for number in node.inputs]
        elif node.inputs and node.op not in ("DynamicBroadcastGradientArgs", "BroadcastGradientArgs"):
            # Of the further inputs those that are shapes, dims and the like stay numbers.
            kept = 2 if len(inputs) == 2 and _both_tensors(node.op) else 1
            inputs = [*inputs[:kept], *(self.values[number] for number in node.inputs[kept:])]
        result = self._declared(node, self._rule(node)(node, *inputs))
        if isinstance(result, Tensor):
            if result.numel() > _FOLDED_ELEMENTS:
                return False
            result = result.item() if result.dim() == 0 else result.to(self.device)
        self.values[node.number] = result
        self.known.add(node.number)
        return True

    def _tensor(self, value: Any) -> Any:
        if isinstance(value, (bool, int, float)):
            return torch.tensor(value, dtype=self.dtype("float32") if isinstance(value, float) else None)
        return value

    def _rule(self, node: Node) -> Callable:
        found = self.rules.get(node.op)
        if found is None:
            raise UserError(f"no rule for the primitive {node.op}", where=node.scope,
                            hint="add one to parallel/torch_runtime/rules.py")
        return found

    def _declared(self, node: Node, result: Any) -> Any:
        """`result` in the type and shape that the graph declares."""
        if len(node.outputs) != 1 or not isinstance(result, (Tensor, bool, int, float)):
            return result
        kind = node.outputs[0]
        dtype = self.dtype(kind.dtype)
        if not isinstance(result, Tensor):
            result = torch.tensor(result, dtype=dtype)
        if dtype is not None and result.dtype != dtype:
            result = result.to(dtype)
        if result.shape != kind.shape and not any(size < 0 for size in kind.shape):
            if result.numel() != 1:
                raise ValueError(f"{node.op} at {node.scope} gave shape {tuple(result.shape)}, the graph declares "
                                 f"{kind.shape}")
            result = result.reshape(kind.shape)
        return result

    def _function(self, node: Node, aliases: dict[int, int], copied: bool) -> Callable[[list], Any]:
        if node.op in WRITES:
            return self._update(node, aliases, copied)
        if node.op in COLLECTIVES:
            return self._collective(node)
        rule, inputs = self._rule(node), tuple(node.inputs)
        if all(number in self.known for number in inputs):  # too large to be kept: made at every step, on the device
            return lambda values: self._made_on_device(node, [values[i] for i in inputs])
        if len(node.outputs) == 1:
            dtype, shape = self.dtype(node.outputs[0].dtype), node.outputs[0].shape

            def call(values: list) -> Any:
                result = rule(node, *[values[i] for i in inputs])
                if not isinstance(result, Tensor):
                    return result if isinstance(result, tuple) else self._declared(node, result)
                if dtype is not None and result.dtype != dtype:
                    result = result.to(dtype)
                return result if result.shape == shape else self._declared(node, result)
        else:
            def call(values: list) -> Any:
                return rule(node, *[values[i] for i in inputs])
        return (lambda values: call(values).clone()) if copied else call

    def _made_on_device(self, node: Node, inputs: list) -> Any:
        with self.device:
            return self._declared(node, self._rule(node)(node, *inputs)).to(self.device)

    def _update(self, node: Node, aliases: dict[int, int], copied: bool) -> Callable[[list], Any]:
        rule, inputs = self._rule(node), tuple(node.inputs)
        target = aliases.get(inputs[0], inputs[0])
        if not self.graph.is_parameter(target):
            raise UserError(f"{node.op} writes what is no parameter", where=node.scope)

        if node.op in ANSWERS:
            return lambda values: rule(node, *[values[i] for i in inputs])

        def call(values: list) -> Any:
            rule(node, *[values[i] for i in inputs])
            return values[target].clone() if copied else values[target]

        return call

    def _collective(self, node: Node) -> Callable[[list], Any]:
        communicator, members = self.communicator, tuple(self.graph.groups[node.attributes["group"]])
        if communicator is None:
            return lambda values: Pending(None, values[node.inputs[0]])
        if node.op == "Receive":
            dtype = self.dtype(node.outputs[0].dtype)
            return lambda values: communicator.start(node, dtype, members)
        source, own = self._sent(node)
        return lambda values: communicator.start(node, source(values), members, own)

    def _sent(self, node: Node) -> tuple[Callable[[list], Tensor], bool]:
        """What a collective sends, and whether it may be overwritten."""
        source = node.inputs[0]
        if self.sharing.get(source) or self.graph.is_parameter(self.aliases.get(source, source)):
            # It may be written before it has left.
            return (lambda values: values[source].clone()), True
        return (lambda values: values[source]), self.joins is not None and self._alone(source)

    def _alone(self, number: int) -> bool:
        """Whether a value that one node reads has its memory for itself."""
        first = number
        while number != self.graph.result and self.readers[number] == 1 and number not in self.known:
            node = self.by_number.get(number)
            if node is None:
                return False
            if node.op not in VIEWS:
                self.overwritten |= {first, number}
                return True
            if node.op not in _ONE_VIEW:
                return False
            number = node.inputs[0]
        return False

    def _lifetimes(self, steps: list[Step]) -> tuple[int, ...]:
        """Says for every step which collectives it has to wait for, and what is read for the last time by it."""
        last: dict[int, int] = {}
        begun: dict[int, int] = {}
        waited: list[list[int]] = [[] for _ in steps]
        for position, step in enumerate(steps):
            for number in read_by(step.node):
                last[number] = position
                if number in begun:
                    waited[position].append(number)
                    del begun[number]
            made = step.more if step.more is not None else (step.position,)
            if step.begins:
                begun.update(dict.fromkeys(made, position))
            for number in made:
                last.setdefault(number, position)
        freed: list[list[int]] = [[] for _ in steps]
        for number, position in last.items():
            if number >= self.graph.first_node and number != self.graph.result and number not in self.known \
                    and number not in begun:
                freed[position].append(number)
        for step, waits, frees in zip(steps, waited, freed, strict=True):
            step.waits, step.frees = tuple(dict.fromkeys(waits)), tuple(frees)
        return tuple(number for number in begun if number != self.graph.result)


def read_by(node: Node) -> list[int]:
    """Numbers of the values whose contents a node reads; what a Depend follows is not read."""
    return node.inputs[:1] if node.op == "Depend" else [] if node.op in _FREE_OF_TENSORS else node.inputs


def _both_tensors(op: str) -> bool:
    return op in ("Add", "Sub", "Mul", "Div", "RealDiv", "Pow", "Maximum", "Minimum", "Equal", "NotEqual", "Less",
                  "Greater", "LessEqual", "GreaterEqual", "FloorDiv", "FloorMod", "Mod", "LogicalAnd", "LogicalOr")


def aliases_of(graph: Graph) -> dict[int, int]:
    """Depends on a parameter are the parameter itself: what is read is what it holds when it is read."""
    aliases: dict[int, int] = {}
    for node in graph.nodes:
        if node.op == "Depend" and node.inputs:
            source = aliases.get(node.inputs[0], node.inputs[0])
            if graph.is_parameter(source):
                aliases[node.number] = source
    return aliases


def written_by(graph: Graph, node: Node, aliases: dict[int, int]) -> tuple[int, ...]:
    """Numbers of the parameters that a node writes."""
    return tuple(aliases.get(number, number) for number in node.inputs[:WRITES.get(node.op, 0)])


def hazards(graph: Graph, aliases: dict[int, int]) -> tuple[dict[int, set], set[int]]:
    """Which results share memory with parameters, and which of them have to be copies because the parameter is written
    before their last reading.

    Returns:
        for each result, pairs of a parameter and the result that first shared its memory; and the results to copy.
    """
    sharing: dict[int, set[tuple[int, int]]] = {}
    written: dict[int, int] = {}
    made: dict[int, int] = {}
    found: set[int] = set()
    for position, node in enumerate(graph.nodes):
        read = read_by(node)
        for number in read:
            found |= {root for parameter, root in sharing.get(number, ()) if written.get(parameter, -1) > made[root]}
        made[node.number] = position
        if node.number in aliases:
            continue
        writes = written_by(graph, node, aliases)
        shared: set[tuple[int, int]] = {(writes[0], node.number)} if writes and node.op not in ANSWERS else set()
        if node.op in VIEWS or node.op in COLLECTIVES:
            for number in read:
                source = aliases.get(number, number)
                if graph.is_parameter(source):
                    shared.add((source, node.number))
                shared |= sharing.get(number, set())
        if shared:
            sharing[node.number] = shared
        written.update(dict.fromkeys(writes, position))
    return sharing, found
