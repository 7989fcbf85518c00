"""Calls of functions become nodes."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.common.errors import UserError
from parallel.proof.compile.graph import Function, Graph, Node
from parallel.proof.replay.executor import Rank, prepare, run_step
from parallel.proof.replay.inline import flat
from tests.parallel.proof.replay.graphs import node


class TestFlat:
    def graph(self) -> Graph:
        """out = backward(forward(x)), twice: forward(x) = (-x, backward with x kept), backward(x, y) = x - y."""
        from mindspore.train.mind_ir_pb2 import AttributeProto

        index = [Node(name, "Constant", [], [], value=AttributeProto(name="value", type=AttributeProto.INT64, i=i))
                 for i, name in enumerate(("zero", "one"))]
        back = Function("back", ["kept", "y"], [node("Sub", "out", ("kept", "y"), (2,))], "out")
        fore = Function("fore", ["x"], [node("Neg", "y", ("x",), (2,)), node("Partial", "b", ("back", "x")),
                                        node("MakeTuple", "pair", ("y", "b"))], "pair")
        nodes = index
        for i, source in enumerate(("x", "g0")):
            forward, backward = node("call", f"c{i}", (source,)), node("call", f"g{i}", (f"y{i}",), (2,))
            forward.callee, backward.callee = "fore", f"b{i}"
            nodes += [forward, node("TupleGetItem", f"y{i}", (f"c{i}", "zero"), (2,)),
                      node("TupleGetItem", f"b{i}", (f"c{i}", "one")), backward]
        return Graph(Function("main", ["x"], nodes, "g1"), {"fore": fore, "back": back}, {})

    def test_calls_and_kept_values_become_nodes(self):
        made = flat(self.graph())
        assert not made.functions and [item.op for item in made.main.nodes if item.op != "Constant"] == [
            "Neg", "Sub", "Neg", "Sub"]
        got = run_step([Rank(0, prepare(made), {})], [[np.array([1.0, 3.0], np.float32)]])
        assert list(got[0]) == [4, 12]

    def test_unknown_callee_is_named(self):
        made = self.graph()
        made.main.nodes[2].callee = "x"
        with pytest.raises(UserError, match="decides at run time what it calls"):
            flat(made)
