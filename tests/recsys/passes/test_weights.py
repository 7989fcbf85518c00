"""Rows of whole tables for the ids of requests, and how many rows are made for tables on the host."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.common.errors import UserError
from recsys.data.features import FIRST_KNOWN, MISSING, UNSEEN, Feature, assign_columns, expand
from recsys.passes.weights import WholeRows, rooms
from recsys.tables.dynamic import Entries
from recsys.tables.files import FOLDER, file_name, write_entries
from recsys.tables.keys import MISSING_KEY, UNSEEN_KEY


def specs(rows: int):
    """Places in the log, where users are dynamic ids, and where they have so many known rows."""
    def features(**user):
        return expand([Feature(name="user", side="user", **user),
                       Feature(name="kind", side="item", values="integer", rows=5, width=8)])

    return (assign_columns(features(values="dynamic"), 16),
            assign_columns(features(values="integer", rows=rows), 16))


def test_known_keys_have_their_place_and_others_the_unseen_row():
    log, whole = specs(6)
    keys = np.array([-9, 4, 70])
    rows = WholeRows(log, whole, {"user": keys})
    user, kind = log.slots["user"].start, log.slots["kind"].start
    ids = np.zeros((5, log.id_columns), np.int64)
    ids[:, user] = (70, -9, 5, MISSING_KEY, UNSEEN_KEY)
    ids[:, kind] = log.slots["kind"].offset + np.array([3, 2, 1, 0, 4])
    found, first = rows.rows(ids), whole.slots["user"].offset
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found[:, user], first + np.array(
        [FIRST_KNOWN + 2, FIRST_KNOWN, UNSEEN, MISSING, UNSEEN]))
    np.testing.assert_array_equal(found[:, kind] - whole.slots["kind"].offset, [3, 2, 1, 0, 4])
    for columns in ([user], [kind], [kind, user]):
        np.testing.assert_array_equal(rows.rows(ids[:, columns], columns), found[:, columns])


def test_more_keys_than_rows_are_one_line():
    log, whole = specs(2)
    with pytest.raises(UserError, match="more rows than the passes were compiled for"):
        WholeRows(log, whole, {"user": np.arange(whole.slots["user"].rows - FIRST_KNOWN + 1)})


@pytest.mark.parametrize("known", [0, 3, 1000, 100_000])
def test_tables_have_room_for_more_rows_but_not_for_many(tmp_path, known):
    (tmp_path / FOLDER).mkdir()
    for rank in range(2):
        rows = np.arange(known // 2 + 5, dtype=np.int32)
        rows[-5:] = -1  # counted, and not admitted
        count = len(rows)
        write_entries(tmp_path / FOLDER / file_name("user", rank, 2), Entries(
            np.arange(count), rows, np.zeros((count, 4), np.float32), np.zeros((count, 1), np.float32),
            np.zeros(count, np.float32), np.zeros(count, np.uint32)))
    found, held = rooms(tmp_path)["user"], known // 2 * 2
    assert held + held / 8 <= found <= held * 1.4 + 32
