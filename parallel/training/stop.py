"""Stopping a run from outside: what a signal asks for takes effect where all ranks have agreed on it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from parallel.common.progress import info
from parallel.training.backend import Backend

_early: StopRequest | None = None
_REASONS = ("SIGTERM", "SIGINT", "early_stop")


class StopRequest:
    """What this process was asked, and what all of them have agreed on.

    Ranks get a signal at different moments. Were each to act on its own, one would save a checkpoint while another
    begins the next step, and both would wait for ever; so a request only counts after `agreed`.
    """

    def __init__(self) -> None:
        self.asked: str | None = None

    @staticmethod
    def of_process() -> StopRequest:
        """The request that `listen_early` has begun, a new one without it."""
        return _early or StopRequest()

    def ask(self, reason: str) -> None:
        """Notes a reason to stop ("SIGTERM", "SIGINT", "early_stop"); the first one stays."""
        if self.asked is None:
            self.asked = reason

    def agreed(self, backend: Backend) -> str | None:
        """The reason to stop now, the same on all ranks; None = go on. All ranks call it after the same step."""
        asked = self.asked  # once: a signal may come while the ranks exchange
        counts = backend.exchange([float(asked == reason) for reason in _REASONS])
        return next((reason for reason, count in zip(_REASONS, counts, strict=True) if count), None)

    @contextmanager
    def listening(self, interrupt: Callable[[], None] | None = None) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a stop and call `interrupt`; a second SIGINT ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: Any) -> None:
            if self.asked is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.ask(signal.Signals(number).name)
            info(f"{self.asked}: stopping after this step; a checkpoint will be saved")
            if interrupt is not None:
                interrupt()

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)


def listen_early() -> None:
    """In a process that a launcher started: from here on SIGINT and SIGTERM ask for a stop, so that one that comes
    while it still starts is not lost and does not leave the others waiting for it. Called once, first thing."""
    global _early
    if "PARALLEL_OWNER" not in os.environ:
        return
    _early = StopRequest()
    _early.listening().__enter__()
