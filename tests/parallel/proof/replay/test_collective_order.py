"""Collectives of one group come in the same order on all ranks."""

from __future__ import annotations

import numpy as np

from parallel.proof.replay.collective_order import wrong_order
from parallel.proof.replay.executor import Program, Rank, prepare, run_step
from tests.parallel.proof.replay.graphs import collective, graph_of, node


class TestOrders:
    def ranks(self, *orders: str) -> list[Program]:
        """Two ranks whose graphs reduce -x and exp x, of one shape, in the given orders ("ab" or "ba")."""
        made = []
        for order in orders:
            calls = [collective("AllReduce", (0, 1), f"{name}2", name) for name in order]
            made.append(graph_of(node("Neg", "a", ("x",), (2,)), node("Exp", "b", ("x",), (2,)), *calls,
                                 node("Sub", "out", ("a2", "b2"), (2,))))
        return [prepare(graph) for graph in made]

    def test_other_order_of_equal_kinds(self):
        programs = self.ranks("ab", "ba")
        assert wrong_order(programs).startswith("collective 0 of group [0, 1] is not the same on all ranks: rank 0 at")
        inputs = [[np.ones(2, np.float32)]] * 2
        run_step([Rank(number, program, {}) for number, program in enumerate(programs)], inputs)  # it would not hang

    def test_a_collective_that_cannot_meet(self):
        """A cluster, and gloo, would wait for ever."""
        one = graph_of(node("Neg", "a", ("x",), (2,)), collective("AllReduce", (0, 1), "out", "a"))
        other = graph_of(node("Reshape", "a", ("x",), (1,)), node("AllReduce", "out", ("a",), (1,),
                                                                  group_rank_ids=[[0], [1]]))
        problem = wrong_order([prepare(one), prepare(other)])
        assert problem.startswith("collective 0 of group [0, 1] is not of one shape: rank 0 has [((2,), 'float32')]")

    def test_same_order(self):
        assert wrong_order(self.ranks("ab", "ab")) is None and wrong_order(self.ranks("ba", "ba")) is None

    def test_letters_in_another_order(self):
        def rank(op: str, peer: str, number: int, *tags: int) -> Program:
            nodes = [node(op, f"{op}{tag}", ("x",), (2,), group_rank_ids=[[0], [1]], sr_tag=tag, **{peer: number})
                     for tag in tags]
            return prepare(graph_of(*nodes))

        sends = rank("Send", "dest_rank", 1, 4, 5)
        assert wrong_order([sends, rank("Receive", "src_rank", 0, 4, 5)]) is None
        message = wrong_order([sends, rank("Receive", "src_rank", 0, 5, 4)])
        assert "rank 0 sends rank 1 comes in another order" in message and "tag 4" in message and "tag 5" in message

    def test_other_collectives_on_another_stage_are_no_order(self):
        assert wrong_order(self.ranks("ab", "aa")) is None and wrong_order(self.ranks("ab", "a")) is None
