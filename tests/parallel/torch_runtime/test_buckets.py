"""Which collectives begin together, and when."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from parallel.torch_runtime import buckets  # noqa: E402
from parallel.torch_runtime.graph import Graph, Kind, Node  # noqa: E402

PAIR = (0, 1)
GRAPH = Graph([], [], [], [], 0, [PAIR])


def collective(number: int, size: int = 4, op: str = "AllReduce", dtype: str = "float32") -> Node:
    return Node(op, [number - 100], [Kind((size,), dtype)], {"group": 0, "op": "sum"}, number=number)


def reader(number: int, *inputs: int) -> Node:
    return Node("Add", list(inputs), [Kind((4,), "float32")], number=number)


def bucketed(items, joins=frozenset({PAIR}), harms=lambda item: set()) -> list:
    """Numbers; lists for what begins together."""
    found = buckets.bucketed(items, GRAPH, joins, lambda node: node.inputs, harms)
    return [[node.number for node in item] if isinstance(item, list) else item.number for item in found]


def test_collectives_wait_for_each_other_until_one_is_read():
    items = [collective(101), reader(2), collective(103), reader(4, 103), collective(105)]
    assert bucketed(items) == [2, [101, 103], 4, 105]


def test_what_reads_a_collective_on_its_way_into_another_ends_the_bucket():
    items = [collective(101), Node("AllReduce", [101], [Kind((4,), "float32")], {"group": 0}, number=102)]
    assert bucketed(items) == [101, 102]


def test_kinds_and_types_are_not_mixed():
    items = [collective(101), collective(102, dtype="bfloat16"), collective(103, op="AllGather"), collective(104)]
    assert bucketed(items) == [[101, 104], 102, 103]


def test_a_full_bucket_begins(monkeypatch):
    monkeypatch.setattr(buckets, "FULL", 32)
    assert bucketed([collective(101), collective(102), collective(103), reader(4)]) == [[101, 102], 4, 103]


def test_groups_whose_ranks_differ_are_left_alone():
    items = [collective(101), collective(102)]
    assert bucketed(items, joins=frozenset()) == [101, 102]


def test_a_collective_leaves_before_what_it_sends_is_written():
    write = Node("Assign", [7, 8], [], number=3)
    assert bucketed([collective(101), write, collective(104)], harms=lambda node: {101} if node is write else set()) \
        == [101, 3, 104]
