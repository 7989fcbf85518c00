"""Messages of a Kafka topic, each a JSON object; their timestamps are the event time where `data.time` names none.

A run reads from the offsets of its own checkpoint; those that are committed to the group are for monitoring, and for
`assignment: group`, where runs of one group share the partitions: at a rebalance a run returns to its last checkpoint
that the group knows of, so that whoever gets a partition counts exactly what no other model has. New partitions of a
topic are read from the next start on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.common.errors import UserError
from parallel.common.progress import info
from recsys.data.readers import Reader
from recsys.data.readers._files import no_default_features
from recsys.data.streams.events import Event, Positions, TimeOf, read_object
from recsys.data.streams.no_log import refuse

if TYPE_CHECKING:
    from recsys.settings import DataSettings

_ASK_SECONDS = 5.0


class Topic:
    """A `Transport`; partitions are called by their numbers, a position is the offset of the next message.

    Args:
        data: `DataSettings`.
    """

    def __init__(self, data: DataSettings) -> None:
        try:
            import confluent_kafka
        except ImportError:
            raise UserError("the package confluent-kafka is not installed", where="data.reader: kafka",
                            hint='pip install -e ".[stream]"') from None
        self.kafka, self.settings = confluent_kafka, data.stream
        self.own, self.time = data.stream.kafka, TimeOf(data.time, data.stream.time_unit)
        self.topic, self.away_since = self.own.topic, None
        self.shared = self.own.assignment == "group"
        self.at: Positions = {}
        self.known: Positions = {}
        self.ask_seconds = min(_ASK_SECONDS, data.stream.patience_seconds)
        self.paused: set[str] = set()
        self.hand_over: Callable[[set[str]], None] = lambda partitions: None
        self.take_over: Callable[[Positions], None] = lambda positions: None
        options = {"bootstrap.servers": self.own.brokers, "group.id": self.own.group, "enable.auto.commit": False,
                   "auto.offset.reset": "error", "enable.partition.eof": False, "error_cb": self._note_error,
                   "log_level": 2, **self.own.options}
        try:
            self.consumer = confluent_kafka.Consumer(options)
        except confluent_kafka.KafkaException as error:
            raise UserError(f"Kafka refuses the settings: {error.args[0].str()}", where="data.stream.kafka") from None

    def begin(self) -> Positions:
        """In front of each partition's oldest message."""
        if self.shared:
            return {}
        return {str(partition): self._oldest(partition) for partition in self._partitions()}

    def open(self, positions: Positions) -> None:
        """Reads these partitions from these offsets, or waits for those that the group assigns."""
        self.known = {name: int(offset) for name, offset in positions.items()}
        self.at, self.paused = dict(self.known), set()
        if self.shared:
            self.at = {}
            self.consumer.subscribe([self.topic], on_assign=self._assigned, on_revoke=self._revoked)
            return
        self.consumer.assign([self._topic_partition(name, offset) for name, offset in self.at.items()])

    def poll(self, wanted: set[str], most: int, seconds: float) -> list[Event]:
        """See `Transport`."""
        self._pause(set(self.at) - wanted)
        events = []
        try:
            first = self.consumer.poll(seconds)  # `consume` would wait for all of them
            messages = [] if first is None else [first, *self.consumer.consume(min(most, 10_000), 0.0)]
        except self.kafka.KafkaException as error:
            raise UserError(f"Kafka: {error.args[0].str()}", where="data.stream.kafka") from None
        for message in messages:
            if message.error() is not None:
                self._failed(message)
            elif str(message.partition()) in self.at:
                self.away_since = None
                events.append(self._event(message))
        if self.away_since is not None and time.monotonic() - self.away_since > self.settings.patience_seconds:
            raise UserError("Kafka is away", where="data.stream.kafka.brokers", value=self.own.brokers,
                            hint="start it, or raise data.stream.patience_seconds")
        return events

    def rewind(self, positions: Positions) -> None:
        """Goes back to these positions in the partitions that are still this run's."""
        for name, offset in positions.items():
            if self.at.get(name, offset) != offset:
                self.at[name] = offset
                self.consumer.seek(self._topic_partition(name, offset))

    def commit(self, positions: Positions) -> bool:
        """Commits the checkpoint's position to the group; a refusal is a note, for the checkpoint is what counts."""
        partitions = [self._topic_partition(name, offset) for name, offset in positions.items() if name in self.at]
        if not partitions:
            return True
        try:
            found = self.consumer.commit(offsets=partitions, asynchronous=not self.shared)
            refused = next((partition.error for partition in found or [] if partition.error is not None), None)
        except self.kafka.KafkaException as error:
            refused = error.args[0]
        if refused is not None:
            info(f"Kafka did not take the offsets: {refused.str()}")
            return False
        for partition in partitions:
            self.known[str(partition.partition)] = partition.offset
        return True

    def close(self) -> None:
        """Leaves the group."""
        self.consumer.close()

    # -- partitions ---------------------------------------------------------------------------------------------------

    def _topic_partition(self, name: str, offset: int) -> Any:
        return self.kafka.TopicPartition(self.topic, int(name), int(offset))

    def _partitions(self) -> list[int]:
        found = self._patiently(lambda: self.consumer.list_topics(self.topic, timeout=self.ask_seconds))
        topic = found.topics.get(self.topic)
        if topic is None or topic.error is not None or not topic.partitions:
            raise UserError("there is no such topic", where="data.stream.kafka.topic", value=self.topic)
        return sorted(topic.partitions)

    def _oldest(self, partition: int) -> int:
        place = self.kafka.TopicPartition(self.topic, partition)
        return self._patiently(lambda: self.consumer.get_watermark_offsets(place, timeout=self.ask_seconds))[0]

    def _patiently(self, call: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        while True:
            try:
                return call()
            except self.kafka.KafkaException as error:
                if time.monotonic() - begun > self.settings.patience_seconds:
                    raise UserError(f"Kafka is away: {error.args[0].str()}", where="data.stream.kafka.brokers",
                                    value=self.own.brokers, hint="start it, or check the address") from None
                time.sleep(0.1)

    def _pause(self, full: set[str]) -> None:
        """Holds partitions back of which enough is in memory."""
        if full != self.paused:
            if going := self.paused - full:
                self.consumer.resume([self._topic_partition(name, self.at[name]) for name in going & set(self.at)])
            if holding := full - self.paused:
                self.consumer.pause([self._topic_partition(name, self.at[name]) for name in holding])
            self.paused = full

    # -- runs that share partitions -----------------------------------------------------------------------------------

    def _assigned(self, consumer: Any, partitions: list) -> None:
        """Partitions come: where the group's last checkpoint of them ended, else at their oldest message. This run's
        own checkpoint may be ahead of what it could still commit."""
        found = self._patiently(lambda: consumer.committed(partitions, timeout=self.ask_seconds))
        for partition in found:
            partition.offset = max(partition.offset, self.known.get(str(partition.partition), -1))
            if partition.offset < 0:
                partition.offset = self._oldest(partition.partition)
        consumer.assign(found)
        came = {str(partition.partition): partition.offset for partition in found}
        self.at.update(came)
        self.known.update(came)
        info(f"partitions {', '.join(sorted(came)) or 'none'} came from the group")
        self.take_over(came)

    def _revoked(self, consumer: Any, partitions: list) -> None:
        """Partitions go; the run that gets them begins at what was last committed."""
        going = {str(partition.partition) for partition in partitions}
        self.hand_over(going)
        for name in going:
            self.at.pop(name, None)
            self.known.pop(name, None)
        self.paused -= going
        info(f"partitions {', '.join(sorted(going))} went to the group")

    # -- messages -----------------------------------------------------------------------------------------------------

    def _event(self, message: Any) -> Event:
        name, offset = str(message.partition()), message.offset() + 1
        self.at[name] = offset
        row = read_object(message.value() or b"", f"{self.topic} {name}") or {}
        _, stamp = message.timestamp()
        return self.time.event(name, offset, row, stamp / 1000.0)

    def _failed(self, message: Any) -> None:
        error = message.error()
        name, codes = str(message.partition()), self.kafka.KafkaError
        if error.code() in (codes._AUTO_OFFSET_RESET, codes.OFFSET_OUT_OF_RANGE):
            self._gap(name)
        elif error.code() in (codes.UNKNOWN_TOPIC_OR_PART, codes.TOPIC_AUTHORIZATION_FAILED) or error.fatal():
            raise UserError(f"Kafka: {error.str()}", where="data.stream.kafka.topic", value=self.topic)
        else:
            info(f"Kafka: {error.str()}")

    def _gap(self, name: str) -> None:
        oldest = self._oldest(int(name))
        what = (f"partition {name} of topic '{self.topic}' begins at offset {oldest}, and {self.at.get(name)} is next: "
                "messages went before they were read")
        if self.settings.gap == "error":
            raise UserError(what, where="data.stream.kafka", hint="keep them longer, or accept the gap with "
                            "data.stream.gap=skip")
        info(f"{what}; going on after the gap")
        self.at[name] = oldest
        self.consumer.seek(self._topic_partition(name, oldest))

    def _note_error(self, error: Any) -> None:
        """Called by the client, from within `poll`."""
        if error.code() in (self.kafka.KafkaError._ALL_BROKERS_DOWN, self.kafka.KafkaError._TRANSPORT):
            self.away_since = self.away_since or time.monotonic()


def read(data: DataSettings, path: Path | None) -> Iterator[tuple[Any, str]]:
    """A stream is no log."""
    refuse(data)


READER = Reader(read, no_default_features, needs_path=False, stream=Topic)
