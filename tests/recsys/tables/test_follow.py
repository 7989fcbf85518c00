"""A server that follows versions of tables on the host: every answer is wholly of one of them."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from parallel.checkpoint.full import Checkpoint
from parallel.task import load_run
from recsys.data.log import prepare
from recsys.live.host_rows import HostRows
from recsys.live.versions import Delta, Values, Versions, merged
from recsys.saved_model import load
from recsys.serving.follow import LiveModel, load_current
from recsys.serving.requests import read_request
from recsys.tables.names import is_sparse
from recsys.tables.step import Hosted
from tests.recsys.runs import DATA
from tests.recsys.serving.following import answers_while_versions_come
from tests.recsys.tables.test_host import _dynamic
from tests.recsys.tables.test_serving import SMALL, add_checkpoint, request_of

pytestmark = pytest.mark.usefixtures("graph_mode")


class Writer:
    """Versions of a run: each moves every dense weight, and the rows of a batch of the log."""

    def __init__(self, folder) -> None:
        _, plain = load_run("configs/recsys/dlrm_mlp.yaml", DATA)
        _, settings = load_run("configs/recsys/dlrm_mlp.yaml", [
            *DATA, *_dynamic(plain), "model.hidden=[8]", "data.tables.place=host",
            "train.sparse_optimizer.name=rowwise_adagrad", "train.sparse_optimizer.learning_rate=0.5",
            f"output.directory={folder / 'run'}", f"data.cache={folder / 'data'}"])
        self.log = prepare(settings.data, settings.model.embedding_size)
        self.tables = add_checkpoint(folder / "run", settings, self.log, 1)
        self.live, self.random = folder / "live", np.random.default_rng(0)
        self.live.mkdir()
        self.log.vocabulary.save(self.live / "vocabulary.json")
        self.values = {p.name: p.asnumpy().copy() for p in load(folder / "run", rows=16).model.get_parameters()
                       if not is_sparse(p.name)}
        self.versions, self.rows = Versions(self.live, 3), HostRows(self.tables, self.live)
        state = {"run": Checkpoint(folder / "run" / "checkpoints" / "step_00000001").state["run"]}
        self.versions.write_full([Values(name, value.copy()) for name, value in self.values.items()], state, 0, None,
                                 self.rows.stage(True, lambda: None))

    def publish(self) -> int:
        begin = int(self.random.integers(0, 256))
        ids = np.asarray(self.log.parts["train"].ids[begin:begin + 64])
        self.tables.fetch(self.tables.columns.keys(ids), train=True)
        self.tables.update([self.random.standard_normal(window.shape).astype(np.float32)
                            for window in self.tables.windows])
        self.tables.end_step()
        for value in self.values.values():
            value += self.random.normal(0, 0.002, value.shape).astype(value.dtype)
        return self.versions.write_delta(Delta(dense={name: value.copy() for name, value in self.values.items()}),
                                         self.rows.stage(False, lambda: None))


def test_every_answer_is_wholly_of_one_version_while_versions_come(tmp_path, updates=12, clients=8):
    writer = Writer(tmp_path)
    reference, _ = load_current(tmp_path / "live", 16)
    # A user who is known, one who is not.
    asks = [read_request(request_of(reference, user, [1, 2, 3, 10**9]), reference, 20) for user in (3, 5, 8, 10**9)]
    answers, deltas = answers_while_versions_come(tmp_path / "live", 16, SMALL, asks, writer.publish, clients, updates)
    expected = {1: scores(reference, asks)}
    for version, delta in sorted(deltas.items()):
        LiveModel(reference).put(merged([delta]))
        expected[version] = scores(reference, asks)
    for ask, found, version in answers:
        np.testing.assert_allclose(found[:, 0], expected[version][ask], rtol=0, atol=2e-6)
    steps = [np.abs(np.asarray(expected[version + 1]) - np.asarray(expected[version])).max(1)
             for version in range(1, updates + 1)]
    assert np.min(steps) > 1e-5, "versions could not be told apart"


def scores(trained, asks: list) -> list[np.ndarray]:
    """By the whole forward pass over rows read from the tables."""
    hosted = Hosted(trained.model, trained.model, trained.tables)
    return [1.0 / (1.0 + np.exp(-hosted(Tensor(ask.ids), Tensor(ask.numbers)).asnumpy()[:, 0].astype(np.float64)))
            for ask in asks]
