"""Graphs made by hand."""

from __future__ import annotations

from parallel.proof.compile.graph import Function, Graph, Node, TensorType
from parallel.proof.replay.executor import Rank, prepare


def node(op: str, name: str = "out", inputs: tuple = (), shape: tuple | None = None, **attributes) -> Node:
    """A node of a hand-made graph."""
    outputs = [TensorType(shape, "float32")] if shape is not None else []
    return Node(name, op, list(inputs), outputs, attributes, scope=f"Default/cell/{op}-op0")


def graph_of(*nodes: Node, parameters: dict | None = None, inputs: tuple = ("x",)) -> Graph:
    """A flat graph whose result is its last node."""
    parameters = parameters or {}
    return Graph(Function("main", [*inputs, *parameters], list(nodes), nodes[-1].name), {}, parameters)


def ranks_of(*graphs: Graph) -> list[Rank]:
    """Ranks without parameters."""
    return [Rank(number, prepare(graph), {}) for number, graph in enumerate(graphs)]


def collective(op: str, ranks: tuple, name: str = "c", source: str = "x", **attributes) -> Node:
    """A collective of a hand-made graph on vectors of two."""
    return node(op, name, (source,), (2,), group_rank_ids=[[rank] for rank in ranks], **attributes)
