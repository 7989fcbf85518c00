"""A server that follows a run takes versions by itself, without an error, and every answer is of one version."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from parallel.checkpoint.full import Checkpoint
from parallel.checkpoint.tensors import ParameterTensor
from parallel.common.errors import UserError
from recsys.live.versions import Delta, Values, Versions, merged
from recsys.saved_model import load
from recsys.serving.engine import Engine
from recsys.serving.follow import Follower, LiveModel, live_folder, load_current
from recsys.serving.requests import read_request
from recsys.serving.settings import EngineSettings
from tests.recsys.runs import body_of, make_run, plain
from tests.recsys.serving.following import answers_while_versions_come
from tests.servers import says_where

pytestmark = pytest.mark.usefixtures("graph_mode")
SHAPES = EngineSettings(requests=2, candidates=[8], queue=200, timeout_seconds=60, cache_users=50)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple:
    """(folder, settings, log) of a run whose graphs compile quickly."""
    folder = tmp_path_factory.mktemp("small") / "run"
    return folder, *make_run(folder, "dlrm_mlp", "model.hidden=[8]")


class Writer:
    """Publishes versions of a run that was never trained: every version moves every weight and some rows."""

    def __init__(self, run, folder) -> None:
        self.folder, self.state = folder, {"run": Checkpoint(run[0] / "checkpoints" / "step_00000001").state["run"]}
        folder.mkdir(parents=True)
        (folder / "vocabulary.json").write_bytes((run[0] / "vocabulary.json").read_bytes())
        self.values = {p.name: np.array(ParameterTensor(p).read()) for p in load(run[0]).model.get_parameters()}
        self.versions = Versions(folder, 3)
        self.random = np.random.default_rng(0)

    def move(self) -> Delta:
        delta = Delta()
        for name, value in self.values.items():
            if name.endswith(".table"):
                rows = np.unique(self.random.integers(0, len(value), 70))
                value[rows] += self.random.normal(0, 0.5, (len(rows), value.shape[1])).astype(np.float32)
                delta.rows[name] = rows, value[rows].copy()
            else:
                value += self.random.normal(0, 0.002, value.shape).astype(value.dtype)
                delta.dense[name] = value.copy()
        return delta

    def publish(self, full: bool = False) -> int:
        delta = self.move()
        if full:
            return self.versions.write_full([Values(n, v.copy()) for n, v in self.values.items()], self.state, 0, None)
        return self.versions.write_delta(delta)


def expected_scores(trained, chains: dict, bodies: list) -> dict:
    """Scores of every body by every version, by whole forward passes of a model of its own."""
    model, found = LiveModel(trained), {}
    asks = [read_request(body, trained, 20) for body in bodies]
    for version, delta in sorted(chains.items()):
        model.put(merged([delta]))
        found[version] = [plain(trained.model, ask.ids, ask.numbers)[:, 0] for ask in asks]
    return found


@pytest.mark.parametrize("which, clients, updates", [
    ("small", 8, 12), pytest.param("run", 64, 100, marks=pytest.mark.slow)])
def test_every_answer_is_wholly_of_one_version_while_versions_come(request, tmp_path, which, clients, updates):
    run = request.getfixturevalue(which)
    writer = Writer(run, tmp_path / "live")
    writer.publish(full=True)
    reference, _ = load_current(tmp_path / "live", 64)
    bodies = [body_of(reference, run[2], seed, 5) for seed in range(6)]
    asks = [read_request(body, reference, 20) for body in bodies]
    answers, chains = answers_while_versions_come(tmp_path / "live", 64, SHAPES, asks, writer.publish, clients, updates)
    expected = {1: [plain(reference.model, ask.ids, ask.numbers)[:, 0] for ask in asks],
                **expected_scores(reference, chains, bodies)}
    for body, scores, version in answers:
        np.testing.assert_allclose(scores[:, 0], expected[version][body], rtol=0, atol=2e-6)
    moved = np.abs(np.asarray(expected[1][0]) - np.asarray(expected[updates + 1][0])).max()
    assert moved > 1e-3  # else versions could not be told apart


def test_a_chain_that_begins_anew_and_a_version_of_another_model(small, tmp_path):
    run, writer = small, Writer(small, tmp_path / "live")
    writer.publish(full=True)
    writer.publish()
    trained, current = load_current(tmp_path / "live", 64)
    assert current.version == 2
    engine = Engine(trained, SHAPES)
    engine.start()
    follower = Follower(engine, current, 3600.0)
    follower.start()
    ask = read_request(body_of(trained, run[2], 1, 5), trained, 20)
    for _ in range(3):
        writer.publish()
    writer.publish(full=True)
    writer.publish()
    assert follower.look() and engine.version == 7 and not follower.look()
    fresh, _ = load_current(tmp_path / "live", 64)
    np.testing.assert_allclose(engine.score(ask.ids, ask.numbers)[:, 0], plain(fresh.model, ask.ids, ask.numbers)[:, 0],
                               rtol=0, atol=2e-6)
    writer.versions.write_delta(Delta(dense={"no.such": np.zeros(2, np.float32)}))
    with pytest.raises(UserError, match="does not fit"):
        follower.look()
    assert engine.version == 7 and follower.figures()["step"] == 0
    follower.stop()
    engine.stop()
    with pytest.raises(UserError, match="nothing has been published"):
        live_folder(tmp_path / "nothing")


@pytest.mark.slow
def test_by_the_commands(run, tmp_path):
    """`serve follow=true` beside a writer of versions; 64 clients over HTTP."""
    writer = Writer(run, tmp_path / "live")
    writer.publish(full=True)
    process, address = says_where("recsys", "serve", "--checkpoint", str(tmp_path), "port=0", "follow=true",
                                  "engine.candidates=[8]", "engine.queue=200", "engine.timeout_seconds=60")
    body = json.dumps(body_of(load(run[0]), run[2], 1, 5)).encode()
    stop = threading.Event()

    def client(_: int) -> list[int]:
        versions = []
        while not stop.is_set():
            with urllib.request.urlopen(urllib.request.Request(f"{address}/rank", data=body), timeout=60) as answer:
                versions.append(json.loads(answer.read())["version"])
        return versions

    try:
        with ThreadPoolExecutor(64) as pool:
            done = [pool.submit(client, number) for number in range(64)]
            for _ in range(100):
                writer.publish()
                time.sleep(0.1)
            time.sleep(2)
            stop.set()
            seen = [one.result() for one in done]
        assert all(versions == sorted(versions) for versions in seen) and max(max(v) for v in seen) == 101
        assert json.loads(urllib.request.urlopen(f"{address}/health", timeout=10).read())["version"] == 101
    finally:
        process.kill()
        process.wait()
