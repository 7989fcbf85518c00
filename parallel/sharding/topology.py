"""Which machine holds which rank: the op axis inside a node, stages across the nodes of a rack, data across racks.

MindSpore numbers ranks with the stage slowest and op fastest, and `--node-rank` says which consecutive ranks a machine
gets. So the mapping of PanGu-alpha's Fig. 5 is a matter of numbering machines: those of one rack get the stages of the
same data coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.sharding.config import ParallelConfig

AXES = ("op", "pipeline", "data")


@dataclass(frozen=True)
class Node:
    """One machine.

    Args:
        node_rank: what `--node-rank` is there.
        rack: its rack.
        stages: pipeline stages of its ranks.
        data: data coordinates of its ranks.
        ranks: first and last.
    """

    node_rank: int
    rack: int
    stages: tuple[int, ...]
    data: tuple[int, ...]
    ranks: tuple[int, int]


def place_nodes(config: ParallelConfig, devices_per_node: int = 8, nodes_per_rack: int | None = None) -> list[Node]:
    """All machines, in the order of their node ranks.

    Args:
        config: resolved.
        devices_per_node: devices of a machine.
        nodes_per_rack: machines of a rack; None = as many as hold one data coordinate of every stage, which is the
            least with which no stage sends to another rack.
    """
    per_stage = config.data * config.op
    count = -(-config.world // devices_per_node)
    of_stage = max(1, -(-per_stage // devices_per_node))
    needed = config.pipeline.stages * max(1, config.op // devices_per_node)
    together = max(1, (nodes_per_rack or needed) // config.pipeline.stages)
    nodes = []
    for number in range(count):
        first, last = number * devices_per_node, min(config.world, (number + 1) * devices_per_node) - 1
        spots = [divmod(rank, per_stage) for rank in (first, last)]
        stages = tuple(range(spots[0][0], spots[1][0] + 1))
        data = tuple(sorted({rank % per_stage // config.op for rank in range(first, last + 1)}))
        nodes.append(Node(number, number % of_stage // together, stages, data, (first, last)))
    return nodes


def group_of(axis: str, config: ParallelConfig, rank: int = 0) -> list[int]:
    """The ranks that differ from `rank` in one axis of AXES only, itself included."""
    stage, inner = divmod(rank, config.data * config.op)
    data, op = divmod(inner, config.op)
    per_stage = config.data * config.op
    if axis == "op":
        return [stage * per_stage + data * config.op + other for other in range(config.op)]
    if axis == "data":
        return [stage * per_stage + other * config.op + op for other in range(config.data)]
    return [other * per_stage + inner for other in range(config.pipeline.stages)]


def reach(axis: str, config: ParallelConfig, nodes: list[Node]) -> str:
    """How far the farthest group of an axis reaches: "-", "inside a node", "inside a rack" or "across racks"."""
    farthest, names = 0, ("-", "inside a node", "inside a rack", "across racks")
    per_node = nodes[0].ranks[1] - nodes[0].ranks[0] + 1
    for rank in range(config.world):
        ranks = group_of(axis, config, rank)
        if ranks[0] != rank or len(ranks) == 1:
            continue  # each group once
        own = [nodes[member // per_node] for member in ranks]
        same_node, same_rack = len({node.node_rank for node in own}) == 1, len({node.rack for node in own}) == 1
        farthest = max(farthest, 1 if same_node else 2 if same_rack else 3)
    return names[farthest]


def mesh_rows(config: ParallelConfig, nodes: list[Node]) -> list[list]:
    """For a table: axis, ranks of a group, distance between neighbours, an example, how far the groups reach."""
    rows = []
    for axis in AXES:
        ranks = group_of(axis, config)
        step = ranks[1] - ranks[0] if len(ranks) > 1 else 0
        shown = " ".join(map(str, ranks[:4])) + (f" .. {ranks[-1]}" if len(ranks) > 4 else "")
        rows.append([axis, len(ranks), step, shown, reach(axis, config, nodes)])
    return rows


def rack_rows(config: ParallelConfig, nodes: list[Node]) -> list[list]:
    """For a table: rack, data coordinates, and its machines as `stage: node ranks`."""
    racks: dict[int, list[Node]] = {}
    for node in nodes:
        racks.setdefault(node.rack, []).append(node)
    rows = []
    for rack, own in sorted(racks.items()):
        data = sorted({inner for node in own for inner in node.data})
        rows.append([rack, f"{data[0]}-{data[-1]}" if len(data) > 1 else data[0],
                     " ".join(str(node.node_rank) for node in own)])
    return rows
