"""A dynamic table against a dictionary, whatever the operations; hostile ids; what a checkpoint keeps."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from parallel.common.errors import UserError
from recsys.tables.dynamic import UNKNOWN, DynamicTable, Entries, Rule
from recsys.tables.files import (
    read_all_entries,
    read_entries,
    stage_tables,
    table_files,
    take_staged,
    write_all_entries,
)
from recsys.tables.keys import ALWAYS_BELOW, MISSING_KEY, UNSEEN_KEY, key_of_text, keys_of, owners
from recsys.tables.native import unique


class Oracle:
    """What a table promises, in a dictionary: key -> [count, seen, values] for rows, key -> [count, seen] waiting."""

    def __init__(self, width: int, least: float, most: int) -> None:
        self.width, self.least, self.most = width, least, most
        self.rows: dict[int, list] = {}
        self.waiting: dict[int, list] = {}

    def meet(self, keys, times, now):
        known = []
        for key, count in zip(keys.tolist(), times.tolist(), strict=True):
            if key not in self.rows:
                before = self.waiting.get(key, [0.0, 0])[0]
                due = key < ALWAYS_BELOW or before + count >= self.least
                if due and (not self.most or len(self.rows) < self.most):
                    self.waiting.pop(key, None)
                    self.rows[key] = [before, 0, None]
                else:
                    self.waiting[key] = [before + count, now]
            if key in self.rows:
                self.rows[key][0] = float(np.float32(self.rows[key][0]) + np.float32(count))
                self.rows[key][1] = now
            known.append(key in self.rows)
        return known

    def sweep(self, oldest, least, decay):
        gone = [key for key, (count, seen, _) in self.rows.items()
                if key >= ALWAYS_BELOW and (seen < oldest or count < least)]
        for key in gone:
            del self.rows[key]
        for key, entry in self.rows.items():
            entry[0] = float(np.float32(entry[0] * decay)) if key >= ALWAYS_BELOW else entry[0]
        self.waiting = {key: entry for key, entry in self.waiting.items() if entry[1] >= oldest}
        return len(gone)


def compare(table: DynamicTable, oracle: Oracle) -> None:
    entries = table.entries()
    assert (len(table), table.waiting) == (len(oracle.rows), len(oracle.waiting))
    found = {key: (count, seen) for key, row, count, seen in zip(entries.keys.tolist(), entries.rows.tolist(),
             entries.counts.tolist(), entries.seen.tolist(), strict=True) if row >= 0}
    assert found == {key: (count, seen) for key, (count, seen, _) in oracle.rows.items()}
    held = entries.rows[entries.rows >= 0]
    assert len(np.unique(held)) == len(held), "two keys share a row"
    waiting = {key: (count, seen) for key, row, count, seen in zip(entries.keys.tolist(), entries.rows.tolist(),
               entries.counts.tolist(), entries.seen.tolist(), strict=True) if row < 0}
    assert waiting == {key: tuple(entry) for key, entry in oracle.waiting.items()}
    for key, values in zip(entries.keys.tolist(), entries.values, strict=True):
        if key in oracle.rows and oracle.rows[key][2] is not None:
            np.testing.assert_array_equal(values, oracle.rows[key][2])


def exercise(seed: int, operations: int, universe: int, least: float, most: int) -> None:
    """Random batches of meetings, updates, lookups, sweeps and saves, each compared with the dictionary."""
    generator = np.random.default_rng(seed)
    table, oracle = DynamicTable(3, "sgd", least=least, most=most), Oracle(3, least, most)
    extremes = np.array([MISSING_KEY, UNSEEN_KEY, -1, 0, 2**63 - 1, -(2**61), 2**62], np.int64)
    done, now = 0, 0
    while done < operations:
        now += 1
        size = int(generator.integers(1, 400))
        keys = generator.integers(-universe, universe, size)
        # Keys whose homes collide, and the ends of the range.
        keys = np.concatenate([keys, extremes[generator.integers(0, len(extremes), 2)]])
        distinct, _, times = unique(keys)
        rows = table.meet(distinct, times, now)
        assert ((rows >= 0) == oracle.meet(distinct, times, now)).all()
        values = table.gather(rows)
        for key, row, value in zip(distinct.tolist(), rows.tolist(), values, strict=True):
            if row >= 0:
                if oracle.rows[key][2] is not None:
                    np.testing.assert_array_equal(value, oracle.rows[key][2])
                oracle.rows[key][2] = value - np.float32(0.5) * np.ones(3, np.float32)
        table.update(rows, np.ones((len(rows), 3), np.float32), Rule("sgd", 0.5))
        done += len(distinct)
        if now % 7 == 0:
            asked = generator.integers(-2 * universe, 2 * universe, 200)
            assert ((table.find(asked) >= 0) == [key in oracle.rows for key in asked.tolist()]).all()
            done += 200
        if now % 31 == 0:
            rule = {"oldest": max(0, now - 20)} if now % 2 else {"least": 2.0, "decay": 0.75}
            assert table.sweep(**rule) == oracle.sweep(rule.get("oldest", 0), rule.get("least", 0.0),
                                                       rule.get("decay", 1.0))
        if now % 101 == 0:
            compare(table, oracle)
            again = DynamicTable(3, "sgd", least=least, most=most)
            again.put(table.entries(), keep_rows=True)
            table = again
    compare(table, oracle)


@pytest.mark.parametrize(("universe", "least", "most"), [(300, 1, 0), (3000, 3, 0), (800, 2, 500)])
def test_a_table_is_a_dictionary(universe, least, most):
    exercise(universe, 15_000, universe, least, most)


@pytest.mark.slow
def test_a_million_operations():
    exercise(5, 1_000_000, 20_000, 2, 0)


def test_start_values_depend_on_the_key_alone():
    keys = np.array([5, -7, 2**60, UNSEEN_KEY], np.int64)
    one, other = DynamicTable(5, std=0.1), DynamicTable(5, std=0.1)
    first = one.gather(one.meet(keys, np.ones(4, np.float32), 1))
    other.meet(np.arange(100), np.ones(100, np.float32), 1)
    second = other.gather(other.meet(keys[::-1].copy(), np.ones(4, np.float32), 9))[::-1]
    np.testing.assert_array_equal(first, second)
    many = DynamicTable(5, std=0.1)
    values = many.gather(many.meet(np.arange(20_000), np.ones(20_000, np.float32), 1))
    assert abs(values.std() - 0.1) < 1e-3 and abs(values.mean()) < 1e-3


def test_admission_by_probability_is_a_share_and_does_not_depend_on_the_order():
    keys = np.arange(10_000)
    rows = {}
    for name, order in (("rising", keys), ("falling", keys[::-1].copy())):
        table = DynamicTable(2, share=0.3)
        found = table.meet(order, np.ones(10_000, np.float32), 4)
        rows[name] = set(order[found >= 0].tolist())
    assert rows["rising"] == rows["falling"] and abs(len(rows["rising"]) - 3000) < 200


def test_reading_admits_nothing():
    table = DynamicTable(2)
    assert (table.find(np.arange(10)) == UNKNOWN).all() and len(table) == 0
    table.meet(np.arange(4), np.ones(4, np.float32), 1)
    before = table.entries()
    table.find(np.arange(10))
    assert all((getattr(before, name) == getattr(table.entries(), name)).all() for name in Entries.NAMES)


def test_a_freed_row_starts_anew():
    table = DynamicTable(2, "rowwise_adagrad")
    rows = table.meet(np.array([1, 2]), np.ones(2, np.float32), 1)
    fresh = table.gather(rows)
    table.update(rows, np.ones((2, 2), np.float32), Rule("rowwise_adagrad", 0.1))
    table.meet(np.array([2]), np.ones(1, np.float32), 9)
    assert table.sweep(oldest=5) == 1
    again = table.meet(np.array([1]), np.ones(1, np.float32), 10)
    assert again[0] == rows[0]
    np.testing.assert_array_equal(table.gather(again)[0], fresh[0])
    assert table.states_of(again) == 0.0


def test_rows_in_files_are_the_same(tmp_path):
    tables = [DynamicTable(3, "lazy_adam", folder=folder) for folder in (None, tmp_path / "table")]
    for step in range(1, 6):
        keys = np.arange(step * 50)
        for table in tables:
            rows = table.meet(keys, np.ones(len(keys), np.float32), step)
            table.update(rows, np.full((len(rows), 3), 0.1 * step, np.float32), Rule("lazy_adam", 0.1))
    one, other = (table.entries() for table in tables)
    assert all((getattr(one, name) == getattr(other, name)).all() for name in Entries.NAMES)
    assert (tmp_path / "table" / "rows.bin").stat().st_size >= 250 * 12


@pytest.mark.parametrize("rule", ["sgd", "rowwise_adagrad", "adagrad", "lazy_adam"])
def test_update_is_the_written_formula(rule):
    generator = np.random.default_rng(1)
    table = DynamicTable(4, rule, state_start=0.5)
    rows = table.meet(np.arange(3), np.ones(3, np.float32), 1)
    value, state = table.gather(rows).astype(np.float64), np.full((3, table.states), 0.5)
    for step in range(1, 5):
        g = generator.standard_normal((3, 4)).astype(np.float32)
        c1, c2 = 1 - 0.9**step, 1 - 0.99**step
        table.update(rows, g, Rule(rule, 0.1, 1e-6, 0.9, 0.99, c1, c2))
        if rule == "sgd":
            value -= 0.1 * g
        elif rule == "rowwise_adagrad":
            state += (g.astype(np.float64)**2).mean(1, keepdims=True)
            value -= 0.1 * g / (np.sqrt(state) + 1e-6)
        elif rule == "adagrad":
            state += g.astype(np.float64)**2
            value -= 0.1 * g / (np.sqrt(state) + 1e-6)
        else:
            state[:, :4] = 0.9 * state[:, :4] + 0.1 * g
            state[:, 4:] = 0.99 * state[:, 4:] + 0.01 * g.astype(np.float64)**2
            value -= 0.1 * (state[:, :4] / c1) / (np.sqrt(state[:, 4:] / c2) + 1e-6)
    np.testing.assert_allclose(table.gather(rows), value, rtol=2e-5, atol=1e-6)


def test_a_direct_table_has_rows_for_its_numbers_only():
    table, hashed = DynamicTable(2, direct_rows=12), DynamicTable(2)
    keys = np.array([3, 9, 10, -1, MISSING_KEY, UNSEEN_KEY])
    rows = table.meet(keys, np.ones(6, np.float32), 1)
    assert rows.tolist() == [5, 11, UNKNOWN, UNKNOWN, 0, 1] and len(table) == 4
    assert table.find(np.array([3, 4])).tolist() == [5, UNKNOWN]
    known = keys[rows >= 0]
    same = hashed.gather(hashed.meet(known, np.ones(4, np.float32), 1))
    np.testing.assert_array_equal(table.gather(rows[rows >= 0]), same)
    for again in (DynamicTable(2, direct_rows=20), DynamicTable(2)):
        again.put(table.entries())
        np.testing.assert_array_equal(again.gather(again.find(known)), same)


def test_hostile_ids_have_one_key_each():
    texts = ["0", "-1", "007", "-0", "+5", "5", str(2**61 - 1), str(2**61), str(2**63), str(2**64 + 5), "-" + "9" * 30,
             "x" * 10_000, "x" * 10_001, "\x00", "名", None, "1e3", " 5"]
    keys = keys_of(pa.array(texts), "user")
    present = [text for text in texts if text is not None]
    assert keys[texts.index(None)] == MISSING_KEY
    assert keys[[text is not None for text in texts]].tolist() == [key_of_text(text, "user") for text in present]
    assert len(set(keys.tolist())) == len(texts), "two ids share a key"
    assert keys[1] == -1 and keys[6] == 2**61 - 1
    assert all(key >= ALWAYS_BELOW for key in keys[[text is not None for text in texts]].tolist())
    assert key_of_text("x", "user") != key_of_text("x", "item")


def test_a_key_of_every_owner():
    found = np.bincount(owners(np.arange(40_000), 4), minlength=4)
    assert abs(found - 10_000).max() < 500


def test_damaged_entries_are_one_line():
    table = DynamicTable(2)
    twice = Entries(np.array([1, 2]), np.array([0, 0], np.int32), np.zeros((2, 2), np.float32),
                    np.zeros((2, 1), np.float32), np.ones(2, np.float32), np.ones(2, np.uint32))
    with pytest.raises(UserError, match="damaged"):
        table.put(twice, keep_rows=True)
    with pytest.raises(UserError, match="another width"):
        DynamicTable(3).put(twice)


@pytest.mark.slow
def test_a_hundred_million_ids_of_width_8_take_less_than_10_gigabytes():
    """About 7 GB of memory for half a minute."""
    import json
    import subprocess
    import sys

    command = [sys.executable, "scripts/bench/tables.py", "--skip-step", "--skip-peers", "--ids", "100000000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["memory"]["gigabytes"] < 10.0


def test_what_a_sweep_will_free_is_told_before():
    """So that other rows can stay on a device."""
    table, keys = DynamicTable(2), np.arange(100)
    for step in range(1, 11):
        met = keys[keys % step == 0]
        table.meet(met, np.ones(len(met), np.float32), step)
    rows = table.find(keys)
    told = table.expires(rows, oldest=8, least=3.0)
    table.sweep(oldest=8, least=3.0)
    assert 0 < told.sum() < len(keys)
    np.testing.assert_array_equal(told, table.find(keys) < 0)


def test_files_of_a_killed_run_of_more_processes_are_no_part_of_a_checkpoint(tmp_path):
    """Four processes were killed while they wrote, two go on."""
    table = DynamicTable(2)
    for rank in (0, 1, 3):
        stage_tables({"item": table}, tmp_path, rank, 4)
    table.meet(np.arange(10), np.ones(10, np.float32), 1)
    for rank in range(2):
        stage_tables({"item": table}, tmp_path, rank, 2)
    (tmp_path / "checkpoint").mkdir()
    take_staged(tmp_path, tmp_path / "checkpoint")
    assert [path.name[-14:] for path in table_files(tmp_path / "checkpoint")["item"]] == ["02.safetensors"] * 2
    assert [len(read_entries(path)) for path in table_files(tmp_path / "checkpoint")["item"]] == [10, 10]


def test_a_damaged_or_missing_file_is_one_line(tmp_path):
    """A flipped bit anywhere, and one process's file of a set."""
    table = DynamicTable(2)
    table.meet(np.arange(10), np.ones(10, np.float32), 1)
    for rank in range(2):
        write_all_entries(tmp_path, {"item": table.entries()}, rank, 2)
    assert len(read_all_entries(tmp_path)["item"]) == 20
    path = next(tmp_path.iterdir())
    raw, begin = path.read_bytes(), 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for at in range(begin, len(raw), 37):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1:])
        with pytest.raises(UserError, match="damaged"):
            read_entries(path)
    path.write_bytes(raw)
    path.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="are missing"):
        read_all_entries(tmp_path)
