"""Running a graph: unknown primitives, updates, shapes, freed values."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.common.errors import UserError
from parallel.proof.compile.graph import Node, TensorType
from parallel.proof.replay.executor import Rank, declared, prepare, run_step
from tests.parallel.proof.replay.graphs import graph_of, node, ranks_of


class TestExecutor:
    def test_unknown_primitive_is_named(self):
        with pytest.raises(UserError, match="no rule for the primitive Frobnicate.*numpy_ops.py"):
            prepare(graph_of(node("Frobnicate", "a", ("x",), (2,))))

    def test_what_was_loaded_before_an_update_stays(self):
        kind = {"w": TensorType((2,), "float32")}
        made = graph_of(node("Load", "old", ("w",), (2,)), node("Assign", "new", ("w", "x"), (2,)),
                        node("Sub", "out", ("x", "old"), (2,)), parameters=kind)
        rank = Rank(0, prepare(made), {"w": np.ones(2, np.float32)})
        got = run_step([rank], [[np.full(2, 5, np.float32)]])
        assert list(got[0]) == [4, 4] and list(rank.state["w"]) == [5, 5]

    def test_bfloat16_is_rounded_unless_exact(self):
        ms = pytest.importorskip("mindspore")
        x = np.array([1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -1 / 3, 3.4e38, np.inf, 0.0], np.float32)
        made = Node("n", "Identity", [], [TensorType((7,), "bfloat16")])
        rounded = declared(made, x)
        assert np.array_equal(rounded, ms.Tensor(x).astype(ms.bfloat16).astype(ms.float32).asnumpy())
        assert rounded[0] == 1.0 and rounded[1] == 1.0 + 2**-6 and rounded[2] == 1.0 + 2**-7
        assert np.isnan(declared(made, np.full(7, np.nan, np.float32))).all()
        assert np.array_equal(declared(made, x, exact=True), x)

    def test_wrong_shape_stops(self):
        with pytest.raises(ValueError, match="gave shape"):
            run_step(ranks_of(graph_of(node("Neg", "n", ("x",), (3,)))), [[np.zeros(2)]])

    def test_values_are_freed_after_their_last_use(self):
        program = prepare(graph_of(node("Neg", "a", ("x",), (2,)), node("Neg", "b", ("a",), (2,)),
                                   node("Neg", "c", ("b",), (2,))))
        assert program.dead_after == {"a": ["x"], "b": ["a"], "c": ["b"]}
