"""Versions on disk: chains, what is kept, what is damaged; which rows changed."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.common.errors import UserError
from recsys.data.features import Feature, assign_columns
from recsys.live.publisher import TouchedRows
from recsys.live.versions import Delta, Values, Versions, merged, read_current, read_delta


def full(versions: Versions, number: int) -> int:
    return versions.write_full([Values("w", np.full(3, number, np.float32))], {}, number, None)


def test_a_chain_is_a_complete_version_and_the_deltas_after_it(tmp_path):
    versions = Versions(tmp_path, keep=3)
    assert read_current(tmp_path) is None and full(versions, 0) == 1
    for number in range(2, 5):
        assert versions.write_delta(Delta(0, number, 10.0 * number, {"w": np.zeros(3, np.float32)},
                                          {"t.table": (np.array([number]), np.ones((1, 2), np.float32))})) == number
    current = read_current(tmp_path)
    assert (current.version, current.step, current.event_time) == (4, 4, 40.0)
    assert [number for number, _ in current.chain] == [1, 2, 3, 4]
    assert [number for number, _ in current.after(2)] == [3, 4] and current.after(0) is None
    delta = merged([read_delta(path) for _, path in current.after(1)])
    assert delta.version == 4 and delta.rows["t.table"][0].tolist() == [2, 3, 4]
    assert Versions(tmp_path, keep=3).version == 4


def test_the_last_word_on_a_row_holds():
    first = Delta(2, 0, None, {"w": np.zeros(2)}, {"t": (np.array([5, 1]), np.array([[1.0], [2.0]]))})
    second = Delta(3, 0, None, {"w": np.ones(2)}, {"t": (np.array([1, 7]), np.array([[3.0], [4.0]]))})
    both = merged([first, second])
    assert both.dense["w"].tolist() == [1, 1]
    assert dict(zip(both.rows["t"][0].tolist(), both.rows["t"][1][:, 0].tolist(), strict=True)) == {1: 3, 5: 1, 7: 4}


def test_what_the_newest_versions_need_is_kept(tmp_path):
    versions = Versions(tmp_path, keep=2)
    for chain in range(4):
        full(versions, chain)
        versions.write_delta(Delta())
        versions.write_delta(Delta())
    # Versions 11 and 12 need the whole version 10.
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["step_00000010"]
    assert sorted(path.name for path in (tmp_path / "delta").iterdir()) == ["version_00000011", "version_00000012"]
    full(versions, 9)
    assert len(list((tmp_path / "full").iterdir())) == 2
    full(versions, 9)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["step_00000013", "step_00000014"]


def test_damage_and_paths_that_lead_outside_are_one_line(tmp_path):
    versions = Versions(tmp_path, keep=2)
    full(versions, 0)
    versions.write_delta(Delta(dense={"w": np.ones(100, np.float32)}))
    path = read_current(tmp_path).chain[1][1] / "delta.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 1  # of the values
    path.write_bytes(raw)
    with pytest.raises(UserError, match="damaged"):
        read_delta(path.parent)
    (tmp_path / "current.json").write_text('{"version": 1, "step": 1, "event_time": null, "chain": [[1, "../../x"]]}')
    with pytest.raises(UserError, match="outside"):
        read_current(tmp_path)
    (tmp_path / "current.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        read_current(tmp_path)


def test_rows_that_changed_by_the_batches_or_by_comparison():
    spec = assign_columns([Feature(name="a", side="user", values="integer", rows=10),
                           Feature(name="b", side="item", values="integer", rows=10, width=3)], 2)
    table = np.zeros((64, 2), np.float32)
    exact = TouchedRows(spec, True)
    exact.add(np.array([[3, 40], [5, 3]]))
    assert exact.changed("x.table", table).tolist() == [3, 5]
    assert exact.changed("y.table", np.zeros((64, 3))).tolist() == [3, 40]
    exact.begin()
    assert len(exact.changed("x.table", table)) == 0
    compared = TouchedRows(spec, False)
    assert len(compared.changed("x.table", table.copy())) == 64
    table[7] = 1
    assert compared.changed("x.table", table.copy()).tolist() == [7]
    assert len(compared.changed("x.table", table)) == 0
