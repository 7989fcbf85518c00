"""Batches of a stream for the trainer: every event is counted exactly once in the model.

A batch is the next `global_batch_size` good samples. The checkpoint of a step holds where the stream was after that
step's batch, together with the parameters that the batch moved, so a run that is killed at any moment goes on with the
same batches as if it had not been.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.files import read_json, write_json
from parallel.common.progress import info
from parallel.training.companions import Companion
from parallel.training.data_source import WaitingSource
from recsys.data.encode import Columns, Encoded, Encoder
from recsys.data.features import Feature, FeatureSpec
from recsys.data.streams.events import Event, Positions, Tables, Transport
from recsys.data.streams.merge import Interrupted, Merge
from recsys.data.streams.samples import Counts, Samples, fault_of
from recsys.data.streams.settings import StreamSettings
from recsys.data.vocabulary import Vocabulary

_KEPT_STATES = 64  # steps read ahead of the trainer at most
_BEGIN = "stream.json"
_REBALANCE_SECONDS = 10.0


class _Moved(Exception):
    """Partitions came or went: the batch is collected anew."""


class StreamSource(WaitingSource, Companion):
    """A data source without epochs, and the companion that keeps the stream's position in the checkpoints.

    Args:
        transport: brings the events.
        settings: `data.stream`.
        reading: (features, columns, spec, vocabulary) of the run.
        on_bad_row: error or skip.
        batch: samples of one global batch.
        directory: of the run: where the stream began is kept there, for a run that is killed before its first
            checkpoint.
        rank, ranks: every process reads all of the stream and takes its rows of each batch.
    """

    name, columns, ends = "stream", ("ids", "numbers", "labels"), True
    steps_per_epoch = 1 << 62

    def __init__(self, transport: Transport, settings: StreamSettings,
                 reading: tuple[list[Feature], Columns, FeatureSpec, Vocabulary], on_bad_row: str, batch: int,
                 directory: str | Path, rank: int = 0, ranks: int = 1) -> None:
        features, columns, self.spec, self.vocabulary = reading
        self.transport, self.batch, self.directory = transport, batch, Path(directory)
        self.encoder, self.tables = Encoder(features, columns, on_bad_row), Tables(features, columns)
        self.strict = on_bad_row == "error"
        self.stop = threading.Event()
        self.samples = Samples(Merge(transport, settings, self.stop), columns.labels, settings.labels,
                               on_bad_row == "error")
        share = batch // ranks
        self.rank, self.mine = rank, slice(rank * share, (rank + 1) * share)
        self.skipped: Counter = Counter()
        self._states: OrderedDict[int, dict] = OrderedDict()
        self._restored: dict | None = None
        self._step = self._reported_step = 0
        self._moved = self._refused = False
        self.read_ahead = not transport.shared
        if not self.read_ahead:
            transport.hand_over, transport.take_over = self._hand_over, self._take_over
            self.samples.merge.after_poll = self._after_poll

    # -- data source --------------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Ends a wait for events."""
        self.stop.set()

    def batches(self, start_step: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Batches start_step, start_step + 1, ... until the stream is idle for too long or `interrupt`. The transport
        stays open for the offsets of the last checkpoint, until `finish`."""
        try:
            self._step = self._reported_step = start_step
            self._begin(start_step)
            self._keep(start_step)
            if not self.read_ahead:
                self.save()
            while True:
                encoded = self._next_batch()
                self._step += 1
                self._keep(self._step)
                rows = encoded.take(self.mine)
                yield rows.ids, rows.numbers, rows.labels
        except Interrupted:
            if not self.read_ahead:
                self.save()
                self._return_to_reported()
            return
        except GeneratorExit:
            raise
        except BaseException:
            self.transport.close()
            raise

    def _begin(self, step: int) -> None:
        if step:
            if self._restored is None:
                raise UserError("the checkpoint does not say where the stream was", where="output.resume",
                                value=step, hint="it is of a run on files; start a new run")
            self.samples.restore(self._restored)
            return
        kept = self.directory / _BEGIN
        positions = read_json(kept) if kept.is_file() else self.transport.begin()
        if self.rank == 0 and not kept.is_file():
            write_json(kept, positions)
        self.samples.begin(positions)

    # -- partitions that move between runs of a group -----------------------------------------------------------------

    def _hand_over(self, going: set[str]) -> None:
        """Called from within a poll, between two steps."""
        self._moved = True

    def _take_over(self, came: Positions) -> None:
        self._moved = True

    def _after_poll(self) -> None:
        if self._moved:
            raise _Moved

    def _regather(self) -> None:
        """Goes back to the last checkpoint that the group knows of, in the partitions that are this run's now: others
        may have what came after it in those that went."""
        if self._refused:  # a rebalance has begun; what is trained before it comes would be lost
            self._moved, deadline = False, time.monotonic() + _REBALANCE_SECONDS
            while not self._moved and not self.stop.is_set() and time.monotonic() < deadline:
                self.transport.poll(set(self.transport.at), 1, 0.1)
        self._moved = self._refused = False
        self._return_to_reported()
        positions = {name: self.transport.known.get(name, place) for name, place in self.transport.at.items()}
        self.transport.rewind(positions)
        self.samples.resume_at(positions, self._states[self._step])
        self._keep(self._step)

    def _return_to_reported(self) -> None:
        if self._step > self._reported_step:
            info(f"back to step {self._reported_step}, the last that the group knows of")
            self.go_back(self._reported_step)
            self._step = self._reported_step

    def _next_batch(self) -> Encoded:
        while True:
            try:
                if not self.read_ahead:
                    self.samples.merge.look(0.0)
                return self._collected()
            except _Moved:
                self._regather()

    def _collected(self) -> Encoded:
        parts, have = [], 0
        while have < self.batch:
            events = [self.samples.next() for _ in range(self.batch - have)]
            part = self._encoded(events)
            parts.append(part)
            have += len(part)
        if len(parts) == 1:
            return parts[0]
        return Encoded(*(np.concatenate([getattr(part, name) for part in parts])
                         for name in ("ids", "numbers", "labels", "users")))

    def _encoded(self, events: list[Event]) -> Encoded:
        table, bad = self.tables.table(events)
        bad = {**{index: event.fault for index, event in enumerate(events) if event.fault is not None}, **bad}
        if bad:
            index, fault = min(bad.items())
            if self.strict:
                raise fault_of(events[index], fault)
            for column, what, _ in bad.values():
                self.skipped[f"{column}: {what}"] += 1
            good = [index for index in range(len(events)) if index not in bad]
            events, table = [events[index] for index in good], table.take(good)
        where = f"{where_of(events[0])} and on" if events else "stream"
        return self.encoder.encode(table, self.spec, self.vocabulary, where, 0)[0]

    # -- companion ----------------------------------------------------------------------------------------------------

    def _keep(self, step: int) -> None:
        self._states[step] = {**self.samples.state(), "skipped": dict(self.skipped + self.encoder.report.skipped)}
        while self.read_ahead and len(self._states) > _KEPT_STATES:
            self._states.popitem(last=False)

    def before_step(self, step: int, batch: Any) -> None:
        """Forgets the states that no checkpoint can need any more."""
        needed = step if self.read_ahead else min(step, self._reported_step)
        for old in [known for known in self._states if known < needed]:
            del self._states[old]

    def state(self, step: int) -> dict | None:
        """Where the stream was after the batch of `step`."""
        return self._states.get(step)

    def restore(self, state: dict) -> None:
        """Goes on from there."""
        self._restored = {name: state[name] for name in ("from", "until", "time", "counts")}
        self.samples.counts = Counts(**state["counts"])
        self.skipped = Counter(state.get("skipped", {}))

    def after_checkpoint(self, step: int) -> None:
        """Commits how far the model is."""
        state = self._states.get(step)
        if state is not None and self.rank == 0:
            if self.transport.commit(state["from"]):
                self._reported_step = step
            else:
                self._moved = self._refused = not self.read_ahead

    def event_time(self, step: int) -> float | None:
        """The newest event time in the batches up to `step`, seconds; None where there was none."""
        state = self._states.get(step)
        return state["time"] if state is not None else None

    def finish(self, step: int) -> dict[str, Any]:
        """What became of the events; leaves the stream."""
        self.transport.close()
        skipped = self.skipped + self.encoder.report.skipped
        if skipped:
            info("events skipped: " + ", ".join(f"{count} ({what})" for what, count in skipped.items()))
        return {**vars(self.samples.counts), "events_skipped": sum(skipped.values())}


def where_of(event: Event) -> str:
    """Names an event for an error message."""
    return f"{event.partition}, event before {event.after}"
