"""Collectives that the forward or backward pass waits for: when they begin, and how regions round around them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from parallel.torch_runtime import buckets  # noqa: E402
from parallel.torch_runtime.fusion.regions import RegionBinder, inductor  # noqa: E402
from parallel.torch_runtime.fusion.rewrite import Editor, ordered  # noqa: E402
from parallel.torch_runtime.graph import Graph, Kind, Node  # noqa: E402

PAIR = (0, 1)
KIND = Kind((4,), "float32")


def two_parts(kind: Kind = KIND) -> Graph:
    """Two parts of a batch, interleaved as a compiler orders them: the first part's sum stands behind the second's
    product."""
    nodes = [Node("Mul", [0, 1], [kind], number=2), Node("Mul", [2, 0], [kind], number=3),
             Node("Mul", [3, 0], [kind], number=4),
             Node("AllReduce", [2], [kind], {"group": 0, "op": "sum"}, number=5), Node("Add", [5, 4], [kind], number=6)]
    return Graph([("x", kind)], [("w", kind)], [], nodes, 6, [PAIR])


def test_a_sum_begins_as_soon_as_what_it_sends_is_there():
    found = [node.number for node in ordered(two_parts(), early=True, free=frozenset({PAIR}))]
    assert found == [2, 5, 3, 4, 6]


def test_where_ranks_differ_the_order_of_collectives_is_the_graphs():
    assert [node.number for node in ordered(two_parts(), early=True)] == [2, 3, 4, 5, 6]


def test_a_large_sum_that_the_pass_waits_for_is_not_held_back(monkeypatch):
    monkeypatch.setattr(buckets, "LARGE", 16)
    graph = Editor(two_parts()).graph(early=True, free=frozenset({PAIR}))
    assert [node.number for node in graph.nodes if node.marks.get(buckets.AWAITED)] == [5]
    items = buckets.bucketed(graph.nodes, graph, frozenset({PAIR}), lambda node: node.inputs, lambda node: set())
    assert [node.number for node in items] == [2, 5, 3, 4, 6]
    monkeypatch.setattr(buckets, "LARGE", 17)
    items = buckets.bucketed(graph.nodes, graph, frozenset({PAIR}), lambda node: node.inputs, lambda node: set())
    assert [node.number for node in items] == [2, 3, 4, 5, 6]


def test_regions_round_where_layers_are_summed_over_ranks_in_half_precision():
    state = {"w": torch.zeros(4)}
    for dtype, early, rounds in (("bfloat16", True, True), ("float32", True, False), ("bfloat16", False, False)):
        graph = Editor(two_parts(Kind((4,), dtype))).graph(early=early, free=frozenset({PAIR}))
        assert RegionBinder(graph, state, torch.device("cpu")).rounds is rounds


@pytest.mark.slow
def test_a_compiled_sum_rounds_as_often_as_the_graph():
    """residual + (sum + bias) with a bias that is nothing beside the sum: rounded once, it decides where the total lies
    half way between two numbers."""
    generator = torch.Generator().manual_seed(1)
    x, total = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(2))
    bias = torch.full((64,), -1e-7).bfloat16()

    def add(x, total, bias):
        return [x + (total + bias)]

    wanted = add(x, total, bias)[0]
    assert torch.equal(inductor(add, [x, total, bias], rounds=True)(x, total, bias)[0], wanted)
    once = inductor(add, [x, total, bias])(x, total, bias)[0]
    assert (once < wanted).float().mean() > 0.05 and not (once > wanted).any()
