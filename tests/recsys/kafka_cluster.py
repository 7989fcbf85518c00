"""librdkafka's own mock cluster in a process of its own: it speaks Kafka's protocol over real sockets.

`python -m tests.recsys.kafka_cluster` prints the brokers' addresses and stays until stdin is closed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class KafkaCluster:
    """A cluster of one broker; topics come about when they are written to, with four partitions."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "tests.recsys.kafka_cluster"], cwd=ROOT,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "PYTHONPATH": str(ROOT)})
        self.brokers = self.process.stdout.readline().strip()
        assert self.brokers

    def write(self, topic: str, partition: int, events: list[dict]) -> None:
        """Appends events to a partition, in order."""
        from confluent_kafka import Producer

        producer = Producer({"bootstrap.servers": self.brokers, "linger.ms": 1, "enable.idempotence": True})
        for event in events:
            producer.produce(topic, json.dumps(event).encode(), partition=partition,
                             timestamp=int(1000 * event.get("time", 0)))
        assert producer.flush(20) == 0

    def close(self) -> None:
        """Ends it."""
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    from confluent_kafka import Producer

    cluster = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "unused"})
    print(",".join(f"{broker.host}:{broker.port}" for broker in cluster.list_topics(timeout=10).brokers.values()),
          flush=True)
    sys.stdin.read()
