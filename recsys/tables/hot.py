"""Hot rows of tables on the host: those met most often stay on the device, with their optimizer's state, from one step
to the next, and are moved there. The last rows of every window are theirs. They go back to their tables whenever these
are read as a whole (a checkpoint, a version, a sweep) and when others have become hotter. A sweep takes only those away
that it frees.

Which rows are hot changes nothing but where they are: they move by the formulas of `parallel/kernels/tables.cpp`, in
the same order of operations.

Shapes: H hot rows of one width, R other rows of its window, W width, S floats of state of a row.
"""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from recsys.data.features import FIRST_KNOWN
from recsys.tables.columns import TablePlan
from recsys.tables.dynamic import STATES, DynamicTable, Rule
from recsys.tables.settings import TableSettings


class PutRows(nn.Cell):
    """Gives the first R rows of a window their values."""

    def __init__(self, window: Parameter, rows: int) -> None:
        super().__init__(auto_prefix=False)
        self.window, self.numbers, self.put = window, Tensor(np.arange(rows, dtype=np.int32)), ops.ScatterUpdate()

    def construct(self, values_RW: Tensor) -> Tensor:
        return self.put(self.window, self.numbers, values_RW)


class MoveRows(nn.Cell):
    """One update of the hot rows of a window, in place; returns the gradient of the others.

    Args:
        window: [R + H, W].
        states: [H, S], or [H, 1] that nobody reads where the rule has none.
        rule: one of `recsys.tables.dynamic.RULES`.
    """

    def __init__(self, window: Parameter, states: Parameter, rule: str) -> None:
        super().__init__(auto_prefix=False)
        self.window, self.states, self.rule = window, states, rule
        self.hot, self.width = states.shape[0], window.shape[1]
        self.rows = window.shape[0] - self.hot
        self.numbers = Tensor(np.arange(self.rows, window.shape[0], dtype=np.int32))
        self.put, self.sqrt, self.select, self.cut = ops.ScatterUpdate(), ops.Sqrt(), ops.Select(), ops.StridedSlice()
        self.widen = ops.Concat(1)

    def construct(self, gradient: Tensor, touched_H1: Tensor, rate: Tensor, epsilon: Tensor, beta1: Tensor,
                  beta2: Tensor, other1: Tensor, other2: Tensor, correction1: Tensor, correction2: Tensor) -> Tensor:
        end = (self.rows + self.hot, self.width)
        p = self.cut(self.window, (self.rows, 0), end, (1, 1))
        g = self.cut(gradient, (self.rows, 0), end, (1, 1))
        s = self.states
        if self.rule == "rowwise_adagrad":
            s = s + self.square_sum(g) / self.width
            moved = p - rate / (self.sqrt(s) + epsilon) * g
        elif self.rule == "adagrad":
            s = s + g * g
            moved = p - rate * g / (self.sqrt(s) + epsilon)
        elif self.rule == "lazy_adam":
            m = beta1 * self.cut(s, (0, 0), (self.hot, self.width), (1, 1)) + other1 * g
            v = beta2 * self.cut(s, (0, self.width), (self.hot, 2 * self.width), (1, 1)) + other2 * g * g
            moved = p - rate * (m / correction1 / (self.sqrt(v / correction2) + epsilon))
            s = self.widen((m, v))
        else:
            moved = p - rate * g
        s = self.select(ops.broadcast_to(touched_H1, s.shape), s, self.states)
        moved = self.select(ops.broadcast_to(touched_H1, p.shape), moved, p)
        others = self.cut(gradient, (0, 0), (self.rows, self.width), (1, 1))
        others = ops.depend(others, ops.assign(self.states, s))
        return ops.depend(others, self.put(self.window, self.numbers, moved))

    def square_sum(self, g_HW: Tensor) -> Tensor:
        """[H, 1], added up by halves."""
        square = g_HW * g_HW
        size = 1 << (self.width - 1).bit_length()
        if size > self.width:
            square = self.widen((square, ops.zeros((self.hot, size - self.width), mstype.float32)))
        while size > 1:
            size = size // 2
            square = (self.cut(square, (0, 0), (self.hot, size), (1, 1))
                      + self.cut(square, (0, size), (self.hot, 2 * size), (1, 1)))
        return square


class HotWidth:
    """The hot rows of one width.

    Args:
        window: of the network, [R + H, W].
        hot: H.
        rule: see `MoveRows`.

    Attributes:
        keys: int64 [n], table * 2^32 + row of the rows that are there, in rising order; n at most H.
        places: int32 [n], which of the H each is.
    """

    def __init__(self, window: Parameter, hot: int, rule: str) -> None:
        self.window, self.hot, self.first, self.width = window, hot, window.shape[0] - hot, window.shape[1]
        self.sizes = STATES[rule](self.width)
        self.states = Parameter(Tensor(np.zeros((hot, max(1, self.sizes)), np.float32)), name=f"{window.name}.hot")
        self.put, self.move = PutRows(window, self.first), MoveRows(window, self.states, rule)
        self.keys, self.places = np.zeros(0, np.int64), np.zeros(0, np.int32)
        self.met: list[tuple[np.ndarray, np.ndarray]] = []
        self.moved = False

    def slots(self, keys_N: np.ndarray) -> np.ndarray:
        """int32 rows of the window, -1 where a row is not hot."""
        if not len(self.keys):
            return np.full(len(keys_N), -1, np.int32)
        at = np.minimum(np.searchsorted(self.keys, keys_N), len(self.keys) - 1)
        return np.where(self.keys[at] == keys_N, self.places[at] + self.first, -1).astype(np.int32)

    def hottest(self) -> np.ndarray:
        """Keys of the H rows met most often since the last call, in rising order; of equal ones the smaller key."""
        if not self.met:
            return self.keys
        keys, index = np.unique(np.concatenate([keys for keys, _ in self.met]), return_inverse=True)
        counts = np.bincount(index, np.concatenate([times for _, times in self.met]))
        self.met = []
        return np.sort(keys[np.lexsort((keys, -counts))[:self.hot]])

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """(values [n, W], states [n, S]) in the order of the keys."""
        values, states = self.window.asnumpy()[self.first:], self.states.asnumpy()[:, :self.sizes]
        return values[self.places], states[self.places]

    def write(self, keys: np.ndarray, values_nW: np.ndarray, states_nS: np.ndarray) -> None:
        """Takes other rows."""
        window, states = self.window.asnumpy().copy(), np.zeros(self.states.shape, np.float32)
        window[self.first:self.first + len(keys)] = values_nW
        states[:len(keys), :self.sizes] = states_nS
        self.window.set_data(Tensor(window))
        self.states.set_data(Tensor(states))
        self.keys, self.places, self.moved = keys, np.arange(len(keys), dtype=np.int32), False


class HotTables:
    """The hot rows of all tables.

    Args:
        settings: `data.tables`.
        rule: name of the optimizer.
        plans, tables: by feature.
        windows: parameters of the network, one a width.
    """

    def __init__(self, settings: TableSettings, rule: str, plans: dict[str, TablePlan],
                 tables: dict[str, DynamicTable], windows: list[Parameter]) -> None:
        self.plans, self.tables, self.every = plans, tables, settings.hot_every
        self.widths = [HotWidth(window, settings.hot_rows, rule) for window in windows]
        self.numbers = {name: number for number, name in enumerate(plans)}
        self.names = list(plans)
        self.steps = self.found = self.asked = 0

    def slots(self, name: str, rows_N: np.ndarray, times_N: np.ndarray, train: bool) -> np.ndarray:
        """Rows in the window of a table's rows (the first two, which are no hot ones, left out), -1 where a row is not
        hot; in training they are counted as met."""
        own, slots = self.widths[self.plans[name].width], np.full(len(rows_N), -1, np.int32)
        keys = (np.int64(self.numbers[name]) << 32) + rows_N[FIRST_KNOWN:]
        slots[FIRST_KNOWN:] = own.slots(keys)
        if train:
            known = rows_N[FIRST_KNOWN:] >= 0
            own.met.append((keys[known], times_N[FIRST_KNOWN:][known]))
            self.asked, self.found = self.asked + int(known.sum()), self.found + int((slots >= 0).sum())
        return slots

    def put(self, values: list[np.ndarray]) -> None:
        """Gives the windows the rows of a step that are not hot."""
        for own, values_RW in zip(self.widths, values, strict=True):
            own.put(Tensor(values_RW))

    def update(self, gradients: list[Tensor], touched: list[np.ndarray], rule: Rule) -> list[np.ndarray]:
        """Moves the hot rows; gradients of the other rows of every window.

        Args:
            gradients: of the windows.
            touched: rows of each window that the step used, hot and others.
            rule: of this step.
        """
        one, b1, b2 = np.float32(1), np.float32(rule.beta1), np.float32(rule.beta2)
        numbers = [Tensor(np.float32(number)) for number in (
            rule.rate, rule.epsilon, b1, b2, one - b1, one - b2, rule.correction1, rule.correction2)]
        others = []
        for own, gradient, used in zip(self.widths, gradients, touched, strict=True):
            marks = np.zeros((own.hot, 1), bool)
            marks[used[used >= own.first] - own.first] = True
            others.append(own.move(gradient, Tensor(marks), *numbers).asnumpy())
            own.moved = True
        return others

    def end_step(self) -> None:
        """Chooses anew where it is time: after the first steps, then every `hot_every`."""
        self.steps += 1
        if self.steps in (1, 4, 16) or self.steps % self.every == 0:
            self.write_back()
            for own in self.widths:
                self._choose(own)

    def _choose(self, own: HotWidth) -> None:
        keys = own.hottest()
        values, states = np.zeros((len(keys), own.width), np.float32), np.zeros((len(keys), own.sizes), np.float32)
        for table, part, rows in self._parts(keys):
            values[part], states[part] = table.gather(rows), table.states_of(rows)
        own.write(keys, values, states)

    def _parts(self, keys: np.ndarray) -> list[tuple[DynamicTable, slice, np.ndarray]]:
        """(table, which of the keys are its, their rows)."""
        owners, parts = keys >> 32, []
        for number in np.unique(owners).tolist():
            part = slice(*np.searchsorted(owners, [number, number + 1]).tolist())
            parts.append((self.tables[self.names[number]], part, (keys[part] & (2**32 - 1)).astype(np.int32)))
        return parts

    def write_back(self) -> None:
        """Brings the tables up to date; the rows stay hot."""
        for own in self.widths:
            if own.moved:
                values, states = own.read()
                for table, part, rows in self._parts(own.keys):
                    table.set_rows(rows, values[part], states[part])
                own.moved = False

    def before_sweep(self, name: str, oldest: int, least: float) -> None:
        """Leaves out the rows that a sweep of a table will free, whose numbers go to other ids; all others stay hot.
        The tables are up to date (`write_back`).

        Args:
            name: of the table.
            oldest, least: see `DynamicTable.sweep`.
        """
        own, table, number = self.widths[self.plans[name].width], self.tables[name], self.numbers[name]

        def stays(keys: np.ndarray) -> np.ndarray:
            kept, mine = np.ones(len(keys), bool), (keys >> 32) == number
            kept[mine] = ~table.expires(keys[mine] & (2**32 - 1), oldest, least)
            return kept

        kept = stays(own.keys)
        own.keys, own.places = own.keys[kept], own.places[kept]
        own.met = [(keys[kept], times[kept]) for keys, times, kept in
                   ((keys, times, stays(keys)) for keys, times in own.met)]

    def forget(self) -> None:
        """No row is hot: they are others."""
        for own in self.widths:
            own.keys, own.places, own.met, own.moved = own.keys[:0], own.places[:0], [], False

    def figures(self) -> dict[str, float]:
        """The share of a step's rows that were on the device."""
        return {"hot_share": self.found / max(1, self.asked)}
