"""Kafka, by librdkafka's mock cluster over sockets: offsets of the checkpoint, partitions merged and handed over."""

from __future__ import annotations

import threading
import time

import pytest

from parallel.common.errors import UserError
from tests.recsys.data.streams.events import clicks
from tests.recsys.data.streams.reading import make_source, read, same
from tests.recsys.kafka_cluster import KafkaCluster

pytest.importorskip("confluent_kafka")
PARTITIONS = 4


@pytest.fixture(scope="module")
def cluster():
    found = KafkaCluster()
    yield found
    found.close()


def fill(cluster, topic: str, events: list[dict]) -> None:
    """Spreads events over the partitions; one far in the future ends each."""
    for partition in range(PARTITIONS):
        cluster.write(topic, partition, [*events[partition::PARTITIONS], *clicks(1, start=1e6)])


def words(cluster, topic: str, *more: str):
    return ("data.reader=kafka", f"data.stream.kafka.brokers={cluster.brokers}", f"data.stream.kafka.topic={topic}",
            *more)


def test_partitions_are_merged_by_time_and_a_run_goes_on_from_its_checkpoint(cluster, tmp_path):
    events = clicks(96)
    fill(cluster, "merged", events)
    uninterrupted, states = read(make_source(tmp_path, *words(cluster, "merged")), 6)
    assert [row[0] for _, _, labels in uninterrupted for row in labels] == [event["click"] for event in events]
    for step in (1, 4):
        assert same(read(make_source(tmp_path, *words(cluster, "merged")), 6 - step, step, states[step])[0],
                    uninterrupted[step:])


def test_offsets_are_committed_for_monitoring_and_a_hole_is_an_error(cluster, tmp_path):
    from confluent_kafka import Consumer, TopicPartition

    fill(cluster, "gap", clicks(64))
    source = make_source(tmp_path, *words(cluster, "gap"))
    stream = source.batches(0)
    next(stream)
    source.transport.commit(source.state(1)["from"])
    source.transport.consumer.commit(offsets=[TopicPartition("gap", 0, 4)], asynchronous=False)
    stream.close()
    other = Consumer({"bootstrap.servers": cluster.brokers, "group.id": "ranker"})
    places = other.committed([TopicPartition("gap", partition) for partition in range(PARTITIONS)], timeout=5)
    assert [place.offset for place in places] == [4] * PARTITIONS
    other.close()
    state = source._states.get(1) or {"time": None, "counts": {}}
    beyond = {**state, "from": dict.fromkeys(map(str, range(PARTITIONS)), 900),
              "until": dict.fromkeys(map(str, range(PARTITIONS)), 900), "time": 0.0, "counts": {}}
    with pytest.raises(UserError, match="went before they were read"):
        read(make_source(tmp_path, *words(cluster, "gap")), 1, 1, beyond)


def test_a_cluster_that_is_away_and_a_topic_that_is_not_there_are_one_line(cluster, tmp_path):
    with pytest.raises(UserError, match="Kafka is away"):
        read(make_source(tmp_path, "data.reader=kafka", "data.stream.kafka.brokers=127.0.0.1:1",
                         "data.stream.patience_seconds=0.2"), 1)
    with pytest.raises(UserError, match="refuses the settings"):
        make_source(tmp_path, *words(cluster, "x", "data.stream.kafka.options={no.such.option: '1'}"))


NUMBERED = "data.features=[{name: number, side: user, values: integer, rows: 2000}]"


class Reading(threading.Thread):
    """A run of a group without a model: takes batches, writes down the numbers of those that a step would have taken,
    and a checkpoint when it is asked for one."""

    def __init__(self, source) -> None:
        super().__init__(daemon=True)
        self.source, self.trained, self.steps, self.error, self.went_back = source, [], 0, None, 0
        source.save, source.go_back = self.save, self.go_back

    def save(self) -> None:
        assert self.source.state(self.steps) is not None
        self.source.after_checkpoint(self.steps)

    def go_back(self, step: int) -> None:
        self.went_back += self.steps - step
        self.steps, self.trained = step, self.trained[:4 * step]

    def run(self) -> None:
        try:
            for ids, _, _ in self.source.batches(0):
                self.steps += 1
                self.trained += (ids[:, 0] - 2).tolist()
                time.sleep(0.005)
                if self.steps % 7 == 0:
                    self.save()
            self.source.finish(self.steps)
        except BaseException as error:  # told by the test
            self.error = error


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_partitions_that_move_between_two_runs_are_counted_once(cluster, tmp_path):
    total = 600
    events = [{**event, "number": number} for number, event in enumerate(clicks(total))]
    for partition in range(PARTITIONS):
        cluster.write("shared", partition, events[partition::PARTITIONS])
    more = words(cluster, "shared", "data.stream.kafka.assignment=group", "data.stream.kafka.group=two", NUMBERED,
                 "train.global_batch_size=4", "data.stream.partition_idle_seconds=0.1",
                 "data.stream.kafka.options={heartbeat.interval.ms: '100', session.timeout.ms: '6000'}")
    first = Reading(make_source(tmp_path / "a", *more))
    second = Reading(make_source(tmp_path / "b", *more))
    first.start()
    wait_for(lambda: first.steps > 10 or first.error)
    assert first.error is None, first.error
    second.start()
    wait_for(lambda: second.steps > 10 or second.error)
    assert len(second.source.transport.at) == len(first.source.transport.at) == 2
    second.source.interrupt()
    second.join(20)
    wait_for(lambda: len(first.trained) + len(second.trained) > total - 8 or first.error)
    first.source.interrupt()
    first.join(20)
    assert first.error is None and second.error is None and first.went_back > 0
    both = first.trained + second.trained
    assert len(both) == len(set(both)) and total - len(both) < 8
    missing = set(range(total)) - set(both)
    # What is missing fills no batch: it lies at the end of the partitions.
    assert all(number > total - 8 * PARTITIONS for number in missing)
