"""Free sizes found from the constants of graphs of several numbers of rows."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.common.errors import UserError
from parallel.interchange.sizes import Counted, Filled, FreeSizes, Size, variants
from parallel.torch_runtime.graph import Graph, Kind, Literal, Node


def graphs(constants, names):
    """Graphs of one node over `constants(sizes)`, compiled for the sizes of `names`."""
    return [Graph([], [], [constants(**sizes)], [Node("Reshape", [0], [Kind((sizes[names[0]],), "float32")])], 1)
            for sizes in variants(names)]


def found(constants, names=("rows",)):
    return FreeSizes(names, graphs(constants, names)).constant(0)


def test_numbers_are_sums_of_multiples_of_the_free_sizes():
    assert found(lambda rows: (3, 2 * rows + 1, -1)) == (3, Size(1, (2,)), -1)
    assert found(lambda rows: -2.0 * rows) == Size(0.0, (-2.0,))
    both = found(lambda users, rows: (users, 4 * rows - users), ("users", "rows"))
    assert both == (Size(0, (1, 0)), Size(0, (-1, 4)))
    assert found(lambda rows: (3, 4)) == (3, 4)
    assert Size(1, (2,)) + 3 == Size(4, (2,)) and Size(1, (2,)) + Size(1, (1,)) == Size(2, (3,))


def test_tables_of_one_value_and_counting_ones():
    filled = found(lambda rows: Literal(Kind((6, rows), "float32"), 0.5))
    assert filled == Filled((6, Size(0, (1,))), "float32", 0.5)
    counted = found(lambda rows: Literal(Kind((rows,), "int32"), data=np.arange(3, 3 + 2 * rows, 2, dtype=np.int32)))
    assert counted == Counted(Size(0, (1,)), "int32", 3, 2)
    alike = Literal(Kind((2,), "float32"), data=np.array([1.0, 5.0], np.float32))
    assert found(lambda rows: alike) is alike


def test_what_is_no_such_sum_is_refused():
    with pytest.raises(UserError, match="no sum of multiples"):
        found(lambda rows: (rows // 5,))
    with pytest.raises(UserError, match="not known"):
        found(lambda rows: Literal(Kind((rows,), "float32"), data=np.sin(np.arange(rows, dtype=np.float32))))
    two = graphs(lambda rows: (rows,), ("rows",))
    two[1].nodes[0].op = "Transpose"
    with pytest.raises(UserError, match="more than its sizes"):
        FreeSizes(("rows",), two)


def test_shapes_of_results_are_free_too():
    assert FreeSizes(("rows",), graphs(lambda rows: (rows,), ("rows",))).shape(0) == (Size(0, (1,)),)
