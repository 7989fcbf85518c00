"""From encoded ids to the keys of tables, and the network's own small numbering of the rows of one step.

The network of a run with tables on the host is built for a *window*: a table of a fixed number of rows for each width,
which holds the rows of one step. Its first rows belong to the missing and the unseen value of every feature, the
others to the ids of the step in the order in which they are met. Needs no MindSpore.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from recsys.data.features import FIRST_KNOWN, ROW_MULTIPLE, FeatureSpec, Slot
from recsys.tables.keys import MISSING_KEY, UNSEEN_KEY


@dataclass(frozen=True)
class TablePlan:
    """One feature's table (and that of the sequences which share it).

    Args:
        slot: of the feature.
        columns: of the ids.
        width: number of its width among those of the spec.
        first: its first row in the window of that width.
    """

    slot: Slot
    columns: np.ndarray
    width: int
    first: int


class KeyColumns:
    """Keys of encoded ids.

    Args:
        spec: columns of the features in the log.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        self.offsets = np.zeros(spec.id_columns, np.int64)
        self.rows = np.ones(spec.id_columns, bool)
        for slot in spec.slots.values():
            columns = slice(slot.start, slot.start + slot.length)
            self.offsets[columns], self.rows[columns] = slot.offset, not slot.feature.is_dynamic
        self.all_rows = bool(self.rows.all())

    def keys(self, ids_BM: np.ndarray, columns: np.ndarray | slice = slice(None)) -> np.ndarray:
        """int64 keys [B, M]: of a known value its number in the feature, of a dynamic feature what the ids hold.

        Args:
            ids_BM: as `Encoder` gives them.
            columns: which columns of the log they are.
        """
        keys = ids_BM.astype(np.int64)
        local = keys - self.offsets[columns] - FIRST_KNOWN
        local[local == -FIRST_KNOWN] = MISSING_KEY
        local[local == 1 - FIRST_KNOWN] = UNSEEN_KEY
        return local if self.all_rows else np.where(self.rows[columns], local, keys)


def plans(spec: FeatureSpec) -> dict[str, TablePlan]:
    """Tables by the name of their feature, in the order of the slots."""
    columns: dict[str, list[np.ndarray]] = {}
    for name, slot in spec.slots.items():
        owner = slot.feature.target or name
        columns.setdefault(owner, []).append(np.arange(slot.start, slot.start + slot.length))
    widths, count = list(spec.tables), {}
    found = {}
    for name, own in columns.items():
        slot = spec.slots[name]
        number = count.get(slot.width, 0)
        count[slot.width] = number + 1
        found[name] = TablePlan(slot, np.concatenate(own), widths.index(slot.width), FIRST_KNOWN * number)
    return found


def window_spec(spec: FeatureSpec, batch: int, most: int | None = None, hot: int = 0) -> FeatureSpec:
    """The spec of a network that sees the rows of one step.

    Args:
        spec: columns of the features in the log.
        batch: samples of a step on one process.
        most: rows of each width at most.
        hot: further rows of each width behind them.
    """
    found = plans(spec)
    slots = {name: replace(slot, offset=found[slot.feature.target or name].first, rows=FIRST_KNOWN)
             for name, slot in spec.slots.items()}
    tables = {}
    for index, width in enumerate(spec.tables):
        own = [plan for plan in found.values() if plan.width == index]
        rows = FIRST_KNOWN * len(own) + min(sum(batch * len(plan.columns) for plan in own), most or 2**31 - 1)
        tables[width] = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE + hot
    return replace(spec, slots=slots, tables=tables)
