"""What scorers are asked and what they tell. Needs no MindSpore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parallel.common.errors import UserError

ScoreRequest = tuple[Sequence[int], Sequence[int]]
"""Prefix ids, scored ids."""
OnScored = Callable[[list[int], list[tuple[float, bool]]], None]
Item = tuple[np.ndarray, int]
"""All ids of a request, place of its first scored one."""


def total(log_p: np.ndarray, likeliest: np.ndarray) -> tuple[float, bool]:
    """Sum over the tokens of a continuation, and whether each is the likeliest one."""
    return float(sum(log_p)), bool(likeliest.all())


def scored_item(prefix: Sequence[int], continuation: Sequence[int], config: Any, index: int) -> Item:
    """A request as one: all ids (the last is not read, only scored) and the place of the first scored one.

    Raises:
        UserError: nothing before or nothing to score, too long a continuation, an id outside the vocabulary.
    """
    where = f"request {index + 1}"
    if not len(prefix) or not len(continuation):
        raise UserError("prefix and continuation each need at least one token", where=where)
    room = config.sequence_length + 1 - len(continuation)
    if room < 1:
        raise UserError(f"the continuation is longer than the context of {config.sequence_length} tokens", where=where,
                        value=len(continuation))
    prefix = list(prefix)[-room:]
    ids = np.asarray([*prefix, *continuation], np.int64)
    if ids.min() < 0 or ids.max() >= config.vocabulary_size:
        raise UserError(f"id outside the vocabulary of {config.vocabulary_size}", where=where, value=int(ids.max()))
    return ids, len(prefix)
