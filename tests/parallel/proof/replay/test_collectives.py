"""Collectives between ranks, and what would wait for ever."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.proof.compile.graph import Graph
from parallel.proof.replay.collectives import Call, Deadlock, Meeting
from parallel.proof.replay.executor import run_step
from tests.parallel.proof.replay.graphs import collective, graph_of, node, ranks_of


class TestCollectives:
    values = [np.array([1.0, 2.0], np.float32), np.array([10.0, 20.0], np.float32)]

    def run(self, kind: str, shape: tuple, **attributes) -> list:
        item = node(kind, "c", ("x",), shape)
        item.attributes = {"group_rank_ids": [[0], [1]], **attributes}
        made = [graph_of(item) for _ in range(2)]
        return run_step(ranks_of(*made), [[value] for value in self.values])

    def test_sum_and_maximum(self):
        assert [list(item) for item in self.run("AllReduce", (2,), op="sum")] == [[11, 22], [11, 22]]
        assert [list(item) for item in self.run("AllReduce", (2,), op="max")] == [[10, 20], [10, 20]]

    def test_gather_and_scatter(self):
        assert [list(item) for item in self.run("AllGather", (4,))] == [[1, 2, 10, 20]] * 2
        assert [list(item) for item in self.run("ReduceScatter", (1,), op="sum")] == [[11], [22]]

    def test_exchange(self):
        assert [list(item) for item in self.run("AlltoAll", (2,), split_dim=0, concat_dim=0)] == [[1, 10], [2, 20]]

    def test_send_and_receive(self):
        send = graph_of(node("Send", "c", ("x",), (2,), group_rank_ids=[[0], [1]], dest_rank=1, sr_tag=4))
        receive = graph_of(node("Receive", "c", ("x",), (2,), group_rank_ids=[[0], [1]], src_rank=0, sr_tag=4))
        got = run_step(ranks_of(send, receive), [[value] for value in self.values])
        assert list(got[1]) == [1, 2]


class TestDeadlocks:
    inputs = [[np.zeros(2, np.float32)]] * 2

    def test_other_order_on_two_ranks(self):
        first, second = collective("AllReduce", (0, 1), "a"), collective("AllGather", (0, 1), "b")
        with pytest.raises(Deadlock, match=r"collective 0 of group \[0, 1\] is not the same.*AllReduce.*AllGather"):
            run_step(ranks_of(graph_of(first, second), graph_of(second, first)), self.inputs)

    def test_missing_member(self):
        with pytest.raises(Deadlock, match=r"rank 0 at AllReduce.*waits for rank 1 \(at its end\)"):
            run_step(ranks_of(graph_of(collective("AllReduce", (0, 1))), graph_of(node("Neg", "n", ("x",), (2,)))),
                     self.inputs)

    def test_receive_without_send(self):
        receive = node("Receive", "c", ("x",), (2,), group_rank_ids=[[0], [1]], src_rank=0, sr_tag=4)
        with pytest.raises(Deadlock, match=r"rank 1 at Receive from 0.*tag 4.*nobody sends"):
            run_step(ranks_of(graph_of(node("Neg", "n", ("x",), (2,))), graph_of(receive)), self.inputs)

    def test_send_without_receive(self):
        send = node("Send", "c", ("x",), (2,), group_rank_ids=[[0], [1]], dest_rank=1, sr_tag=4)
        with pytest.raises(Deadlock, match="a Send without Receive: rank 0 at Send to 1"):
            run_step(ranks_of(graph_of(send), graph_of(node("Neg", "n", ("x",), (2,)))), self.inputs)

    def test_two_ranks_receive_first(self):
        def both(peer: int) -> Graph:
            pair = {"group_rank_ids": [[0], [1]], "src_rank": peer, "dest_rank": peer, "sr_tag": 0}
            return graph_of(node("Receive", "r", ("x",), (2,), **pair), node("Send", "s", ("x",), (2,), **pair))

        with pytest.raises(Deadlock, match="no rank can go on"):
            run_step(ranks_of(both(1), both(0)), self.inputs)

    def test_rank_outside_its_group(self):
        call = Call(0, collective("AllReduce", (1, 2)), np.zeros(2))

        def coroutine():
            yield call

        with pytest.raises(Deadlock, match="the rank is not in the group"):
            Meeting([coroutine()]).run()
