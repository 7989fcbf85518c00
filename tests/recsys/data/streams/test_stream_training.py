"""`train` from a stream by the user's command: killed anywhere, the model is the one of the run that was not killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from parallel.checkpoint.folder import list_checkpoints
from parallel.checkpoint.full import Checkpoint
from parallel.common.command import main
from parallel.training.metrics_log import read_metrics
from recsys.__main__ import VERBS
from tests.recsys.data.streams.events import SMALL, add, clicks
from tests.recsys.kafka_cluster import KafkaCluster
from tests.recsys.redis_server import RedisServer

pytestmark = pytest.mark.usefixtures("graph_mode")
STEPS = 30


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = RedisServer(tmp_path_factory.mktemp("redis"))
    add(found.client, clicks(16 * STEPS))
    yield found
    found.close()


def words(server, folder, *more: str) -> list[str]:
    return ["train", *SMALL, "data.reader=redis_stream", f"data.stream.redis.url={server.url}",
            f"output.directory={folder}", f"train.steps={STEPS}", *more]


def figures_of(server, folder, capsys, *more: str) -> dict:
    assert main("recsys", VERBS, words(server, folder, *more)) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def tensors(folder) -> dict:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.layout}


def kill_in_the_middle(command: list[str], folder, generator: random.Random) -> None:
    """Starts the command and kills it after a checkpoint, at no particular moment."""
    process = subprocess.Popen([sys.executable, "-m", "recsys", *command], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={**os.environ, "GLOG_v": "3"})
    before, deadline = len(list_checkpoints(folder / "checkpoints")), time.monotonic() + 120
    while len(list_checkpoints(folder / "checkpoints")) == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(generator.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()


def same_model(one, other) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys() and len(first) > 5
    for name in first:
        assert np.array_equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    """A run that takes all there is and ends when no more comes."""
    folder = tmp_path_factory.mktemp("straight")
    assert main("recsys", VERBS, words(server, folder, "train.steps=100", "data.stream.end_after_idle_seconds=1",
                                       "output.checkpoint_every=10")) == 0
    return folder


def test_it_learns_and_tests_before_it_trains(server, uninterrupted):
    metrics = [record for record in read_metrics(uninterrupted / "metrics.jsonl") if "auc_50" in record]
    assert [record["step"] for record in metrics] == [10, 20, 30]
    assert metrics[-1]["auc_200"] > 0.6 and metrics[-1]["auc"] == metrics[-1]["auc_200"]
    assert 0.5 < metrics[-1]["calibration"] < 2 and 0 < metrics[-1]["ne_50"] < 2
    assert list_checkpoints(uninterrupted / "checkpoints")[-1].name == f"step_{STEPS:08d}"
    state = json.loads((list_checkpoints(uninterrupted / "checkpoints")[-1] / "state.json").read_text())
    assert state["companions"]["stream"]["counts"]["samples"] == 16 * STEPS


def test_killed_with_sigkill_is_the_uninterrupted_run(server, uninterrupted, tmp_path, capsys):
    generator = random.Random(1)
    kill_in_the_middle(words(server, tmp_path), tmp_path, generator)
    assert len(list_checkpoints(tmp_path / "checkpoints")) > 0
    server.kill()
    server.start()
    figures = figures_of(server, tmp_path, capsys)
    assert figures["steps"] == STEPS and figures["samples"] == 16 * STEPS
    same_model(uninterrupted, tmp_path)
    ours = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "auc_50" in record]
    theirs = [record for record in read_metrics(uninterrupted / "metrics.jsonl") if "auc_50" in record]
    assert ours[-1] == theirs[-1]  # the windows come back with the checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_again_and_again(server, uninterrupted, tmp_path, capsys, seed):
    generator = random.Random(seed)
    for _ in range(3):
        kill_in_the_middle(words(server, tmp_path), tmp_path, generator)
        server.kill()
        server.start()
    figures_of(server, tmp_path, capsys)
    same_model(uninterrupted, tmp_path)


def later_labels(events: list[dict]) -> list[dict]:
    """The same samples as impressions and, three seconds later, the clicks on them."""
    found = []
    for number, event in enumerate(events):
        label, shown = event["click"], {name: value for name, value in event.items() if name != "click"}
        found.append({**shown, "kind": "impression", "request_id": number})
        if label:
            found.append({"kind": "click", "request_id": number, "time": event["time"] + 3.5})
    return sorted(found, key=lambda event: event["time"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_on_kafka_with_labels_that_come_later(uninterrupted, tmp_path, capsys, seed):
    """Four partitions, the trainer killed twice: the model is that of the run on Redis whose events were complete."""
    pytest.importorskip("confluent_kafka")
    cluster, generator = KafkaCluster(), random.Random(seed)
    try:
        events = later_labels(clicks(16 * STEPS))
        for partition in range(4):
            cluster.write("shown", partition, [*events[partition::4], {"kind": "scroll", "request_id": 0, "time": 1e6}])
        command = ["train", *SMALL, "data.reader=kafka", f"data.stream.kafka.brokers={cluster.brokers}",
                   "data.stream.kafka.topic=shown", f"output.directory={tmp_path}", f"train.steps={STEPS}",
                   "data.stream.labels={id: request_id, kind: kind, window_seconds: 10}"]
        for _ in range(2):
            kill_in_the_middle(command, tmp_path, generator)
        assert main("recsys", VERBS, command) == 0
        figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    finally:
        cluster.close()
    assert figures["steps"] == STEPS and figures["samples"] == 16 * STEPS
    same_model(uninterrupted, tmp_path)


@pytest.mark.parametrize("more, message", [
    (["data.features=[{name: user_id, side: user}]"], "counted before training"),
    (["train.keep_best=auc"], "newest parameters"),
    (["data.stream.redis.keys=[events, none]", "train.steps=31"], "reads other streams"),
])
def test_what_does_not_go_with_a_stream_is_one_line(server, uninterrupted, capsys, more, message):
    assert main("recsys", VERBS, words(server, uninterrupted, *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and error[-1].startswith("error: ")
