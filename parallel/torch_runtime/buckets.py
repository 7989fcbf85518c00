"""Buckets of collectives: those of one kind, type and group that nobody waits for yet begin together, as one launch.

A gradient's AllReduce is small beside what a link carries, and the launches of some hundred cost more than the bytes.
So a collective is held back until its bucket is full, or until somebody reads the result of one that is in it; but not
a large one that the forward or the backward pass waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from parallel.torch_runtime.graph import Graph, Node
from parallel.torch_runtime.groups import JOINED

FULL = 48 << 20
"""Bytes of a bucket that begins without waiting for more."""

AWAITED = "awaited"
"""Mark of a collective whose result more than the update waits for."""

LARGE = 1 << 20
"""Bytes of such a collective that is never held back."""


def bucketed(items: Sequence[Any], graph: Graph, joins: frozenset[tuple[int, ...]], reads: Callable[[Any], list[int]],
             harms: Callable[[Any], set[int]]) -> list[Any]:
    """The items with collectives gathered into lists, one for each bucket; a bucket of one stays a node.

    Args:
        items: nodes, and anything else that is neither moved nor joined, in execution order.
        graph: the items'; its ranks all come to the same buckets, for these depend on nothing but the graph.
        joins: groups whose ranks have the same graph.
        reads: numbers of the values that an item reads.
        harms: collectives (by number) that have to begin before an item because it writes what they send.
    """
    found: list[Any] = []
    filling: dict[tuple, list[Node]] = {}
    sizes: dict[tuple, int] = {}
    held: dict[int, tuple] = {}

    def begin(key: tuple) -> None:
        nodes = filling.pop(key)
        for node in nodes:
            del held[node.number]
        found.append(nodes if len(nodes) > 1 else nodes[0])

    for item in items:
        for number in dict.fromkeys([*reads(item), *sorted(harms(item))]):
            if number in held:
                begin(held[number])
        key = _key(item, graph, joins)
        if key is None:
            found.append(item)
            continue
        sizes[key] = (sizes[key] if key in filling else 0) + item.outputs[0].bytes
        filling.setdefault(key, []).append(item)
        held[item.number] = key
        if sizes[key] >= FULL:
            begin(key)
    for key in list(filling):
        begin(key)
    return found


def _key(item: Any, graph: Graph, joins: frozenset[tuple[int, ...]]) -> tuple | None:
    """What the collectives of one bucket have in common; None for what is not held back."""
    if not isinstance(item, Node) or item.op not in JOINED or len(item.outputs) != 1:
        return None
    group = tuple(graph.groups[item.attributes["group"]])
    if item.marks.get(AWAITED) and item.outputs[0].bytes >= LARGE:
        return None
    if len(group) == 1 or group not in joins or not (item.op == "AllReduce" or item.outputs[0].shape):
        return None
    return item.op, group, str(item.attributes.get("op") or "sum"), item.outputs[0].dtype
