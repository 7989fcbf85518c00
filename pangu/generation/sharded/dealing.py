"""Work for groups of processes that each have the whole model: who does what, and the results in their order again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def dealt(items: Sequence[Sequence[int]], groups: int) -> list[list[int]]:
    """Numbers of the items for each group, in order: the longest first to the group that has the fewest tokens.

    Equal items stay together, since the repetitions of a prompt are told apart by counting them.
    """
    same: dict[tuple[int, ...], list[int]] = {}
    for number, item in enumerate(items):
        same.setdefault(tuple(item), []).append(number)
    found: list[list[int]] = [[] for _ in range(groups)]
    tokens = [0] * groups
    for item, numbers in sorted(same.items(), key=lambda pair: (-len(pair[0]) * len(pair[1]), pair[1])):
        group = min(range(groups), key=lambda place: (tokens[place], place))
        found[group] += numbers
        tokens[group] += (len(item) + 1) * len(numbers)
    return [sorted(numbers) for numbers in found]


def dealt_by_size(sizes: Sequence[int], groups: int) -> list[list[int]]:
    """The same for items of which only the sizes count."""
    found: list[list[int]] = [[] for _ in range(groups)]
    totals = [0] * groups
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        group = min(range(groups), key=lambda place: (totals[place], place))
        found[group].append(number)
        totals[group] += sizes[number] + 1
    return [sorted(numbers) for numbers in found]


def put_together(parts: Sequence[Sequence[tuple[int, Any]]], count: int) -> list[Any]:
    """The results of all groups, each with its number, in the items' order."""
    found: list[Any] = [None] * count
    for number, result in (pair for part in parts for pair in part):
        found[number] = result
    return found
