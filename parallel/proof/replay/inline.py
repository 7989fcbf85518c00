"""Graphs with functions made flat: every call is replaced by the nodes of the function that it calls.

Where micro-batches share one copy of the network's graph (`sharded_step(reuse=True)`; MindSpore demands it of
interleaved stages and of optimizer levels 2 and 3 under accumulation) a forward pass is a call that returns its result
and, as a partial application, the backward pass with all that it keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parallel.common.errors import UserError
from parallel.proof.compile.graph import Function, Graph, Node, attribute_value


@dataclass(frozen=True)
class Closure:
    """A function with its first arguments."""

    function: str
    arguments: tuple = ()


@dataclass(frozen=True)
class Many:
    """A tuple that holds closures, hence none of the flat graph's."""

    items: tuple


def flat(graph: Graph) -> Graph:
    """The same computation without functions; nodes of the k-th call have names that begin with `k/`.

    Raises:
        UserError: a graph that decides at run time what it calls.
    """
    if not graph.functions:
        return graph
    inliner = _Inliner(graph)
    result = inliner.name_of(inliner.body(graph.main, {}, ""))
    return Graph(Function(graph.main.name, graph.main.inputs, inliner.nodes, result), {}, graph.parameters)


class _Inliner:
    """Goes through functions in order; values are names of the flat graph, closures, or tuples with closures."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.nodes, self.calls, self.made = graph, [], 0, 0

    def body(self, function: Function, values: dict[str, Any], prefix: str) -> Any:
        """Adds the function's nodes; returns the value of its result.

        Args:
            function: what is called.
            values: of its inputs, by name; the results of its nodes are added.
            prefix: of its nodes' names.
        """
        for node in function.nodes:
            found = [self._look(name, values) for name in node.inputs]
            values[node.name] = self._value(node, found, function, values, prefix)
        return self._look(function.result, values)

    def _look(self, name: str, values: dict[str, Any]) -> Any:
        return values[name] if name in values else Closure(name) if name in self.graph.functions else name

    def _value(self, node: Node, found: list, function: Function, values: dict[str, Any], prefix: str) -> Any:
        if node.op == "Partial":
            return Closure(found[0].function, (*found[0].arguments, *found[1:]))
        if node.op == "call":
            return self._call(node, self._look(node.callee, values), found)
        composed = [item for item in found if not isinstance(item, str)]
        if node.op == "MakeTuple" and composed:
            return Many(tuple(found))
        if node.op == "Depend" and composed and found[0] is composed[0]:
            return found[0]
        if node.op == "TupleGetItem" and isinstance(found[0], Many):
            return found[0].items[attribute_value(function.by_name[node.inputs[1]].value)]
        self.nodes.append(dataclasses.replace(node, name=prefix + node.name,
                                              inputs=[self.name_of(item) for item in found]))
        return prefix + node.name

    def _call(self, node: Node, closure: Any, arguments: Sequence) -> Any:
        if not isinstance(closure, Closure):
            raise UserError("the graph decides at run time what it calls; replay takes fixed calls", where=node.scope,
                            value=node.callee)
        called = self.graph.functions[closure.function]
        self.calls += 1
        inputs = dict(zip(called.inputs, (*closure.arguments, *arguments), strict=True))
        return self.body(called, inputs, f"{self.calls}/")

    def name_of(self, value: Any) -> str:
        """A name in the flat graph; of a tuple its parts that are tensors (such a tuple is only waited for)."""
        if isinstance(value, str):
            return value
        parts = value.items if isinstance(value, Many) else value.arguments
        self.made += 1
        node = Node(f"tuple/{self.made}", "MakeTuple", [self.name_of(part) for part in parts], [])
        self.nodes.append(node)
        return node.name
