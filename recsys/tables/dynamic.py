"""One table on the host: ids to rows without collisions, admission, expiry, rows that grow. Needs no MindSpore.

Shapes: N keys or rows of a call, W width of a row, S floats of optimizer state of a row.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parallel.common.errors import UserError
from recsys.tables.keys import ALWAYS_BELOW
from recsys.tables.native import address, library

UNKNOWN = -1
_FULL, _NO_MEMORY, _BAD_ROW = -1, -2, -3  # what the kernels return (parallel/kernels/tables.cpp)
RULES = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": 2, "lazy_adam": 3}
"""Optimizers that touch only the rows of the step, in the kernel's order."""
STATES = {"sgd": lambda width: 0, "rowwise_adagrad": lambda width: 1, "adagrad": lambda width: width,
          "lazy_adam": lambda width: 2 * width}
"""Floats of state that a row of each width has."""


@dataclass(frozen=True)
class Rule:
    """One update's numbers: see `recsys.tables.optimizer` for where they come from."""

    name: str
    rate: float
    epsilon: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    correction1: float = 1.0
    correction2: float = 1.0


@dataclass
class Entries:
    """What a table holds, as a checkpoint keeps it.

    Args:
        keys: int64 [N].
        rows: int32 [N]; -1 for a key that is counted but not admitted.
        values: float32 [N, W] (0 where there is no row).
        states: float32 [N, S].
        counts: float32 [N], how often each was seen (decayed).
        seen: uint32 [N], step or second when each was last seen.
    """

    keys: np.ndarray
    rows: np.ndarray
    values: np.ndarray
    states: np.ndarray
    counts: np.ndarray
    seen: np.ndarray

    NAMES = ("keys", "rows", "values", "states", "counts", "seen")

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, chosen: np.ndarray) -> Entries:
        """Those of a mask or index."""
        return Entries(*(getattr(self, name)[chosen] for name in self.NAMES))


@dataclass
class DynamicTable:
    """Rows of one feature, found by 64-bit keys.

    Args:
        width: W.
        optimizer: one of RULES; says how much state a row has.
        seed: of start values and draws of admission.
        std: sigma of the start; values depend on (seed, key) alone.
        state_start: what states start from.
        direct_rows: keys are 0 .. direct_rows - 3 and their rows follow two for the missing and the unseen value; 0:
            any keys, found by hashing.
        most: rows at most, 0 = no bound; when it is reached newcomers stay unknown until others expire.
        least: times that a key must have been seen before it gets a row.
        share: probability that a step which meets an unknown key admits it.
        folder: of the file for the rows; None = in memory.

    Raises:
        UserError: no memory, or the files cannot be made.
    """

    width: int
    optimizer: str = "rowwise_adagrad"
    seed: int = 1
    std: float = 0.01
    state_start: float = 0.0
    direct_rows: int = 0
    most: int = 0
    least: float = 1.0
    share: float = 1.0
    folder: Path | None = None
    states: int = field(init=False)

    def __post_init__(self) -> None:
        self.states = STATES[self.optimizer](self.width)
        file = None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = str(self.folder / "rows.bin").encode()
        self._kernel = library()
        self._table = self._kernel.table_new(self.width, self.states, self.direct_rows, self.most,
                                             self.seed & (2**64 - 1), self.std, self.state_start, file)
        if not self._table:
            raise UserError("the table cannot be made: no memory or no space", where=self.folder or "data.tables",
                            value=f"{self.direct_rows} rows of {self.width}")
        weakref.finalize(self, self._kernel.table_free, self._table)

    # -- what it holds ------------------------------------------------------------------------------------------------

    def _sizes(self) -> np.ndarray:
        sizes = np.zeros(4, np.int64)
        self._kernel.table_sizes(self._table, address(sizes))
        return sizes

    def __len__(self) -> int:
        """Keys with a row."""
        return int(self._sizes()[0])

    @property
    def waiting(self) -> int:
        """Keys that are counted but not admitted yet."""
        return int(self._sizes()[2])

    @property
    def bytes(self) -> int:
        """Of memory or files (pages never touched included)."""
        return int(self._sizes()[3])

    def find(self, keys_N: np.ndarray) -> np.ndarray:
        """int32 rows [N] of distinct or repeated keys, UNKNOWN where a key has none; changes nothing."""
        keys_N = np.ascontiguousarray(keys_N, np.int64)
        rows = np.empty(len(keys_N), np.int32)
        self._kernel.table_find(self._table, address(keys_N), len(keys_N), address(rows))
        return rows

    # -- training -----------------------------------------------------------------------------------------------------

    def meet(self, keys_N: np.ndarray, times_N: np.ndarray, now: int) -> np.ndarray:
        """Rows of *distinct* keys that a step meets `times_N` each: counts them and admits those that are due.

        Args:
            keys_N: int64, distinct.
            times_N: float32.
            now: step or second, above 0, below 2^32.
        """
        keys_N, times_N = np.ascontiguousarray(keys_N, np.int64), np.ascontiguousarray(times_N, np.float32)
        rows = np.empty(len(keys_N), np.int32)
        self._check(self._kernel.table_meet(self._table, address(keys_N), address(times_N), len(keys_N), now,
                                            self.least, self.share, ALWAYS_BELOW, address(rows)))
        return rows

    def gather(self, rows_N: np.ndarray, out: np.ndarray | None = None, at_N: np.ndarray | None = None,
               ) -> np.ndarray:
        """float32 [N, W] values of rows; or into `out`, at `at_N`. UNKNOWN rows are left as they are (0)."""
        rows_N = np.ascontiguousarray(rows_N, np.int32)
        out = np.zeros((len(rows_N), self.width), np.float32) if out is None else out
        self._kernel.table_gather(self._table, address(rows_N), address(at_N), len(rows_N), address(out))
        return out

    def update(self, rows_N: np.ndarray, gradients: np.ndarray, rule: Rule, at_N: np.ndarray | None = None) -> None:
        """Moves *distinct* rows by their gradients [N, W] (or those at `at_N`); UNKNOWN rows are left out."""
        rows_N = np.ascontiguousarray(rows_N, np.int32)
        self._kernel.table_update(self._table, address(rows_N), address(at_N), len(rows_N), address(gradients),
                                  RULES[rule.name], rule.rate, rule.epsilon, rule.beta1, rule.beta2, rule.correction1,
                                  rule.correction2)

    def set_rows(self, rows_N: np.ndarray, values_NW: np.ndarray, states_NS: np.ndarray) -> None:
        """Gives rows their values and states; counts and times stay."""
        rows_N = np.ascontiguousarray(rows_N, np.int32)
        values_NW, states_NS = (np.ascontiguousarray(array, np.float32) for array in (values_NW, states_NS))
        self._kernel.table_set(self._table, address(rows_N), len(rows_N), address(values_NW), address(states_NS))

    def expires(self, rows_N: np.ndarray, oldest: int = 0, least: float = 0.0) -> np.ndarray:
        """bool [N]: which rows of ordinary keys `sweep` would free."""
        rows_N, out = np.ascontiguousarray(rows_N, np.int32), np.empty(len(rows_N), np.uint8)
        self._kernel.table_expires(self._table, address(rows_N), len(rows_N), max(0, oldest), least, address(out))
        return out.astype(bool)

    def sweep(self, oldest: int = 0, least: float = 0.0, decay: float = 1.0) -> int:
        """Evicts keys last seen before `oldest` or counted less than `least`, then decays the counts; rows freed."""
        return int(self._kernel.table_sweep(self._table, max(0, oldest), least, decay, ALWAYS_BELOW))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def entries(self, since: int = 0) -> Entries:
        """All that was last seen at `since` or later, in the order of rows; always the rows of the missing and the
        unseen value."""
        count = self._kernel.table_entries(self._table, since, None, None, None, None)
        keys, rows = np.empty(count, np.int64), np.empty(count, np.int32)
        counts, seen = np.empty(count, np.float32), np.empty(count, np.uint32)
        self._kernel.table_entries(self._table, since, address(keys), address(rows), address(counts), address(seen))
        return Entries(keys, rows, self.gather(rows), self.states_of(rows), counts, seen)

    def states_of(self, rows_N: np.ndarray) -> np.ndarray:
        """float32 [N, S] optimizer states of rows."""
        states = np.zeros((len(rows_N), self.states), np.float32)
        self._kernel.table_states(self._table, address(rows_N), len(rows_N), address(states))
        return states

    def put(self, entries: Entries, keep_rows: bool = False) -> None:
        """Adds entries, or replaces those with the same keys.

        Args:
            entries: without states (an array of width 0) rows get start states.
            keep_rows: keep their row numbers (into an empty table), so that it goes on exactly as the one it came from.
        """
        arrays = [np.ascontiguousarray(getattr(entries, name), kind) for name, kind in
                  zip(Entries.NAMES, (np.int64, np.int32, np.float32, np.float32, np.float32, np.uint32), strict=True)]
        keys, rows, values, states, counts, seen = arrays
        if values.shape != (len(keys), self.width):
            raise UserError("the rows of the checkpoint have another width", where="tables", value=list(values.shape),
                            hint=f"this table's rows have {self.width} numbers")
        own = states if states.shape[1] == self.states and self.states else None
        self._check(self._kernel.table_put(self._table, address(keys), address(rows), address(values), address(own),
                                           address(counts), address(seen), len(keys), int(keep_rows)))
        if keep_rows:
            self._check(self._kernel.table_close_gaps(self._table))

    def _check(self, code: int) -> None:
        if code == _FULL:
            raise UserError("the table is full", where="tables", value=self.most, hint="raise the feature's rows")
        if code == _NO_MEMORY:
            raise UserError("there is no memory or no disk space for more rows of a table", where="data.tables")
        if code == _BAD_ROW:
            raise UserError("the checkpoint's table is damaged: a row number is taken twice or out of range",
                            where="tables")
