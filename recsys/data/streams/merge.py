"""One order for the events of several partitions: by event time, equal times by the partition's name.

The next event is the earliest among the partitions' first ones, so the order depends on what the partitions hold and
not on when it came; hence a partition without an event is waited for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from recsys.data.streams.events import Event, Positions, Transport

_POLL_SECONDS = 0.2


class Interrupted(Exception):
    """The run ends: a signal came, or the stream was idle for as long as the settings allow."""


class Merge:
    """Events of a transport, one after the other.

    Args:
        transport: opened.
        settings: `StreamSettings`: buffered, partition_idle_seconds, end_after_idle_seconds.
        stop: set by whoever ends the wait.
    """

    def __init__(self, transport: Transport, settings, stop: threading.Event) -> None:
        self.transport, self.stop = transport, stop
        self.most, self.patience = settings.buffered, settings.partition_idle_seconds
        self.idle_end = settings.end_after_idle_seconds
        self.waiting: dict[str, deque[Event]] = {}
        self.came: dict[str, float] = {}
        self.after_poll: Callable[[], None] = lambda: None

    def open(self, positions: Positions) -> None:
        """Begins at these positions."""
        self.transport.open(positions)
        self.watch(positions)

    def watch(self, positions: Positions) -> None:
        """Waits for these partitions alone, nothing read yet."""
        now = time.monotonic()
        self.waiting = {name: deque() for name in sorted(positions)}
        self.came = dict.fromkeys(positions, now)
        self.last = now

    def next(self) -> Event:
        """The next event; waits for it.

        Raises:
            Interrupted: the wait was ended.
            UserError: see `Transport.poll`.
        """
        while True:
            name = self._ready()
            if name is not None:
                return self.waiting[name].popleft()
            self.look(_POLL_SECONDS)

    def _ready(self) -> str | None:
        """The partition of the next event, None where one has to be waited for."""
        best, first = None, None
        now = None
        for name, events in self.waiting.items():
            if events:
                if first is None or events[0].time < first:
                    best, first = name, events[0].time
            elif self.patience is None:
                return None
            else:
                now = now or time.monotonic()
                if now - self.came[name] < self.patience:
                    return None
        return best

    def look(self, seconds: float) -> None:
        """Takes what the transport has, and notices what it reports.

        Raises:
            Interrupted: the wait was ended.
        """
        if self.stop.is_set():
            raise Interrupted
        wanted = {name for name, events in self.waiting.items() if len(events) < self.most}
        found = self.transport.poll(wanted, max(1, self.most // 4), seconds)
        self.after_poll()
        now = time.monotonic()
        for event in found:
            if event.partition in self.waiting:
                self.waiting[event.partition].append(event)
                self.came[event.partition] = self.last = now
        if not found and self.idle_end is not None and now - self.last > self.idle_end:
            raise Interrupted
