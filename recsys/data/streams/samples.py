"""From events to samples: as they come, or joined with labels that arrive as later events.

Samples leave in the order in which their impressions came. So everything that a resumed run needs is small: the
position in front of the oldest impression that waits, the position up to which events were read, and the stream's
time. The events between both are read again and nothing is released until the second position is reached.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from parallel.common.errors import UserError
from recsys.data.streams.events import Event, Positions
from recsys.data.streams.merge import Merge
from recsys.data.streams.settings import DelayedLabels


@dataclass(slots=True)
class _Pending:
    event: Event
    before: Positions


@dataclass
class Counts:
    """What became of the events."""

    events: int = 0
    samples: int = 0
    late_labels: int = 0
    unknown_labels: int = 0
    early_samples: int = 0
    other_events: int = 0


@dataclass
class Samples:
    """Samples one after the other.

    Args:
        merge: of the events.
        labels: label columns.
        delayed: how labels come later; None = every event is a sample.
        strict: whether a label at a time that cannot be read is an error; else it is counted among the unknown ones.
    """

    merge: Merge
    labels: list[str]
    delayed: DelayedLabels | None
    strict: bool = False
    vector: Positions = field(default_factory=dict)
    time: float = -math.inf
    counts: Counts = field(default_factory=Counts)
    _queue: deque = field(default_factory=deque)
    _by_id: dict = field(default_factory=dict)

    def begin(self, positions: Positions) -> None:
        """Starts anew at these positions."""
        self._queue.clear()
        self._by_id.clear()
        self.vector = dict(positions)
        self.merge.open(positions)

    def state(self) -> dict[str, Any]:
        """JSON values to go on from."""
        first = self._queue[0].before if self._queue else self.vector
        return {"from": dict(first), "until": dict(self.vector),
                "time": self.time if math.isfinite(self.time) else None, "counts": vars(self.counts).copy()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            Interrupted: the wait for events that were there before was ended.
        """
        self.begin(state["from"])
        self.time = -math.inf if state["time"] is None else float(state["time"])
        behind = {name for name, position in state["until"].items() if self.vector.get(name) != position}
        while behind:
            event = self.merge.next()
            self._take(event)
            if state["until"].get(event.partition) == event.after:
                behind.discard(event.partition)
        self.counts = Counts(**state["counts"])

    def resume_at(self, positions: Positions, state: dict[str, Any]) -> None:
        """Goes on at positions of a transport that is open, where no labels are delayed."""
        self._queue.clear()
        self.vector = dict(positions)
        self.merge.watch(positions)
        self.counts = Counts(**state["counts"])

    def next(self) -> Event:
        """The next sample; its row holds all labels.

        Raises:
            Interrupted: the wait was ended.
        """
        while True:
            ready = self._release()
            if ready is not None:
                self.counts.samples += 1
                return ready
            event = self.merge.next()
            self.counts.events += 1
            self._take(event)

    def _take(self, event: Event) -> None:
        before = self.vector if self.delayed is None else dict(self.vector)
        self.vector[event.partition] = event.after
        self.time = max(self.time, event.time)
        if self.delayed is None:
            self._queue.append(_Pending(event, before))
            return
        kind, name = event.row.get(self.delayed.kind), event.row.get(self.delayed.id)
        if kind == self.delayed.impression:
            event.row = {**dict.fromkeys(self.labels, 0), **event.row}
            pending = _Pending(event, before)
            self._queue.append(pending)
            # An id that comes again means the newer sample.
            self._by_id[_key(name)] = pending
        elif kind in self.labels:
            self._label(kind, event, self._by_id.get(_key(name)))
        else:
            self.counts.other_events += 1

    def _label(self, kind: str, action: Event, pending: _Pending | None) -> None:
        if action.fault is not None and self.strict:
            raise fault_of(action)
        if pending is None or action.fault is not None:
            self.counts.unknown_labels += 1
        elif action.time > pending.event.time + self.delayed.window_seconds:
            self.counts.late_labels += 1
        else:
            pending.event.row[kind] = 1

    def _release(self) -> Event | None:
        if not self._queue:
            return None
        pending, event = self._queue[0], self._queue[0].event
        if self.delayed is not None:
            if len(self._queue) > self.delayed.most:
                self.counts.early_samples += 1
            elif self.time <= event.time + self.delayed.window_seconds:
                return None
            name = _key(event.row.get(self.delayed.id))
            if self._by_id.get(name) is pending:
                del self._by_id[name]
        self._queue.popleft()
        return event


def fault_of(event: Event, fault: tuple[str, str, Any] | None = None) -> UserError:
    """The error that names an event and what is wrong with it (its own fault, or another)."""
    column, what, value = fault or event.fault
    return UserError(f"{what} in column '{column}'", where=f"{event.partition}, event before {event.after}",
                     value=value, hint="repair what writes the stream, or set data.on_bad_row: skip")


def _key(name: Any) -> Any:
    return name if isinstance(name, (str, int, type(None))) else str(name)
