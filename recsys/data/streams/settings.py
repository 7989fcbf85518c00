"""The block `data.stream`: where events come from and how they become samples. Needs no MindSpore."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from parallel.common.settings import Settings


class RedisStreamSettings(Settings):
    """Reader `redis_stream`: entries of Redis streams (XADD), read with XREAD."""

    url: str = "redis://127.0.0.1:6379/0"
    """Of the server; rediss:// for TLS, unix:///path for a socket."""
    keys: list[str] = Field(default_factory=lambda: ["events"], min_length=1)
    """Streams to read; several are merged in order of event time."""
    field: str = "event"
    """Field of an entry that holds the event as a JSON object; an entry without it is the event itself, field by
    field."""


class KafkaSettings(Settings):
    """Reader `kafka`: messages of a topic, each a JSON object."""

    brokers: str = "127.0.0.1:9092"
    """Bootstrap servers, host:port with commas between."""
    topic: str = "events"
    """Topic; its partitions are merged in order of event time."""
    group: str = "ranker"
    """Consumer group: offsets are committed to it after every checkpoint. A run goes on from its checkpoint, not from
    the group."""
    assignment: Literal["all", "group"] = "all"
    """all: this run reads every partition. group: the group shares the partitions among its runs (one process each); a
    partition that moves to another run is handed over at a checkpoint, and goes on where that one stopped."""
    options: dict[str, str] = Field(default_factory=dict)
    """Further settings of librdkafka (security.protocol, sasl.username, ...)."""


class DelayedLabels(Settings):
    """Labels that come after the sample, as events of their own."""

    id: str = "request_id"
    """Column that names the sample, in the impression and in the actions on it."""
    kind: str = "kind"
    """Column that says what an event is: `impression` begins a sample; the name of a label column sets that label to 1;
    events of other kinds are counted and left out."""
    impression: str = "impression"
    """Value of the column `kind` of an impression."""
    window_seconds: float = Field(600.0, gt=0.0)
    """Event time after the impression in which actions count. A sample is trained on when the stream's time has passed
    the window; actions that come later are counted as late."""
    most: int = Field(1_000_000, ge=1)
    """Impressions that wait at most; beyond that the oldest is trained on before its window ends (and counted)."""


class StreamSettings(Settings):
    """How a stream is read. Event time is the column `data.time`, else what the entry or message was stamped with."""

    redis: RedisStreamSettings = RedisStreamSettings()
    """Reader redis_stream."""
    kafka: KafkaSettings = KafkaSettings()
    """Reader kafka."""
    time_unit: Literal["seconds", "milliseconds"] = "seconds"
    """Of the column `data.time`."""
    labels: DelayedLabels | None = None
    """Labels that come later as events of their own; null = every event is a complete sample."""
    gap: Literal["error", "skip"] = "error"
    """Events that are gone before they were read (a trimmed stream, a file that was deleted): error stops, skip goes on
    with the next event and says so."""
    patience_seconds: float = Field(60.0, gt=0.0)
    """How long a server may be away before the run ends with an error."""
    end_after_idle_seconds: float | None = Field(None, gt=0.0)
    """The run ends when no event came for so long; null = it waits."""
    partition_idle_seconds: float | None = Field(None, gt=0.0)
    """With several streams or partitions: one that has no event for so long is no longer waited for. The order of
    events, and so the bits of the model, then depend on arrival; every event is still counted once. Null = wait."""
    buffered: int = Field(10_000, ge=1)
    """Events of one stream or partition read ahead at most."""
    windows: list[int] = Field(default_factory=lambda: [10_000, 100_000], min_length=1)
    """Progressive validation (every batch is scored before it is trained on): sizes of the sliding windows, in samples,
    over which AUC, normalised entropy and calibration are computed."""
    progressive: bool = True
    """Whether there is progressive validation; it costs a forward pass a step."""
