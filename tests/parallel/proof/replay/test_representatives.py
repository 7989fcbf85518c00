"""Which ranks are compiled, and how the others' graphs follow."""

from __future__ import annotations

import pytest

from parallel.proof.compile.graph import Graph
from parallel.proof.replay.representatives import moved_group, representatives, same_but_for_groups
from parallel.sharding.config import ParallelConfig
from tests.parallel.proof.replay.graphs import collective, graph_of, node


class TestDistinct:
    config = ParallelConfig(data=4, op=2, pipeline={"stages": 2}).resolve()

    def test_the_first_data_coordinate_and_one_rank_of_the_last_are_compiled(self):
        assert representatives(self.config) == [0, 1, 6, 8, 9, 14]
        two = ParallelConfig(data=2, op=2).resolve()
        assert representatives(two) == [0, 1, 2] and representatives(two, trust=True) == [0, 1]
        assert representatives(ParallelConfig(op=4).resolve()) == [0, 1, 2, 3]

    @pytest.mark.parametrize("ranks, data, moved", [
        ([0, 1], 2, [4, 5]),  # op
        ([0, 2, 4, 6], 3, [0, 2, 4, 6]),  # data
        ([1, 3], 3, [5, 7]),  # pairs of neighbours on the data axis
        ([0, 4], 3, [2, 6]),  # every other one
        ([8, 10, 12, 14], 1, [8, 10, 12, 14]),  # on the second stage
    ])
    def test_groups_of_other_data_coordinates(self, ranks, data, moved):
        assert moved_group(ranks, data, self.config) == moved

    def test_another_constant_is_another_graph(self):
        def graph(group: tuple, shape: tuple = (2,)) -> Graph:
            return graph_of(collective("AllReduce", group, "c"), node("Neg", "out", ("c",), shape))

        config, layouts = ParallelConfig(data=4).resolve(), dict.fromkeys(range(4), {})
        everyone, pair, other = (0, 1, 2, 3), (0, 1), (2, 3)
        assert same_but_for_groups({0: graph(everyone), 3: graph(everyone)}, layouts, config)
        assert same_but_for_groups({0: graph(pair), 3: graph(other)}, layouts, config)
        assert not same_but_for_groups({0: graph(pair), 3: graph(pair)}, layouts, config)
        assert not same_but_for_groups({0: graph(pair), 3: graph(other, (1,))}, layouts, config)
