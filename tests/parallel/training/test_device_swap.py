"""Messages between pairs of processes: every process meets every other, each has one partner at a time."""

from __future__ import annotations

import pytest

from parallel.training.device import partners


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
def test_all_meet_all_without_waiting_in_a_circle(ranks):
    left = [partners(rank, ranks) for rank in range(ranks)]
    assert all(sorted(own) == [other for other in range(ranks) if other != rank] for rank, own in enumerate(left))
    while any(left):
        pairs = [(rank, own[0]) for rank, own in enumerate(left) if own and left[own[0]][:1] == [rank]]
        assert pairs, f"all wait: {left}"
        for rank, _ in pairs:
            left[rank].pop(0)
