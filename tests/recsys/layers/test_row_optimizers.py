"""Optimizers that move the rows of a step: the dense one to the bit, or the formulas of tables on the host."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from parallel.training.optimizers.dense import Adagrad
from parallel.training.optimizers.row_gradients import once
from parallel.training.optimizers.rows import ROW_OPTIMIZERS, RowAdagrad
from recsys.settings import SparseOptimizer
from recsys.tables.dynamic import DynamicTable
from recsys.tables.optimizer import TableOptimizer

pytestmark = pytest.mark.usefixtures("pynative")
ROWS, WIDTH = 20, 3


def asked(generator: np.random.Generator, slots: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Rows that slots ask for, some twice, some none (-1, whose gradient is 0)."""
    numbers = generator.integers(-1, ROWS // 2, (1, slots)).astype(np.int32)
    gradients = generator.standard_normal((1, slots, WIDTH)).astype(np.float32)
    gradients[numbers < 0] = 0.0
    return numbers, gradients


def test_each_row_once_with_the_sum_of_its_gradients():
    generator = np.random.default_rng(1)
    for slots in (1, 2, 12, 40):
        numbers, gradients = asked(generator, slots)
        rows, total = (item.asnumpy() for item in once(Tensor(numbers), Tensor(gradients)))
        known = sorted({row for row in numbers[0].tolist() if row >= 0}, reverse=True)
        assert rows.tolist() == known + [-1] * (slots - len(known))
        wanted = np.zeros((ROWS, WIDTH))
        np.add.at(wanted, numbers[0][numbers[0] >= 0], gradients[0][numbers[0] >= 0])
        np.testing.assert_allclose(total[:len(known)], wanted[known], rtol=1e-5, atol=1e-6)
        assert not total[len(known):].any()


def parameter(values: np.ndarray, name: str = "tables.0.table") -> Parameter:
    return Parameter(Tensor(values.copy()), name=name)


def test_rows_of_adagrad_are_the_dense_ones_to_the_bit():
    generator = np.random.default_rng(2)
    settings = SparseOptimizer(name="adagrad", initial_accumulator=0.1)
    start = generator.standard_normal((ROWS, WIDTH)).astype(np.float32)
    whole, table = parameter(start), parameter(start)
    dense, lazy = Adagrad([whole], settings), RowAdagrad([table], settings)
    for step in range(5):
        numbers, gradients = asked(generator)
        if step == 3:
            numbers[:] = -1  # a device none of whose rows is asked for
        rows, total = once(Tensor(numbers), Tensor(gradients * (numbers >= 0)[..., None]))
        gradient = np.zeros((ROWS, WIDTH), np.float32)
        known = rows.asnumpy() >= 0
        gradient[rows.asnumpy()[known]] = total.asnumpy()[known]
        rate, number = Tensor(np.float32(0.1)), Tensor(step)
        dense((Tensor(gradient),), rate, number)
        lazy((total,), rate, number, None, (rows,))
        np.testing.assert_array_equal(table.asnumpy(), whole.asnumpy())
        np.testing.assert_array_equal(lazy.adagrad_a[0].asnumpy(), dense.adagrad_a[0].asnumpy())
    assert (table.asnumpy() != start).any()


@pytest.mark.parametrize("name", sorted(ROW_OPTIMIZERS))
def test_rows_move_as_on_the_host(name):
    """The same gradients to the graph's optimizer and to the kernel of tables on the host."""
    generator = np.random.default_rng(3)
    run = _Train(SparseOptimizer(name=name, learning_rate=0.1, initial_accumulator=0.1))
    rules = TableOptimizer(run)
    host = DynamicTable(WIDTH, name, std=0.5, state_start=rules.state_start)
    places = host.meet(np.arange(ROWS), np.ones(ROWS, np.float32), 1)
    table = parameter(host.gather(places))
    accumulator = parameter(np.full((ROWS, 1), 0.1, np.float32), "accumulator")
    moves = ROW_OPTIMIZERS[name]([table], run.sparse_optimizer, [accumulator])
    for step in range(5):
        rows, total = once(*map(Tensor, asked(generator)))
        known = rows.asnumpy() >= 0
        host.update(places[rows.asnumpy()[known]], np.ascontiguousarray(total.asnumpy()[known]), rules.rule(step))
        moves((total,), Tensor(np.float32(0.1)), Tensor(step), None, (rows,))
        # The graph corrects Adam's bias in float32: 1 - 0.999 is right to 2e-5 there, and a step is 0.1.
        np.testing.assert_allclose(table.asnumpy(), host.gather(places), rtol=2e-6, atol=1e-5)


class _Train:
    """What `TableOptimizer` reads of a `train:` block."""

    def __init__(self, own: SparseOptimizer) -> None:
        self.sparse_optimizer, self.optimizer, self.steps = own, own, 10
