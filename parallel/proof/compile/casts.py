"""Where a compiled graph changes the type of a parameter, and how often in one call."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.proof.compile.graph import Function, Graph, TensorType

# Inside a function a parameter has an arrow and the function's mark before its name.
_ARROW, _MARK = "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}", "CR_"
_SEEN_THROUGH = ("Load", "Depend", "Reshape")


@dataclass
class Casts:
    """Casts of one parameter: how often in one call of the graph, and the bytes that all of them read and write."""

    count: int = 0
    bytes: int = 0


RECEIVED = "(received)"
"""In place of the name of a parameter that another stage sends."""


def parameter_casts(graph: Graph) -> dict[str, Casts]:
    """Casts of every floating parameter whose type the graph changes."""
    found: dict[str, Casts] = {}
    for function, node, times in graph.walk():
        if node.op == "Cast" and times and (source := _parameter(graph, function, node.inputs[0])) is not None:
            name, kind = source
            if "float" in kind.dtype:
                casts = found.setdefault(name, Casts())
                casts.count += times
                casts.bytes += times * (kind.bytes + node.outputs[0].bytes)
    return found


def _parameter(graph: Graph, function: Function, name: str) -> tuple[str, TensorType] | None:
    """(name, type) of the parameter that a value is, behind what only marks an order and behind calls; else None."""
    node = function.by_name.get(name)
    while node is not None and node.op in _SEEN_THROUGH:
        name = node.inputs[0]
        node = function.by_name.get(name)
    if node is not None:
        return (RECEIVED, node.outputs[0]) if node.op == "Receive" and "pipeline_param" in node.marks else None
    bare = name.removeprefix(_ARROW).removeprefix(_MARK)
    if bare in graph.parameters:
        return bare, graph.parameters[bare]
    if name in function.inputs:
        place = function.inputs.index(name)
        for caller in (graph.main, *graph.functions.values()):
            for call in caller.nodes:
                if call.op == "call" and call.callee == function.name and place < len(call.inputs):
                    return _parameter(graph, caller, call.inputs[place])
    return None
