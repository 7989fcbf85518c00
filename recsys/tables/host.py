"""All tables of a ranker on the host: the rows of a step are fetched, put into the network's window, and moved by the
gradients that come back.

Over several processes each holds the rows of the keys that `owners` gives it. Ids go to their owners and rows come back
by AlltoAll; gradients go the same way and are added at the owner, so no row is held twice. Processes with the same
samples (those of the op axis) hold rows like all others.

Shapes: B samples, M id columns, N keys of a call, W width.
"""

from __future__ import annotations

import copy
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.common.errors import UserError
from parallel.training.companions import Companion
from recsys.data.features import FIRST_KNOWN, FeatureSpec
from recsys.tables.columns import KeyColumns, TablePlan, plans, window_spec
from recsys.tables.dynamic import DynamicTable
from recsys.tables.exchange import Alone, Exchange
from recsys.tables.files import read_entries, read_tables, stage_tables, table_files, take_staged
from recsys.tables.keys import MISSING_KEY, UNSEEN_KEY, owners
from recsys.tables.native import add_rows, unique
from recsys.tables.optimizer import TableOptimizer

if TYPE_CHECKING:
    from mindspore import Tensor

    from recsys.settings import Run
    from recsys.tables.hot import HotTables

_SPECIAL = np.array([MISSING_KEY, UNSEEN_KEY], np.int64)


@dataclass
class _Asked:
    """What a step asked of one table: distinct keys (the two special ones first), their rows in the window (-1 for
    those without a row), which of them the step touches, and their rows where no other process holds them."""

    keys: np.ndarray
    slots: np.ndarray
    touched: np.ndarray
    rows: np.ndarray


class HostTables(Companion):
    """Tables by feature.

    Args:
        settings: the run (`model.embedding_std`, `data.tables`, `train`).
        spec: columns of the features in the log.
        batch: samples of a step on this process.
        exchange: of the processes.
        copy: (which, of how many) processes with the same samples this is (those of the op axis). The first counts the
            ids, each sends its share of the gradients.
    """

    name = "tables"

    def __init__(self, settings: Run, spec: FeatureSpec, batch: int, exchange: Exchange | None = None,
                 copy: tuple[int, int] = (0, 1)) -> None:
        own = settings.data.tables
        self.settings, self.spec, self.exchange, self.copy = own, spec, exchange or Alone(), copy
        self.optimizer = TableOptimizer(settings.train)
        self.columns, self.plans = KeyColumns(spec), plans(spec)
        hot = own.hot_rows or 0
        self.window = window_spec(spec, batch, own.window, hot)
        self.widths = list(spec.tables)
        self.windows = [np.zeros((rows - hot, width), np.float32) for width, rows in self.window.tables.items()]
        self.hot: HotTables | None = None
        self.start = settings.train.seed, settings.model.embedding_std
        self.tables: dict[str, DynamicTable] = {}
        self.empty()
        self.steps = self.updates = 0
        self.clock = time.time
        self.time: float | None = None
        self._asked: dict[str, _Asked] = {}
        self._exchanged = None

    def empty(self) -> None:
        """All tables as at the start of a run."""
        if self.hot is not None:
            self.hot.forget()
        self.tables.clear()  # first, since the new ones' files have the same names
        self.tables.update({name: self._table(name, plan) for name, plan in self.plans.items()})

    def _table(self, name: str, plan: TablePlan) -> DynamicTable:
        feature, rank, ranks = plan.slot.feature, self.exchange.rank, self.exchange.ranks
        folder = self.settings.folder and Path(self.settings.folder) / f"rank_{rank}" / name
        seed = (self.start[0] << 32) | zlib.crc32(name.encode())
        table = DynamicTable(
            plan.slot.width, self.optimizer.name, seed, self.start[1], self.optimizer.state_start,
            0 if feature.is_dynamic or ranks > 1 else plan.slot.rows,
            (feature.rows or 0) + FIRST_KNOWN if feature.is_dynamic and feature.rows else 0,
            feature.minimum_count if feature.is_dynamic else 1, feature.admission_share, folder)
        mine = _SPECIAL[owners(_SPECIAL, ranks) == rank]
        table.meet(mine, np.zeros(len(mine), np.float32), 1)
        return table

    # -- a step -------------------------------------------------------------------------------------------------------

    def fetch(self, keys_BM: np.ndarray, train: bool = False, columns: np.ndarray | None = None) -> np.ndarray:
        """Fills `windows` with the rows of a batch; returns the ids of the network, int32 [B, M].

        Args:
            keys_BM: `KeyColumns.keys` of the batch.
            train: counts the ids and admits new ones; otherwise nothing changes and unknown ids have the row for unseen
                ones.
            columns: numbers of the columns that `keys_BM` has; None = all.

        Raises:
            UserError: the step names more rows than the window has.
        """
        if train:
            self.time = self.clock()
        chosen = {name: self._own(plan, columns) for name, plan in self.plans.items()}
        asked, which = {}, {}
        for name, own in chosen.items():
            if len(own):
                keys, which[name], times = self._distinct(keys_BM, own)
                asked[name] = keys, times
        known = self._rows_of(asked, train)
        ids_BM = np.empty(keys_BM.shape, np.int32)
        free = [FIRST_KNOWN * sum(plan.width == index for plan in self.plans.values())
                for index in range(len(self.widths))]
        self._asked = {}
        for name, (keys, times) in asked.items():
            plan = self.plans[name]
            hot = self.hot.slots(name, known[name][1], times, train) if self.hot is not None else None
            slots, free[plan.width] = self._window_rows(plan, known[name][0], free[plan.width], hot)
            self._fill(name, known[name], slots)
            self._asked[name] = _Asked(keys, slots, self._touched(slots, times), known[name][1])
            # An id without a row has the row of the unseen value.
            slots = np.where(slots < 0, plan.first + 1, slots)
            ids_BM[:, chosen[name]] = slots[which[name]].reshape(len(keys_BM), -1)
        return ids_BM

    @staticmethod
    def _own(plan: TablePlan, columns: np.ndarray | None) -> np.ndarray:
        return plan.columns if columns is None else np.flatnonzero(np.isin(columns, plan.columns))

    @staticmethod
    def _distinct(keys_BM: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(distinct keys, which each is, times) of some columns, the two special keys always there and first."""
        flat = keys_BM[:, own].reshape(-1) if len(own) > 1 else keys_BM[:, own[0]]
        keys, which, times = unique(np.concatenate([_SPECIAL, flat]))
        times[:FIRST_KNOWN] -= 1.0
        return keys, which[FIRST_KNOWN:], times

    def _window_rows(self, plan: TablePlan, known: np.ndarray, free: int,
                     hot: np.ndarray | None) -> tuple[np.ndarray, int]:
        """Row of each distinct key in the window (-1: it has no row), and the next free one; `hot` has those of keys
        that are there already."""
        slots = np.full(len(known), -1, np.int32) if hot is None else hot
        slots[:FIRST_KNOWN] = plan.first + np.arange(FIRST_KNOWN)
        found = np.flatnonzero(known[FIRST_KNOWN:] & (slots[FIRST_KNOWN:] < 0)) + FIRST_KNOWN
        slots[found] = np.arange(free, free + len(found))
        free += len(found)
        if free > len(self.windows[plan.width]):
            raise UserError(f"a step names more than {len(self.windows[plan.width])} rows of width "
                            f"{self.widths[plan.width]}", where="data.tables.window", value=self.settings.window,
                            hint="raise it, or make train.global_batch_size smaller")
        return slots, free

    @staticmethod
    def _touched(slots: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Which keys with a row the step uses; the unseen value's is used for ids without one, too."""
        touched = (slots >= 0) & (times > 0)
        touched[1] |= bool((slots < 0).any())
        return touched

    def _rows_of(self, asked: dict[str, tuple], train: bool) -> dict[str, tuple]:
        """(known bool [N], rows int32 [N] or values float32 [N, W]) of each table's distinct keys."""
        now = self.steps + 1
        if self.exchange.ranks > 1:
            return self._exchanged_rows(asked, train, now)
        found = {}
        for name, (keys, times) in asked.items():
            rows = self.tables[name].meet(keys, times, self._now(name, now)) if train else self.tables[name].find(keys)
            found[name] = rows >= 0, rows
        return found

    @property
    def seconds(self) -> float:
        """The time of the last training step: what comes after it, a sweep or a version, may not depend on whether the
        next batch of a stream is there already."""
        return self.time if self.time is not None else self.clock()

    def _now(self, name: str, step: int) -> int:
        seconds = self.plans[name].slot.feature.expire_unit == "seconds"
        return int(self.seconds) if seconds else step

    def _fill(self, name: str, known: tuple, slots: np.ndarray) -> None:
        window = self.windows[self.plans[name].width]
        if self.exchange.ranks > 1:
            window[slots[known[0]]] = known[1][known[0]]
        else:
            rows = known[1] if self.hot is None else np.where(slots < len(window), known[1], -1)
            self.tables[name].gather(rows, window, slots)

    def update(self, gradients: list[np.ndarray] | list[Tensor]) -> None:
        """Moves the rows of the last `fetch` by the window's gradients, one [rows, W] for each width: sums over this
        process's samples of the gradient of the mean loss. With hot rows they are tensors of the device."""
        rule = self.optimizer.rule(self.updates)
        if self.hot is not None:
            gradients = self.hot.update(gradients, [np.concatenate(
                [np.zeros(0, np.int32), *(asked.slots[asked.touched] for name, asked in self._asked.items()
                                          if self.plans[name].width == width)]) for width in range(len(self.widths))],
                rule)
        if self.exchange.ranks > 1:
            self._exchanged_update(gradients, rule)
        else:
            for name, asked in self._asked.items():
                mine = asked.touched & (asked.slots < len(self.windows[self.plans[name].width]))
                rows = np.where(mine, asked.rows, -1)
                self.tables[name].update(rows, gradients[self.plans[name].width], rule, asked.slots)
        self.updates += 1

    def end_step(self) -> None:
        """Counts the step, and sweeps where one is due."""
        self.steps += 1
        if self.hot is not None:
            self.hot.end_step()
        if self.settings.sweep_every and self.steps % self.settings.sweep_every == 0:
            self.sweep()

    def sweep(self) -> int:
        """Evicts what has expired by each feature's rules; rows freed on this process."""
        self.settle()
        freed = 0
        for name, plan in self.plans.items():
            feature = plan.slot.feature
            if feature.is_dynamic:
                oldest = self._now(name, self.steps + 1) - feature.expire_after if feature.expire_after else 0
                if self.hot is not None:
                    self.hot.before_sweep(name, oldest, feature.expire_below)
                freed += self.tables[name].sweep(oldest, feature.expire_below, feature.count_decay)
        return freed

    def settle(self) -> None:
        """Brings the tables up to date with the rows that are on the device."""
        if self.hot is not None:
            self.hot.write_back()

    # -- several processes --------------------------------------------------------------------------------------------

    def _exchanged_rows(self, asked: dict[str, tuple], train: bool, now: int) -> dict[str, tuple]:
        ranks = self.exchange.ranks
        homes = {name: owners(keys, ranks) for name, (keys, _) in asked.items()}
        sent = {name: [np.flatnonzero(homes[name] == other) for other in range(ranks)] for name in asked}
        counts = np.float32(self.copy[0] == 0)
        received = self.exchange.all_to_all([_pack(
            [array[sent[name][other]] for name, (keys, times) in asked.items() for array in (keys, times * counts)])
            for other in range(ranks)])
        received = [_unpack(message, [np.int64, np.float32] * len(asked)) for message in received]
        replies: list[list[np.ndarray]] = [[] for _ in range(ranks)]
        self._exchanged = {}
        for number, name in enumerate(asked):
            keys = [message[2 * number] for message in received]
            times = np.concatenate([message[2 * number + 1] for message in received])
            distinct, which, _ = unique(np.concatenate(keys))
            table = self.tables[name]
            rows = (table.meet(distinct, np.bincount(which, times, len(distinct)), self._now(name, now)) if train
                    else table.find(distinct))
            values = table.gather(rows)
            pieces = np.split(which, np.cumsum([len(part) for part in keys])[:-1])
            for other, piece in enumerate(pieces):
                replies[other] += [(rows[piece] >= 0).astype(np.uint8), values[piece]]
            self._exchanged[name] = (rows, pieces, sent[name])
        back = self.exchange.all_to_all([_pack(reply) for reply in replies])
        back = [_unpack(message, [np.uint8, np.float32] * len(asked)) for message in back]
        found = {}
        for number, (name, (keys, _)) in enumerate(asked.items()):
            known = np.zeros(len(keys), bool)
            values = np.zeros((len(keys), self.tables[name].width), np.float32)
            for other in range(ranks):
                known[sent[name][other]] = back[other][2 * number] > 0
                values[sent[name][other]] = back[other][2 * number + 1].reshape(-1, values.shape[1])
            found[name] = known, values
        return found

    def _exchanged_update(self, gradients: list[np.ndarray], rule: Any) -> None:
        ranks = self.exchange.ranks
        messages: list[list[np.ndarray]] = [[] for _ in range(ranks)]
        for name, asked in self._asked.items():
            gradient = gradients[self.plans[name].width]
            for other in range(ranks):
                sent = self._exchanged[name][2][other]
                touched = asked.touched[sent] & (np.arange(len(sent)) % self.copy[1] == self.copy[0])
                messages[other] += [touched.astype(np.uint8), gradient[asked.slots[sent[touched]]]]
        received = self.exchange.all_to_all([_pack(message) for message in messages])
        received = [_unpack(message, [np.uint8, np.float32] * len(self._asked)) for message in received]
        for number, name in enumerate(self._asked):
            rows, pieces, _ = self._exchanged[name]
            used = np.concatenate([piece[message[2 * number] > 0]
                                   for piece, message in zip(pieces, received, strict=True)])
            total = add_rows(np.concatenate([message[2 * number + 1] for message in received]).reshape(
                -1, self.tables[name].width), used, len(rows))
            touched = np.zeros(len(rows), bool)
            touched[used] = True
            self.tables[name].update(np.where(touched, rows, -1), total, rule)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def before_checkpoint(self, directory: Path, step: int) -> None:
        """Writes this process's rows beside the checkpoint."""
        self.settle()
        stage_tables(self.tables, directory, self.exchange.rank, self.exchange.ranks)
        self.exchange.all_to_all([b""] * self.exchange.ranks)
        self._staged = directory

    def add_files(self, folder: Path) -> None:
        """Moves what all processes wrote into the checkpoint."""
        take_staged(self._staged, folder)

    def check_files(self, folder: Path, part: int, parts: int) -> None:
        """Compares the tables of a checkpoint with their checksums.

        Raises:
            UserError: one is missing or damaged.
        """
        files = [file for own in table_files(folder).values() for file in own]
        for file in files[part::parts]:
            read_entries(file)

    def restore_files(self, folder: Path) -> None:
        """Takes the rows of a checkpoint whose keys are this process's.

        Raises:
            UserError: the checkpoint has no tables, or they are damaged.
        """
        self.empty()
        read_tables(self.tables, folder, self.exchange.rank, self.exchange.ranks)

    def reread(self, folder: Path) -> HostTables:
        """The same with the rows of another checkpoint; this one is left as it is.

        Raises:
            UserError: see `restore_files`.
        """
        other = copy.copy(self)
        other.tables, other.hot = {}, None
        other.restore_files(folder)
        return other

    def state(self, step: int) -> dict[str, Any]:
        """Counters."""
        return {"steps": self.steps, "updates": self.updates}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes `state`."""
        self.steps, self.updates = int(state["steps"]), int(state["updates"])

    def figures(self) -> dict[str, float]:
        """Rows, ids that wait for admission and bytes on this process; how many of the rows asked for were hot."""
        tables, hot = self.tables.values(), self.hot.figures() if self.hot is not None else {}
        return {**hot, "table_rows": sum(map(len, tables)), "table_waiting": sum(table.waiting for table in tables),
                "table_bytes": sum(table.bytes for table in tables)}


def _pack(arrays: list[np.ndarray]) -> bytes:
    """Arrays one after the other, each with its number of bytes."""
    return b"".join(len(raw).to_bytes(8, "little") + raw for raw in (array.tobytes() for array in arrays))


def _unpack(message: bytes, types: list[type]) -> list[np.ndarray]:
    arrays, at = [], 0
    for kind in types:
        size = int.from_bytes(message[at:at + 8], "little")
        arrays.append(np.frombuffer(message[at + 8:at + 8 + size], kind))
        at += 8 + size
    return arrays
