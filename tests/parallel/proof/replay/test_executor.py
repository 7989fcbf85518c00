"""Running a graph: unknown primitives, updates, shapes, freed values."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.common.errors import UserError
from parallel.proof.compile.graph import TensorType
from parallel.proof.replay.executor import Rank, prepare, run_step
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

    def test_wrong_shape_stops(self):
        with pytest.raises(ValueError, match="gave shape"):
            run_step(ranks_of(graph_of(node("Neg", "n", ("x",), (3,)))), [[np.zeros(2)]])

    def test_values_are_freed_after_their_last_use(self):
        program = prepare(graph_of(node("Neg", "a", ("x",), (2,)), node("Neg", "b", ("a",), (2,)),
                                   node("Neg", "c", ("b",), (2,))))
        assert program.dead_after == {"a": ["x"], "b": ["a"], "c": ["b"]}
