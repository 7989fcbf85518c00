"""A process that waits for others longer than it should: who waits, at which step, in what, and where in the code.

What may block says so by `waiting`; a thread looks whether it has come back. Costs two assignments a wait. Imports no
framework.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from parallel.common.errors import PeerError

_LOOKS = 10


class Activity:
    """What this process's main thread does.

    Attributes:
        step: the step that is being made, from 1; 0 before the first.
        what: what it waits for; None = nothing. Made into words only if it is told.
        since: when the wait began, by the monotonic clock.
        last: the collective that was begun last.
    """

    def __init__(self) -> None:
        self.step, self.what, self.since, self.last = 0, None, 0.0, None

    def words(self) -> str:
        """What is waited for."""
        if not isinstance(self.what, tuple):
            return f"{self.what}{f'; the last collective begun is {named(self.last)}' if self.last else ''}"
        return named(self.what)


ACTIVITY = Activity()


@contextlib.contextmanager
def waiting(what: Any) -> Iterator[None]:
    """While in here this process waits for others: `what` is a text, or a collective as (operation, ranks, place)."""
    before = ACTIVITY.what, ACTIVITY.since
    ACTIVITY.since, ACTIVITY.what = time.monotonic(), what
    try:
        yield
    finally:
        ACTIVITY.what, ACTIVITY.since = before


def named(collective: tuple) -> str:
    """A collective in words."""
    operation, ranks, place = collective
    shown = " ".join(map(str, ranks[:8])) + (f" .. {ranks[-1]}" if len(ranks) > 8 else "")
    return f"{operation} of ranks {shown}" + (f" ({place})" if place else "")


@contextlib.contextmanager
def watched(rank: int, ranks: int, seconds: float | None) -> Iterator[None]:
    """Ends this process, with a line that says what it waited for and its stack, once it has waited `seconds`; None =
    never."""
    if seconds is None:
        yield
        return
    stop = threading.Event()
    main = threading.get_ident()

    def watch() -> None:
        while not stop.wait(min(1.0, seconds / _LOOKS)):
            if ACTIVITY.what is not None and time.monotonic() - ACTIVITY.since > seconds:
                _end(rank, ranks, seconds, main)

    thread = threading.Thread(target=watch, daemon=True, name="stall")
    thread.start()
    try:
        yield
    finally:
        stop.set()


def _end(rank: int, ranks: int, seconds: float, main: int) -> None:
    waited = time.monotonic() - ACTIVITY.since
    frame = sys._current_frames().get(main)
    stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
    where = f"step {ACTIVITY.step}" if ACTIVITY.step else "before the first step"
    print(f"stack of rank {rank}:\n{stack}error: rank {rank} of {ranks} has waited {waited:.0f} s at {where} in "
          f"{ACTIVITY.words()}, longer than train.stall_after ({seconds:g} s)", file=sys.stderr, flush=True)
    # The main thread cannot be reached: it is inside a call that does not return.
    os._exit(PeerError.exit_code)
