"""Delayed labels and the order of partitions, against a plain reading of the rules; going on from any sample."""

from __future__ import annotations

import json
import random
import threading

import pytest

from recsys.data.streams.events import Event
from recsys.data.streams.merge import Interrupted, Merge
from recsys.data.streams.samples import Samples
from recsys.data.streams.settings import DelayedLabels, StreamSettings

WINDOW = 30.0


class Memory:
    """A transport of lists."""

    def __init__(self, partitions: dict[str, list[tuple[float, dict]]], part: int = 3) -> None:
        self.partitions, self.piece, self.at = partitions, part, {}

    def begin(self):
        return dict.fromkeys(self.partitions, 0)

    def open(self, positions):
        self.at = dict(positions)

    def poll(self, wanted, most, seconds):
        events = []
        for name in wanted:
            begin = self.at[name]
            for time, row in self.partitions[name][begin:begin + min(most, self.piece)]:
                self.at[name] += 1
                events.append(Event(name, self.at[name], time, dict(row)))
        return events


def log(seed: int) -> list[tuple[float, dict]]:
    """Impressions, and clicks and likes on them: in time, late, twice, and on nothing."""
    generator = random.Random(seed)
    events = []
    for number in range(120):
        begun = generator.uniform(0, 400)
        events.append((begun, {"kind": "impression", "request_id": number, "user": number % 7}))
        for kind in ("click", "like"):
            if generator.random() < 0.4:
                for _ in range(generator.choice([1, 1, 2])):
                    events.append((begun + generator.uniform(0, 1.6 * WINDOW), {"kind": kind, "request_id": number}))
    events += [(generator.uniform(0, 400), {"kind": "click", "request_id": "none"}) for _ in range(5)]
    events += [(generator.uniform(0, 400), {"kind": "scroll", "request_id": 3}) for _ in range(5)]
    events.append((1000.0, {"kind": "scroll", "request_id": 3}))
    return sorted(events, key=lambda event: event[0])


def oracle(events: list[tuple[float, dict]]) -> list[tuple]:
    """(id, click, like) in order of the impressions, by a look at the whole log."""
    result = []
    for begun, row in events:
        if row["kind"] == "impression":
            found = {other["kind"] for time, other in events
                     if other["request_id"] == row["request_id"] and begun <= time <= begun + WINDOW}
            result.append((row["request_id"], int("click" in found), int("like" in found)))
    return result


def samples(partitions: dict, state: dict | None = None, **options) -> Samples:
    delayed = DelayedLabels(window_seconds=WINDOW, **options)
    settings = StreamSettings(end_after_idle_seconds=1e-6, buffered=8)
    found = Samples(Merge(Memory(partitions), settings, threading.Event()), ["click", "like"], delayed)
    if state is None:
        found.begin(dict.fromkeys(partitions, 0))
    else:
        found.restore(json.loads(json.dumps(state)))
    return found


def rest(stream: Samples) -> list[tuple]:
    result = []
    with pytest.raises(Interrupted):
        while True:
            row = stream.next().row
            result.append((row["request_id"], row["click"], row["like"]))
    return result


@pytest.mark.parametrize("seed", range(3))
def test_delayed_labels_are_those_of_the_complete_log_and_go_on_from_any_sample(seed):
    events = log(seed)
    expected = oracle(events)
    # Actions of an impression may lie in another partition.
    partitions = {"a": events[::2], "b": events[1::2] + [(2000.0, {"kind": "scroll", "request_id": 0})],
                  }
    partitions["a"].append((2000.0, {"kind": "scroll", "request_id": 0}))
    assert rest(samples({"a": events})) == expected
    stream = samples(partitions)
    for number in range(len(expected)):
        row = stream.next().row
        assert (row["request_id"], row["click"], row["like"]) == expected[number]
        if number % 7 == seed:
            again = samples(partitions, stream.state())
            assert rest(again) == expected[number + 1:]
            assert again.counts.samples == len(expected)
    assert stream.counts.unknown_labels + stream.counts.late_labels > 5 and stream.counts.other_events >= 5


def test_the_oldest_sample_goes_when_too_many_wait():
    stream = samples({"a": log(0)}, most=3)
    found = rest(stream)
    assert [one[0] for one in found] == [one[0] for one in oracle(log(0))]
    assert stream.counts.early_samples > 20
    half = samples({"a": log(0)}, most=3)
    for _ in range(50):
        half.next()
    assert rest(samples({"a": log(0)}, half.state(), most=3)) == found[50:]


def test_an_idle_partition_is_waited_for_unless_the_settings_say_how_long():
    partitions = {"a": [(1.0, {}), (2.0, {})], "b": []}
    stop = threading.Event()
    merge = Merge(Memory(partitions), StreamSettings(end_after_idle_seconds=0.05), stop)
    merge.open({"a": 0, "b": 0})
    with pytest.raises(Interrupted):
        merge.next()
    merge = Merge(Memory(partitions), StreamSettings(partition_idle_seconds=0.02), stop)
    merge.open({"a": 0, "b": 0})
    assert [merge.next().time for _ in range(2)] == [1.0, 2.0]
    stop.set()
    with pytest.raises(Interrupted):
        merge.next()
