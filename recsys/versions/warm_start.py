"""A ranker with other features from an old checkpoint: parameters by name, rows of tables by value, columns of the
first matrices by feature. What a new feature feeds starts at 0 there, so where features are only added (to groups that
were there) the new model predicts at first what the old one did."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from parallel.checkpoint.full import Checkpoint
from parallel.common.progress import table
from parallel.training.backend import SlicedBackend
from recsys.data.features import FIRST_KNOWN, FeatureSpec, Slot
from recsys.data.vocabulary import Vocabulary
from recsys.saved_model import Trained, describe
from recsys.tables.names import is_accumulator, is_sparse

_TABLE = re.compile(r"\.tables\.(\d+)\.table$")
_GROUP = re.compile(r"(?:^|\.)tokenize\.networks\.(\d+)\.linears\.0\.weight$")
_ALL_GROUPS = re.compile(r"(?:^|\.)tokenize\.global_network\.linears\.0\.weight$")
_NUMBERS = re.compile(r"\.numbers\.(weight|bias)$")


def warm_start(network: Any, spec: FeatureSpec, vocabulary: Vocabulary, path: str | Path,
               tables: Any = None) -> dict[str, int]:
    """Fills a network (which has its start values) from a checkpoint of other features; prints what was kept.

    Args:
        network: the new one.
        spec, vocabulary: of the new run.
        path: the old checkpoint, or its run's folder.
        tables: `recsys.tables.host.HostTables` of the new run, where its tables are on the host.

    Returns: how many parameters (and tables of features) were kept, kept in part, and started anew.

    Raises:
        UserError: there is no such checkpoint.
    """
    from mindspore import Tensor

    move = _Move(describe(path), spec, vocabulary)
    rows = []
    for parameter in network.get_parameters():
        if tables is not None and is_sparse(parameter.name):
            continue
        value, what = move.parameter(parameter.name, parameter.asnumpy())
        rows.append((parameter.name, what))
        if value is not None:
            parameter.set_data(Tensor(np.ascontiguousarray(value), parameter.dtype))
    if tables is not None:
        rows += move.host_tables(tables)
    return move.told(rows, {parameter.name for parameter in network.get_parameters()})


def warm_start_slices(backend: SlicedBackend, spec: FeatureSpec, vocabulary: Vocabulary,
                      path: str | Path, tables: Any = None) -> dict[str, int]:
    """`warm_start` of a process that holds slices (or everything, on a backend of another framework): each parameter
    is moved whole, one at a time, and this process's slice of it taken. Process 0 prints.

    Args:
        backend: at its start values, which it can tell whole.
        spec, vocabulary, path, tables: see `warm_start`.
    """
    move, rows, holder = _Move(describe(path, stored=True), spec, vocabulary), [], backend.holder
    for tensor in backend.parameters():
        value, what = move.parameter(tensor.name, backend.full_start(tensor.name))
        rows.append((tensor.name, what))
        if value is not None:
            places = tuple(slice(*pair) for pair in holder.extents[tensor.name]) if holder is not None else ()
            tensor.assign(np.ascontiguousarray(value[places]))
    if tables is not None:
        rows += move.host_tables(tables)
    names = {tensor.name for tensor in backend.parameters()} | set(holder.shapes if holder is not None else ())
    return move.told(rows, names, shown=backend.rank == 0)


def _is_state(name: str) -> bool:
    return name.startswith(("adam_", "adagrad_", "rmsprop_", "lamb_")) or is_accumulator(name)


class _Move:
    """From one model's columns to another's."""

    def __init__(self, old: Trained, spec: FeatureSpec, vocabulary: Vocabulary) -> None:
        self.old, self.spec, self.vocabulary = old, spec, vocabulary
        self.file = Checkpoint(old.path)
        self.same_input = group_columns(old.spec) == group_columns(spec)

    def told(self, rows: list[tuple[str, str]], names: set[str], shown: bool = True) -> dict[str, int]:
        """Prints what became of everything, and counts it.

        Args:
            rows: (parameter or table, what became of it).
            names: of all parameters of the new model.
            shown: whether it is printed.
        """
        names = {name for name, _ in rows} | names
        rows = rows + [(name, "dropped") for name in self.file.layout if name not in names and not _is_state(name)]
        rows += [(f"feature {name}", "dropped") for name in self.old.spec.slots if name not in self.spec.slots]
        if shown:
            table(f"Started from {self.old.path}", ["parameter", "what became of it"], rows)
        counts = {"kept": 0, "in_part": 0, "anew": 0, "dropped": 0}
        for _, what in rows:
            counts[what if what in ("kept", "dropped") else "anew" if what.startswith("anew") else "in_part"] += 1
        return counts

    def parameter(self, name: str, start: np.ndarray) -> tuple[np.ndarray | None, str]:
        """(value, what became of it) of one parameter whose start value is given."""
        if found := _TABLE.search(name):
            return self._table(name, int(found[1]), start)
        if _is_state(name):
            return None, "anew (a state of the optimizer)"
        if name not in self.file.layout:
            return None, "anew (not in the checkpoint)"
        value = self.file.read(name)
        if _NUMBERS.search(name):
            return self._numbers(value, start)
        if not self.same_input:
            groups, old_groups = group_columns(self.spec), group_columns(self.old.spec)
            if found := _GROUP.search(name):
                group = list(groups)[int(found[1])]
                if group not in old_groups:
                    return None, f"anew (group {group})"
                # The old network of the group may have had another number.
                other = name.replace(f"networks.{found[1]}.", f"networks.{list(old_groups).index(group)}.")
                return self._columns(self.file.read(other), start, old_groups[group], groups[group])
            whole, old_whole = ([column for own in each.values() for column in own] for each in (groups, old_groups))
            first = start.ndim == 2 and (value.shape[1], start.shape[1]) == (width_of(old_whole), width_of(whole))
            if _ALL_GROUPS.search(name) or first:
                return self._columns(value, start, old_whole, whole)
            if ".tokenize." in f".{name}" and not name.endswith(".bias"):
                return None, "anew (it reads the features in other columns)"
        if value.shape != start.shape:
            return None, f"anew (shape {list(value.shape)}, now {list(start.shape)})"
        return value, "kept"

    @staticmethod
    def _columns(value: np.ndarray, start: np.ndarray, old: list, new: list) -> tuple[np.ndarray | None, str]:
        """Columns of dim 1 by feature; those of new features are 0."""
        if value.ndim != 2 or value.shape[0] != start.shape[0] or value.shape[1] != width_of(old):
            return None, f"anew (shape {list(value.shape)}, now {list(start.shape)})"
        places, at = {}, 0
        for name, width in old:
            places[name, width] = at
            at += width
        moved, at, kept = np.zeros_like(start), 0, 0
        for name, width in new:
            if (name, width) in places:
                begin = places[name, width]
                moved[:, at:at + width] = value[:, begin:begin + width]
                kept += 1
            at += width
        return moved, "kept" if kept == len(new) == len(old) else f"columns of {kept} of {len(new)} features"

    def _numbers(self, value: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, str]:
        kept = 0
        for name, slot in self.spec.numeric.items():
            before = self.old.spec.numeric.get(name)
            if before is not None and before.width == slot.width:
                start[slot.column] = value[before.column]
                kept += 1
        return start, "kept" if kept == len(start) == len(value) else f"rows of {kept} of {len(start)} features"

    def _table(self, name: str, index: int, start: np.ndarray) -> tuple[np.ndarray | None, str]:
        width = list(self.spec.tables)[index]
        if width not in self.old.spec.tables:
            return None, "anew (no table of this width)"
        other = name.replace(f".tables.{index}.", f".tables.{list(self.old.spec.tables).index(width)}.")
        if other not in self.file.layout:
            return None, "anew (not in the checkpoint)"
        value, total, kept, parts = self.file.read(other), 0, 0, []
        for feature, slot in self.spec.slots.items():
            if slot.width != width or slot.feature.target is not None:
                continue
            to, source, why = self.rows(feature, slot)
            if len(to):
                start[slot.offset + to] = value[self.old.spec.slots[feature].offset + source]
            total, kept = total + slot.rows, kept + len(to)
            if why:
                parts.append(f"{feature}: {why}")
        if kept == total and start.shape == value.shape and self.old.spec.slots == self.spec.slots:
            return value, "kept"
        return start, f"{kept:,} of {total:,} rows" + (f" ({'; '.join(parts)})" if parts else "")

    def rows(self, name: str, slot: Slot) -> tuple[np.ndarray, np.ndarray, str]:
        """(rows within the feature now, rows then, why not all) that hold the same value."""
        none, before = np.zeros(0, np.int64), self.old.spec.slots.get(name)
        if before is None:
            return none, none, "new"
        now, then = slot.feature, before.feature
        if (now.type, now.values, slot.width) != (then.type, then.values, before.width):
            return none, none, "read in another way"
        first = np.arange(FIRST_KNOWN)
        if now.type == "numeric":
            edges = self.vocabulary.boundaries.get(name, now.boundaries)
            if edges != self.old.vocabulary.boundaries.get(name, then.boundaries):
                return first, first, "other boundaries"
        elif now.values == "hash" and slot.rows != before.rows:
            return first, first, "another number of buckets"
        elif now.values == "vocabulary":
            known = {value: row for row, value in enumerate(self.old.vocabulary.values[name])}
            pairs = [(row, known[value]) for row, value in enumerate(self.vocabulary.values[name]) if value in known]
            to, source = (np.array(part, np.int64) + FIRST_KNOWN for part in zip(*pairs, strict=True)) if pairs else (
                none, none)
            return np.concatenate([first, to]), np.concatenate([first, source]), ""
        count = np.arange(min(slot.rows, before.rows))
        return count, count, ""

    def host_tables(self, tables: Any) -> list[tuple[str, str]]:
        """Rows of features by key, on each process those of its keys; the old run's may be on the host or in the
        graph."""
        from recsys.tables.dynamic import Entries
        from recsys.tables.files import FOLDER, read_entries, table_files
        from recsys.tables.keys import owners

        found = []
        files = table_files(self.old.path) if (self.old.path / FOLDER).is_dir() else {}
        for name, plan in tables.plans.items():
            own = tables.tables[name]
            before = self.old.spec.slots.get(name)
            if before is None or name not in files:
                found.append((f"table {name}", "anew" if before is None else "anew (not on the host before)"))
                continue
            if before.feature.values != plan.slot.feature.values or before.width != plan.slot.width:
                found.append((f"table {name}", "anew (read in another way)"))
                continue
            entries = [read_entries(path) for path in files[name]]
            whole = Entries(*(np.concatenate([getattr(part, key) for part in entries]) for key in Entries.NAMES))
            total = len(whole)
            if not plan.slot.feature.is_dynamic:
                to, source, _ = self.rows(name, plan.slot)
                moved = dict(zip((source - FIRST_KNOWN).tolist(), (to - FIRST_KNOWN).tolist(), strict=True))
                chosen = np.array([key < 0 or key in moved for key in whole.keys.tolist()], bool)
                whole = whole.take(chosen)
                whole.keys = np.array([key if key < 0 else moved[key] for key in whole.keys.tolist()], np.int64)
            found.append((f"table {name}", "kept" if len(whole) == total else f"{len(whole):,} of {total:,} rows"))
            rank, ranks = tables.exchange.rank, tables.exchange.ranks
            own.put(whole if ranks == 1 else whole.take(owners(whole.keys, ranks) == rank))
        return found


def group_columns(spec: FeatureSpec) -> dict[str, list[tuple[str, int]]]:
    """For each group that makes a vector the features in it and their widths, in order."""
    found = {name: [(f.name, spec.width(f.name)) for f in features if not (f.is_list and f.pooling == "none")]
             for name, features in spec.groups.items()}
    return {name: columns for name, columns in found.items() if columns}


def width_of(columns: list[tuple[str, int]]) -> int:
    """Width of a vector of such columns."""
    return sum(width for _, width in columns)
