"""Rows that stay on the device are those of the tables to the bit, whatever a sweep frees meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from recsys.data.features import Feature, assign_columns, expand
from recsys.tables.host import HostTables
from tests.recsys.tables.test_host import settings_of

ROWS, IDS = 48, 120


def features() -> list[Feature]:
    """Ids that expire by age, by frequency with counts that decay, and not at all; two widths."""
    return expand([Feature(name="user", side="user", values="dynamic", minimum_count=2, expire_after=3),
                   Feature(name="item", side="item", values="dynamic", expire_below=3.0, count_decay=0.6),
                   Feature(name="past", side="user", type="sequence", length=3, target="item", width=None),
                   Feature(name="city", side="user", values="dynamic", width=6, rows=40, expire_after=2),
                   Feature(name="kind", side="item", values="integer", rows=30, width=6)])


def tables_of(rule: str, **more) -> HostTables:
    settings = settings_of(sweep_every=3, **more)
    settings.train.sparse_optimizer = settings.train.sparse_optimizer.model_copy(update={"name": rule})
    tables = HostTables(settings, assign_columns(features(), 16), ROWS)
    if more:
        from mindspore import Parameter, Tensor

        from recsys.tables.hot import HotTables

        windows = [Parameter(Tensor(np.zeros((rows, width), np.float32)), name=f"window{width}")
                   for width, rows in tables.window.tables.items()]
        tables.hot = HotTables(tables.settings, rule, tables.plans, tables.tables, windows)
    return tables


def ids_of(spec, step: int) -> np.ndarray:
    """Zipf-distributed ids; which of them are the frequent ones changes slowly."""
    generator = np.random.default_rng(step)
    ids = np.zeros((ROWS, spec.id_columns), np.int64)
    for slot in spec.slots.values():
        own = (generator.zipf(1.4, (ROWS, slot.length)) + 2 * step) % IDS
        ids[:, slot.start:slot.start + slot.length] = own if slot.feature.is_dynamic else own % 28 + slot.offset + 2
    return ids


def rows_of(tables: HostTables, ids_BM: np.ndarray, train: bool) -> list[np.ndarray]:
    """What the network reads for a batch."""
    found = tables.fetch(tables.columns.keys(ids_BM), train=train)
    if tables.hot is not None:
        tables.hot.put(tables.windows)
        windows = [own.window.asnumpy() for own in tables.hot.widths]
    else:
        windows = tables.windows
    return [windows[plan.width][found[:, plan.columns]].copy() for plan in tables.plans.values()]


def move(tables: HostTables, step: int) -> None:
    """A made-up gradient of every key, whatever its place in the window."""
    sizes = [np.zeros((rows, width), np.float32) for width, rows in tables.window.tables.items()]
    for number, (name, asked) in enumerate(tables._asked.items()):
        plan = tables.plans[name]
        own = np.random.default_rng((step, number)).standard_normal((IDS + 2, plan.slot.width)).astype(np.float32)
        there = asked.slots >= 0
        sizes[plan.width][asked.slots[there]] = own[np.maximum(asked.keys[there], -2)]
    if tables.hot is not None:
        from mindspore import Tensor

        sizes = [Tensor(size) for size in sizes]
    tables.update(sizes)


@pytest.mark.parametrize("rule", ["rowwise_adagrad", *(pytest.param(rule, marks=pytest.mark.slow)
                                                                    for rule in ("lazy_adam", "adagrad", "sgd"))])
@pytest.mark.parametrize("every", [5, 100])
def test_rows_stay_hot_through_sweeps_and_change_no_bit(graph_mode, rule, every):
    """With other rows chosen every fifth step, and after steps 1, 4 and 16 alone."""
    plain, hot = tables_of(rule), tables_of(rule, hot_rows=24, hot_every=every)
    stayed, left, freed = 0, 0, 0
    for step in range(30):
        for train in (False, True):
            ids = ids_of(plain.spec, step + (not train))
            for one, other in zip(rows_of(plain, ids, train), rows_of(hot, ids, train), strict=True):
                np.testing.assert_array_equal(other, one)
        move(plain, step)
        move(hot, step)
        before = {name: len(table) for name, table in plain.tables.items()}
        kept = [own.keys for own in hot.hot.widths]
        plain.end_step()
        hot.end_step()
        if (step + 1) % 3 == 0:
            freed += sum(before.values()) - sum(map(len, plain.tables.values()))
            after = np.concatenate([own.keys for own in hot.hot.widths])
            stayed, left = stayed + len(after), left + len(np.setdiff1d(np.concatenate(kept), after))
        if step % 7 == 0:
            hot.settle()
            same_tables(plain, hot)
    hot.settle()
    same_tables(plain, hot)
    assert stayed > 100 and left > 10 and freed > 50, (stayed, left, freed)


def same_tables(plain: HostTables, hot: HostTables) -> None:
    for name, table in plain.tables.items():
        one, other = table.entries(), hot.tables[name].entries()
        for part in one.NAMES:
            np.testing.assert_array_equal(getattr(other, part), getattr(one, part), err_msg=f"{name} {part}")
