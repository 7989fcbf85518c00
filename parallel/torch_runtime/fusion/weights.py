"""Weights of graphs that change none, held in the type that they are used in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from parallel.torch_runtime.fusion.rewrite import Editor
from parallel.torch_runtime.graph import Graph, Kind
from parallel.torch_runtime.rules import WRITES

_HALVES = ("bfloat16", "float16")


def narrowed(graphs: Sequence[Graph]) -> list[Graph]:
    """The graphs with every parameter in half precision that all of them do nothing with but to cast it there: a
    forward pass then reads it at half the bytes, and no cast is left to run. Values are the same."""
    found: dict[str, set[str | None]] = {}
    for graph in graphs:
        editor = Editor(graph)
        written = {number for node in graph.nodes for number in node.inputs[:WRITES.get(node.op, 0)]}
        for number, (name, kind) in enumerate(graph.parameters, graph.first_parameter):
            own = {None} if number in written or kind.dtype != "float32" else _cast_to(editor, number)
            found.setdefault(name, set()).update(own)
    types = {name: next(iter(own)) for name, own in found.items() if len(own) == 1 and own <= set(_HALVES)}
    return [_retyped(graph, types) for graph in graphs]


def _cast_to(editor: Editor, number: int) -> set[str | None]:
    """The types that a parameter is cast to; None among them where it is read otherwise."""
    found: set[str | None] = set()
    for user in editor.users(number):
        if user.op in ("Load", "Depend") and user.inputs[0] == number:
            found |= _cast_to(editor, user.number)
        elif user.op == "Cast":
            found.add(user.outputs[0].dtype)
        elif editor.users(user.number) or user.op != "MakeTuple":  # a tuple that only states of memory read
            found.add(None)
    return found


def _retyped(graph: Graph, types: dict[str, str]) -> Graph:
    parameters = [(name, Kind(kind.shape, types.get(name, kind.dtype))) for name, kind in graph.parameters]
    kinds = {number: kind for number, (name, kind) in enumerate(parameters, graph.first_parameter) if name in types}
    nodes = []
    for node in graph.nodes:
        if node.op in ("Load", "Depend") and node.inputs and node.inputs[0] in kinds and node.outputs:
            kinds[node.number] = kinds[node.inputs[0]]
            node = dataclasses.replace(node, outputs=[kinds[node.number]])
        nodes.append(node)
    return dataclasses.replace(graph, parameters=parameters, nodes=nodes)
