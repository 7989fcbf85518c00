"""Which ranks of a layout have to be compiled: along the data axis graphs differ in nothing but the ranks they name.

A rank's graph says who it is in three ways: the rank lists of its groups, the partner of a Send or Receive, and
constants that depend on its coordinates (the first row of its slice of the vocabulary, say). Ranks that differ in their
data coordinate only have the same constants. So the first data coordinate is compiled in full, and one rank of the last
on each stage, which is checked to be the first's with other rank lists, node for node; all others are made from the
first. Where the check fails all ranks are compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from parallel.proof.compile.graph import Function, Graph, Node
from parallel.proof.dryrun.accounting import coordinates
from parallel.sharding.config import ParallelConfig

# The order in which MindSpore came by recomputed nodes differs from run to run.
_NOT_COMPARED = ("group", "group_ranks", "comm_reuse_tag", "related_fusion_key", "recompute_id")


def representatives(config: ParallelConfig, trust: bool = False) -> list[int]:
    """Ranks to compile: those of the first data coordinate, and of the last one on each stage; with `trust` none of the
    last one where there are but two."""
    last = config.data - 1 if config.data > 2 or not trust else 0
    places = {rank: coordinates(rank, config)[1:] for rank in range(config.world)}
    return [rank for rank, (data, op) in places.items() if data == 0 or (data, op) == (last, 0)]


def representative_of(rank: int, config: ParallelConfig) -> int:
    """The rank of data coordinate 0 with the same stage and op coordinate."""
    return rank - coordinates(rank, config)[1] * config.op


def same_but_for_groups(graphs: dict[int, Graph], layouts: dict[int, dict], config: ParallelConfig) -> bool:
    """Whether each compiled rank's graph is the derived one, node for node, and its parameters are sharded alike.

    Args:
        graphs: by rank.
        layouts: MindSpore's layout lists of each rank's parameters.
        config: resolved.
    """
    if len(graphs) == config.world:
        return True
    for rank, graph in graphs.items():
        source = representative_of(rank, config)
        if source == rank:
            continue
        made = derived(graphs[source], rank, config)
        if graph.functions or made.parameters != graph.parameters or len(made.main.nodes) != len(graph.main.nodes):
            return False
        if not all(alike(one, other) for one, other in zip(made.main.nodes, graph.main.nodes, strict=True)):
            return False
        if _nameless(layouts[source]) != _nameless(layouts[rank]):
            return False
    return True


def _nameless(layouts: dict[str, list]) -> dict[str, list]:
    """Layouts without the names of the optimizer's groups, which are hashes of the ranks."""
    return {name: [*layout[:5], bool(layout[5]), *layout[6:]] for name, layout in layouts.items()}


def alike(one: Node, other: Node) -> bool:
    """Whether two nodes are the same computation among the same ranks."""

    def signature(node: Node) -> tuple:
        kept = [{key: value for key, value in items.items() if key not in _NOT_COMPARED}
                for items in (node.attributes, node.marks)]
        value = node.value.SerializeToString() if node.value is not None else None
        return node.name, node.op, node.inputs, node.outputs, node.scope, node.callee, value, kept

    return signature(one) == signature(other)


def derived(graph: Graph, rank: int, config: ParallelConfig) -> Graph:
    """The graph of `rank` from that of the same stage and op coordinate with data coordinate 0.

    Args:
        graph: of data coordinate 0; flat.
        rank: whose graph is made.
        config: resolved.
    """
    data = coordinates(rank, config)[1]

    def moved(node: Node) -> Node:
        changed: dict[str, Any] = {}
        for key in ("group_rank_ids", "rank_list"):
            if node.attributes.get(key):
                ranks = [int(item[0]) if isinstance(item, list) else int(item) for item in node.attributes[key]]
                changed[key] = [[item] for item in moved_group(ranks, data, config)]
        for key in ("dest_rank", "src_rank"):
            if key in node.attributes:
                changed[key] = int(node.attributes[key]) + data * config.op
        return dataclasses.replace(node, attributes={**node.attributes, **changed}) if changed else node

    main = graph.main
    nodes = [moved(node) for node in main.nodes]
    return Graph(Function(main.name, main.inputs, nodes, main.result), graph.functions, graph.parameters)


def moved_group(ranks: Sequence[int], data: int, config: ParallelConfig) -> list[int]:
    """The group that a rank of data coordinate `data` is in, where a rank of data coordinate 0 is in `ranks`."""
    places = [coordinates(rank, config)[1] for rank in ranks]
    different = sorted(set(places))
    step = different[1] - different[0] if len(different) > 1 else 1
    span = step * len(different)
    offset = data // span * span + data % step
    return [rank + offset * config.op for rank in ranks]
