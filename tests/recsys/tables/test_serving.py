"""Tables on the host behind the scoring engine: the score of a request is that of the same rows in the log, whatever
the ids; a reload takes other rows."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from parallel.checkpoint.full import save_checkpoint
from parallel.layers.parameter import initialize
from parallel.task import load_run
from recsys.build import loss_network
from recsys.data.columns import columns_of
from recsys.data.encode import Encoder
from recsys.data.log import prepare
from recsys.data.readers import reader
from recsys.saved_model import load
from recsys.serving.engine import Engine
from recsys.serving.requests import read_request
from recsys.serving.settings import EngineSettings
from recsys.tables.host import HostTables
from recsys.tables.step import dense_parameters
from tests.recsys.runs import DATA
from tests.recsys.tables.test_host import _dynamic

SMALL = EngineSettings(requests=2, candidates=[8, 16], queue=64, timeout_seconds=60.0, cache_users=4)
HOSTILE = [-1, 2**63 + 5, -(2**70), "x" * 10_000, "7", 7, "007", "", None, "名", "\x00"]


def add_checkpoint(folder, settings, log, step: int) -> HostTables:
    """A run's checkpoint of start values, scaled up, after its tables have met the training rows."""
    tables = HostTables(settings, log.spec, 64)
    for begin in range(0, 256, 64):
        tables.fetch(tables.columns.keys(np.asarray(log.parts["train"].ids[begin:begin + 64])), train=True)
        tables.update([np.random.default_rng(step).standard_normal(window.shape).astype(np.float32)
                       for window in tables.windows])
        tables.end_step()
    network = loss_network(settings, tables.window, len(log.labels))
    initialize(network.model, step)
    tables.before_checkpoint(folder / "checkpoints", step)
    save_checkpoint(folder / "checkpoints", step, dense_parameters(network), (),
                    {"run": settings.model_dump(mode="json")}, add_files=tables.add_files)
    log.vocabulary.save(folder / "vocabulary.json")
    return tables


@pytest.fixture(scope="module", params=["dlrm_mlp", pytest.param("rankmixer_ug_sep", marks=pytest.mark.slow)])
def served(request, tmp_path_factory, graph_mode):
    folder = tmp_path_factory.mktemp("hosted") / "run"
    _, plain = load_run(f"configs/recsys/{request.param}.yaml", DATA)
    _, settings = load_run(f"configs/recsys/{request.param}.yaml", [
        *DATA, *_dynamic(plain), "data.tables.place=host", "train.sparse_optimizer.name=rowwise_adagrad",
        "train.sparse_optimizer.learning_rate=0.5", f"output.directory={folder}",
        f"data.cache={folder.parent / 'data'}"])
    log = prepare(settings.data, settings.model.embedding_size)
    add_checkpoint(folder, settings, log, 1)
    engine = Engine(load(folder, rows=16), SMALL)
    engine.start()
    yield engine, settings, log, folder
    engine.stop()


def scores_of_log(folder, settings, spec, encoded) -> np.ndarray:
    """As `evaluate` scores rows."""
    from parallel.checkpoint.folder import resolve_checkpoint
    from recsys.evaluation.log_metrics import Evaluation
    from recsys.ranker import Scores
    from recsys.tables.loaded import load_hosted

    model, scores = load_hosted(settings, spec, encoded.labels.shape[1], resolve_checkpoint(folder), 16, Scores)
    found = Evaluation(model, encoded, ["click"], 16, scores=scores).predictions()
    return np.concatenate([probabilities for _, probabilities, _ in found])


def request_of(trained, user_id, items: list) -> dict:
    """One user and candidates whose ids are given; the other features are missing."""
    user = {f.source: None for f in trained.features if f.side != "item"}
    others = {f.source: None for f in trained.features if f.side == "item"}
    name = next(f.source for f in trained.features if f.is_dynamic and f.side == "user")
    item = next(f.source for f in trained.features if f.is_dynamic and f.side == "item")
    user[name] = user_id
    return {"user": user, "candidates": [{**others, item: value} for value in items]}


def test_hostile_ids_are_scored_as_in_the_log(served):
    engine, settings, log, folder = served
    trained = engine.trained
    for user in HOSTILE:
        body = request_of(trained, user, HOSTILE)
        ask = read_request(json.loads(json.dumps(body)), trained, 100)
        columns = {f.source: [row.get(f.source, body["user"].get(f.source)) for row in body["candidates"]]
                   for f in trained.features}
        table = pa.table({name: _as_in_a_file(values) for name, values in columns.items()}
                         | {label: pa.array([0] * len(HOSTILE)) for label in log.labels})
        source = columns_of(settings.data, reader(settings.data.reader))
        source.user = None
        encoder = Encoder(trained.features, source, "error")
        encoded, _ = encoder.encode(table, trained.spec, trained.vocabulary, "log", 0)
        np.testing.assert_array_equal(ask.ids, encoded.ids)
    scores = engine.score(ask.ids, ask.numbers)
    np.testing.assert_allclose(scores, scores_of_log(folder, settings, trained.spec, encoded), atol=1e-6)


def _as_in_a_file(values: list) -> pa.Array:
    """A column of text, as CSV files have it."""
    if any(isinstance(value, list) for value in values):
        return pa.array(values, pa.list_(pa.string()))
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def test_rows_of_the_log_and_a_reload(served):
    engine, settings, log, folder = served
    rows = log.parts["train"].take(np.arange(12))
    # Rows of one user, as in a request.
    user = [column for f in engine.trained.features if f.side != "item" and f.name in log.spec.slots
            for column in range(log.spec.slots[f.name].start, log.spec.slots[f.name].start
                                + log.spec.slots[f.name].length)]
    rows.ids[:, user] = rows.ids[:1, user]
    values = [slot.column for slot in log.spec.numeric.values() if slot.feature.side != "item"]
    rows.numbers[:, values] = rows.numbers[:1, values]
    before = engine.score(rows.ids, rows.numbers)
    np.testing.assert_allclose(before, scores_of_log(folder, settings, log.spec, rows), atol=1e-6)
    entries = {name: len(table) for name, table in engine.trained.tables.tables.items()}
    add_checkpoint(folder, settings, log, 2)
    engine.reload(folder)
    after = engine.score(rows.ids, rows.numbers)
    np.testing.assert_allclose(after, scores_of_log(folder, settings, log.spec, rows), atol=1e-6)
    assert np.abs(after - before).max() > 1e-4
    assert {name: len(table) for name, table in engine.trained.tables.tables.items()} == entries
