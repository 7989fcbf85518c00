"""Blocks of the cache: who holds them, what is found again, what goes first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pangu.generation.blocks import BlockPool, digests


def test_a_digest_is_of_all_ids_before_it():
    first, second = digests([1, 2, 3, 4], 2)
    assert digests([1, 2, 3, 4, 5], 2) == [first, second]
    assert digests([9, 2, 3, 4], 2)[1] != second != digests([3, 4], 2)[0]
    assert digests([1, 2, 3, 4, 5, 6], 2, [first, second])[:2] == [first, second]
    assert digests([258, 0], 2) != digests([2, 1], 2)


def test_blocks_are_shared_kept_and_reused_oldest_first():
    pool = BlockPool(3, 2)
    held = [pool.take(), pool.take()]
    for block, digest in zip(held, (b"a", b"b"), strict=True):
        pool.register(block, digest)
    pool.notes[held[0]] = "noted"
    pool.hold(held[0])
    pool.give_back(held)
    assert (pool.used, pool.kept, pool.available) == (1, 1, 2)  # the first one still has a holder
    pool.give_back(held[:1])
    assert (pool.used, pool.kept) == (0, 2) and pool.find(b"a") == held[0]
    taken = [pool.take(), pool.take()]
    assert taken[1] == held[1]  # an empty one first, then the end of what was given back
    assert pool.find(b"b") is None and pool.find(b"a") == held[0] and pool.notes[held[0]] == "noted"
    assert pool.take() == held[0] and pool.find(b"a") is None and pool.notes[held[0]] is None
    with pytest.raises(IndexError):
        pool.take()


def test_the_first_block_with_some_content_is_the_one_that_is_found():
    pool = BlockPool(2, 2)
    one, other = pool.take(), pool.take()
    pool.register(one, b"a")
    pool.register(other, b"a")
    assert pool.find(b"a") == one
    pool.give_back([other])
    assert pool.kept == 0 and pool.available == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=80))
def test_no_block_is_lost_or_held_twice(steps):
    pool, tables = BlockPool(6, 1), [[] for _ in range(4)]
    for who, what in steps:
        table = tables[who]
        if what == 5:
            pool.give_back(table)
            table.clear()
        elif what == 4 and (found := pool.find(b"%d" % len(table))) is not None and found not in table:
            pool.hold(found)
            table.append(found)
        elif pool.available:
            table.append(pool.take())
            pool.register(table[-1], b"%d" % (len(table) - 1))
        held = {block for table in tables for block in table}
        assert pool.used == len(held) and pool.used + pool.available == 6 and pool.kept <= pool.available
    for table in tables:
        pool.give_back(table)
    assert pool.used == 0
