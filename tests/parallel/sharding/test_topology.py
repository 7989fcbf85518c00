"""Ranks on machines as in PanGu-alpha's Fig. 5: op inside a node, stages inside a rack, data across racks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.sharding.config import ParallelConfig
from parallel.sharding.topology import AXES, group_of, mesh_rows, place_nodes, rack_rows, reach


def config(data: int, op: int, stages: int) -> ParallelConfig:
    return ParallelConfig(data=data, op=op, pipeline={"stages": stages, "micro_batches": stages}).resolve()


def test_200b_is_placed_as_in_the_paper():
    layout = config(16, 8, 16)
    nodes = place_nodes(layout)
    assert len(nodes) == 256 and len({node.rack for node in nodes}) == 16
    assert [reach(axis, layout, nodes) for axis in AXES] == ["inside a node", "inside a rack", "across racks"]
    # Rack 3 holds data coordinate 3 of all 16 stages: every 16th machine.
    assert [node.node_rank for node in nodes if node.rack == 3] == list(range(3, 256, 16))
    assert rack_rows(layout, nodes)[3] == [3, 3, " ".join(str(3 + 16 * stage) for stage in range(16))]
    assert mesh_rows(layout, nodes)[1] == ["pipeline", 16, 128, "0 128 256 384 .. 1920", "inside a rack"]


@pytest.mark.parametrize(("sizes", "per_rack", "expected"), [
    ((64, 8, 1), None, ["inside a node", "-", "across racks"]),   # 2.6B on 512
    ((64, 8, 1), 64, ["inside a node", "-", "inside a rack"]),
    ((2, 16, 4), None, ["inside a rack", "inside a rack", "across racks"]),  # an op axis of two machines
    ((4, 2, 1), None, ["inside a node", "-", "inside a node"]),
    ((1, 1, 1), None, ["-", "-", "-"]),
    ((8, 1, 2), None, ["-", "inside a rack", "inside a node"]),
])
def test_how_far_groups_reach(sizes, per_rack, expected):
    layout = config(*sizes)
    nodes = place_nodes(layout, nodes_per_rack=per_rack)
    assert [reach(axis, layout, nodes) for axis in AXES] == expected


@given(data=st.integers(1, 6), op=st.sampled_from([1, 2, 4, 8, 16]), stages=st.integers(1, 5))
def test_every_rank_has_one_coordinate_and_one_group_an_axis(data, op, stages):
    layout = config(data, op, stages)
    nodes = place_nodes(layout)
    held = [rank for node in nodes for rank in range(node.ranks[0], node.ranks[1] + 1)]
    assert held == list(range(layout.world))
    for axis, ways in zip(AXES, (op, stages, data), strict=True):
        groups = {tuple(group_of(axis, layout, rank)) for rank in range(layout.world)}
        assert sorted(rank for group in groups for rank in group) == held and {len(group) for group in groups} == {ways}
