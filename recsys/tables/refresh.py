"""`refresh` for tables on the host: old counts decay, a log's are added, ids below the least count leave, newcomers get
rows. What happens by and by in training (`Feature.expire_below`, `count_decay`), at once and without training. Needs no
MindSpore but to open a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.checkpoint.folder import resolve_checkpoint
from parallel.checkpoint.full import Checkpoint, load_checkpoint, save_checkpoint
from parallel.common.errors import UserError
from parallel.common.progress import table as show
from recsys.data.log import prepare
from recsys.data.vocabulary import VOCABULARY
from recsys.tables.dynamic import DynamicTable
from recsys.tables.host import HostTables
from recsys.tables.keys import ALWAYS_BELOW
from recsys.tables.native import unique

if TYPE_CHECKING:
    from recsys.settings import Run


def refresh_table(table: DynamicTable, keys: np.ndarray, counts: np.ndarray, *, decay: float, least: float,
                  now: int) -> tuple[int, int]:
    """Refreshes one table; (ids that left, ids that came).

    As `recsys.data.vocabulary.Vocabulary.refresh`: an id stays if its decayed count and what the log adds are at least
    `least` and, in a table with a bound, it is among the most frequent (of equal ones the smaller key). Those that stay
    keep their rows; newcomers get start values.

    Args:
        keys, counts: distinct keys of the log, without the special ones.
        now: step or second that counts as when they were seen.
    """
    held = table.entries()
    old = held.take((held.rows >= 0) & (held.keys >= ALWAYS_BELOW))
    every, index = np.unique(np.concatenate([old.keys, keys]), return_inverse=True)
    # Counts of ids that waited for admission count as well.
    waiting = held.take((held.rows < 0) & np.isin(held.keys, keys))
    merged = np.zeros(len(every))
    np.add.at(merged, index, np.concatenate([old.counts * decay, counts]))
    np.add.at(merged, np.searchsorted(every, waiting.keys), waiting.counts * decay)
    ranked = np.lexsort((every, -merged))
    ranked = ranked[merged[ranked] >= least]
    if table.most:
        ranked = ranked[:table.most - (len(table) - len(old))]
    kept = np.zeros(len(every), bool)
    kept[ranked] = True
    stays = kept[index[:len(old)]]
    # What leaves is marked by a count below the rest, and swept.
    old.counts = np.where(stays, np.maximum(merged[index[:len(old)]], 1e-30), -1.0).astype(np.float32)
    old.seen = np.where(np.isin(old.keys, keys), max(1, now), old.seen).astype(np.uint32)
    table.put(old)
    left = table.sweep(least=0.0)
    newcomers = ranked[~np.isin(every[ranked], old.keys)]
    before, table.least = table.least, 0.0
    rows = table.meet(every[newcomers], np.ones(len(newcomers), np.float32), max(1, now))
    table.least = before
    fresh = table.entries()
    mine = fresh.take(np.isin(fresh.rows, rows) & (fresh.rows >= 0))
    mine.counts = merged[np.searchsorted(every, mine.keys)].astype(np.float32)
    table.put(mine)
    return left, len(newcomers)


def refresh_run(settings: Run, run: Path, out: Path, *, decay: float, least: float | None) -> dict[str, Any]:
    """Refreshes the dynamic tables of a run's newest checkpoint by the training rows of `data`; a checkpoint in `out`.

    Raises:
        UserError: no feature is dynamic, or there is no such checkpoint.
    """
    from recsys.build import labels_of, loss_network
    from recsys.tables.step import dense_parameters

    path = resolve_checkpoint(run)
    log = prepare(settings.data, settings.model.embedding_size, run / VOCABULARY)
    tables = HostTables(settings, log.spec, 1)
    tables.restore_files(path)
    state = Checkpoint(path).state
    tables.restore(state["companions"][tables.name])
    figures = []
    for name, plan in tables.plans.items():
        feature = plan.slot.feature
        if feature.is_dynamic:
            own = np.asarray(log.parts["train"].ids[:, plan.columns]).reshape(-1)
            keys, _, counts = unique(own[own >= ALWAYS_BELOW])
            before = len(tables.tables[name])
            left, came = refresh_table(tables.tables[name], keys, counts, decay=decay, now=tables.steps + 1,
                                       least=feature.minimum_count if least is None else least)
            figures.append([name, before - 2, len(tables.tables[name]) - 2, left, came])
    if not figures:
        raise UserError("no feature has values: dynamic", where="data.features",
                        hint="tables of other features have a row for every value they can take")
    network = loss_network(settings, tables.window, len(labels_of(settings)))
    parameters = dense_parameters(network)
    load_checkpoint(path, parameters)
    tables.before_checkpoint(out / "checkpoints", tables.steps)
    saved = save_checkpoint(out / "checkpoints", int(state["step"]), parameters, (),
                            {key: value for key, value in state.items() if key not in ("format", "version", "step")},
                            add_files=tables.add_files)
    log.vocabulary.save(out / VOCABULARY)
    show("Refreshed", ["feature", "ids before", "ids now", "left", "came"], figures)
    return {"checkpoint": str(saved), "vocabulary": str(out / VOCABULARY), "reset": {row[0]: row[4] for row in figures},
            "evicted": {row[0]: row[3] for row in figures}}
