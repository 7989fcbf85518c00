"""Other features from an old checkpoint, pinned versions, and requests scored again."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor

from parallel.common.errors import UserError
from parallel.layers.parameter import initialize
from recsys.build import loss_network
from recsys.data.columns import features_of
from recsys.saved_model import load
from recsys.serving.engine import Engine
from recsys.serving.requests import read_request
from recsys.serving.settings import EngineSettings
from recsys.versions.pinned import Versions
from recsys.versions.request_log import RequestLog, compare
from recsys.versions.warm_start import warm_start
from tests.recsys.runs import add_checkpoint, body_of, make_run

SMALL = EngineSettings(requests=2, candidates=[8, 16], queue=64, timeout_seconds=60.0, cache_users=4)


def changed(features: list[dict], **by_name: dict | None) -> list[dict]:
    """The list with some features changed, or left out (None)."""
    return [{**feature, **(by_name.get(feature["name"]) or {})} for feature in features
            if by_name.get(feature["name"], {}) is not None]


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("config", ["dlrm_mlp", "tokenmixer_large"])
def test_added_features_leave_the_scores_as_they_were(config, tmp_path):
    make_run(tmp_path / "plain", config)
    whole = [f.model_dump(mode="json") for f in features_of(make_run(tmp_path / "all", config)[0].data)]
    before = changed(whole, author=None, city=None)
    assert len(before) == len(whole) - 2
    grown = [dict(f) for f in whole]
    for feature in grown:
        if feature["name"] == "item_id":
            feature["rows"] += 40
        if feature.get("target") == "item_id":
            feature["rows"] = None
    old_settings, old_log = make_run(tmp_path / "old", config, f"data.features={json.dumps(before)}")
    settings, log = make_run(tmp_path / "new", config, f"data.features={json.dumps(grown)}")
    groups = {f["group"] for f in before}
    assert groups == {f["group"] for f in grown}, "the test means features added to groups that were there"
    network = loss_network(settings, log.spec, 1)
    initialize(network.model, 3)
    counts = warm_start(network, log.spec, log.vocabulary, tmp_path / "old")
    assert counts["kept"] > 0 and counts["in_part"] > 0 and counts["anew"] == 0
    old = load(tmp_path / "old").model
    rows = slice(0, 64)
    scores = [model(Tensor(np.asarray(part.ids[rows])), Tensor(np.asarray(part.numbers[rows]))).asnumpy()
              for model, part in ((old, old_log.parts["train"]), (network.model, log.parts["train"]))]
    np.testing.assert_allclose(scores[1], scores[0], atol=2e-6)
    assert scores[0].std() > 1e-3


@pytest.mark.usefixtures("pynative")
def test_a_removed_feature_and_one_that_is_read_in_another_way(tmp_path):
    whole = [f.model_dump(mode="json") for f in features_of(make_run(tmp_path / "old", "dlrm_mlp")[0].data)]
    other = changed(whole, user_id={"values": "hash"})[:-1]
    settings, log = make_run(tmp_path / "new", "dlrm_mlp", f"data.features={json.dumps(other)}")
    network = loss_network(settings, log.spec, 1)
    initialize(network.model, 3)
    start = network.model.embedding.tables[0].table.asnumpy().copy()
    counts = warm_start(network, log.spec, log.vocabulary, tmp_path / "old")
    moved = network.model.embedding.tables[0].table.asnumpy()
    own = slice(log.spec.slots["user_id"].offset, log.spec.slots["user_id"].offset + log.spec.slots["user_id"].rows)
    np.testing.assert_array_equal(moved[own], start[own])
    assert np.abs(moved - start).max() > 0.1
    # The last feature is a history: its attention has four parameters.
    assert counts["dropped"] == 5 and counts["in_part"] == 2


def test_rows_on_the_host_are_kept_by_id(tmp_path):
    from recsys.tables.host import HostTables
    from recsys.versions.warm_start import _Move
    from tests.recsys.tables.test_serving import add_checkpoint as add_hosted

    _, plain = _settings("dlrm_mlp")
    from tests.recsys.tables.test_host import _dynamic

    words = [*_dynamic(plain), "data.tables.place=host", f"output.directory={tmp_path / 'old'}",
             f"data.cache={tmp_path / 'data'}"]
    log, settings = _settings("dlrm_mlp", *words)
    tables = add_hosted(tmp_path / "old", settings, log, 1)
    fresh = HostTables(settings, log.spec, 64)
    found = dict(_Move(_described(tmp_path / "old"), log.spec, log.vocabulary).host_tables(fresh))
    assert set(found.values()) == {"kept"} and found["table user_id"] == "kept"
    keys = tables.tables["item_id"].entries().keys
    np.testing.assert_array_equal(fresh.tables["item_id"].gather(fresh.tables["item_id"].find(keys)),
                                  tables.tables["item_id"].gather(tables.tables["item_id"].find(keys)))


def test_rows_on_the_host_go_to_the_processes_that_own_their_keys(tmp_path):
    """Of two, together all that the old run had, and no row twice."""
    from recsys.tables.host import HostTables
    from recsys.tables.keys import owners
    from recsys.versions.warm_start import _Move
    from tests.recsys.tables.test_serving import add_checkpoint as add_hosted

    words = ["data.tables.place=host", f"output.directory={tmp_path / 'old'}", f"data.cache={tmp_path / 'data'}"]
    log, settings = _settings("dlrm_mlp", *words)
    tables = add_hosted(tmp_path / "old", settings, log, 1)
    processes = [HostTables(settings, log.spec, 64, SimpleNamespace(rank=rank, ranks=2)) for rank in range(2)]
    for process in processes:
        told = _Move(_described(tmp_path / "old"), log.spec, log.vocabulary).host_tables(process)
        assert {what for _, what in told} == {"kept"}
    for name, table in tables.tables.items():
        held = [process.tables[name].entries().keys for process in processes]
        assert all((owners(keys, 2) == rank).all() for rank, keys in enumerate(held)), name
        assert sorted(np.concatenate(held).tolist()) == sorted(table.entries().keys.tolist()), name


def _described(folder):
    from recsys.saved_model import describe

    return describe(folder)


def _settings(config, *words):
    from parallel.task import load_run
    from recsys.data.log import prepare
    from tests.recsys.runs import DATA

    _, settings = load_run(f"configs/recsys/{config}.yaml", [*DATA, *words])
    return (prepare(settings.data, settings.model.embedding_size) if words else None), settings


@pytest.fixture(scope="module")
def three(tmp_path_factory, graph_mode):
    """An engine on a run with three checkpoints."""
    folder = tmp_path_factory.mktemp("versions") / "run"
    settings, log = make_run(folder, "dlrm_mlp", seeds=(1, 2, 3))
    engine = Engine(load(folder), SMALL)
    engine.start()
    yield engine, folder, settings, log
    engine.stop()


def test_a_server_is_pinned_and_goes_back(three):
    engine, folder, settings, log = three
    versions = Versions(engine, folder)
    rows = [np.asarray(part[:5]) for part in (log.parts["train"].ids, log.parts["train"].numbers)]
    newest = engine.score(*rows)
    assert versions.state() == {"versions": ["step_00000001", "step_00000002", "step_00000003"],
                                "current": "step_00000003", "pinned": None, "version": 1}
    assert versions.rollback()["current"] == "step_00000002"
    second = engine.score(*rows)
    assert np.abs(second - newest).max() > 1e-4
    with pytest.raises(UserError, match="pinned"):
        engine.reload(folder)
    np.testing.assert_array_equal(engine.score(*rows), second)
    assert versions.rollback()["pinned"] == "step_00000001"
    with pytest.raises(UserError, match="no version before"):
        versions.rollback()
    with pytest.raises(UserError, match="step_00000001, step_00000002"):
        versions.pin("../step_00000003")
    versions.pin("step_00000002")
    np.testing.assert_array_equal(engine.score(*rows), second)
    versions.release()
    engine.reload(folder)
    np.testing.assert_array_equal(engine.score(*rows), newest)


def test_logged_requests_are_scored_alike(three, tmp_path):
    from recsys.evaluation.evaluate import run

    engine, folder, settings, log = three
    path = tmp_path / "requests.jsonl"
    kept = RequestLog(path, 1 << 20)
    for seed in range(4):
        body = body_of(engine.trained, log, seed, 3 + seed)
        ask = read_request(body, engine.trained, 100)
        kept.add(json.dumps(body).encode(), engine.trained, engine.score(ask.ids, ask.numbers))
    kept.close()
    figures = run(settings, SimpleNamespace(requests=str(path), checkpoint=None))
    assert figures["requests"] == 4 and figures["candidates"] == 18 and figures["differing"] == 0
    assert figures["max_score_difference"] < 1e-6
    other = compare(path, str(folder / "checkpoints" / "step_00000001"))
    assert other["differing"] == 4
    path.write_text(path.read_text() + "[]\n")
    with pytest.raises(UserError, match="line 5"):
        compare(path, None)


def test_a_full_request_log_stops(three, tmp_path):
    engine = three[0]
    kept = RequestLog(tmp_path / "requests.jsonl", 400)
    for _ in range(9):
        kept.add(b'{"user": {}, "candidates": [{}]}', engine.trained, np.zeros((1, 1)))
    kept.close()
    assert kept.full and (tmp_path / "requests.jsonl").stat().st_size <= 400


def test_start_from_in_a_run(tmp_path, graph_mode):
    """`train.start_from` is used by a run without checkpoints of its own, and its table names what changed."""
    from recsys.training.fit import start_values

    settings, log = make_run(tmp_path / "old", "dlrm_mlp")
    other = settings.model_copy(deep=True)
    other.output.directory, other.train.start_from = str(tmp_path / "new"), str(tmp_path / "old")
    network = loss_network(other, log.spec, 1)
    start_values(other, network, log)
    old = load(tmp_path / "old").model
    for one, same in zip(network.model.get_parameters(), old.get_parameters(), strict=True):
        np.testing.assert_array_equal(one.asnumpy(), same.asnumpy())
    add_checkpoint(tmp_path / "new", other, log, 1, 5)
    start_values(other, network, log)
    assert any((one.asnumpy() != same.asnumpy()).any() for one, same in
               zip(network.model.get_parameters(), old.get_parameters(), strict=True)), "its own checkpoint comes first"


# Two runs of two processes: compiled once each.
@pytest.mark.slow
def test_a_sharded_run_starts_from_a_checkpoint_of_other_features(tmp_path):
    """Its first losses are those of one process that starts from the same checkpoint: every slice was moved."""
    pytest.importorskip("torch")
    features = ("[{name: user_id, side: user, values: integer, rows: 50}, {name: item_id, side: item, values: integer, "
                "rows: 40}%s]")
    small = ["model.hidden=[8]", "data.synthetic.samples=600", "data.synthetic.users=50", "data.synthetic.items=40",
             "train.global_batch_size=16", "output.tensorboard=false", "output.loss_curve=false", "train.log_every=1",
             "train.peak_tflops=1", f"data.cache={tmp_path / 'data'}"]
    (tmp_path / "run.yaml").write_text("model: {name: dlrm_mlp}\n")

    def train(name, *more, launcher=()):
        words = [*(launcher or ("recsys", "train")), "--config", str(tmp_path / "run.yaml"), *small,
                 f"output.directory={tmp_path / name}", "train.steps=4", *more]
        ended = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, ended.stderr[-2000:]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry], ended.stderr

    train("old", "data.features=" + features % "")
    new = ["data.features=" + features % ", {name: hour, side: context, values: integer, rows: 24}",
           f"train.start_from={tmp_path / 'old'}"]
    wanted, _ = train("one", *new)
    found, told = train("two", *new, "parallel.op=2", launcher=("parallel", "launch", "--nproc", "2"))
    assert "what became of it" in told
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
