"""Delta after delta is the full export, by the user's command."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from parallel.checkpoint.folder import list_checkpoints
from parallel.checkpoint.full import Checkpoint
from parallel.common.command import main
from recsys.__main__ import VERBS
from recsys.live.versions import read_current, read_delta
from recsys.serving.follow import live_folder, load_current
from tests.recsys.data.streams.events import SMALL as STREAM
from tests.recsys.data.streams.events import clicks

pytestmark = pytest.mark.usefixtures("graph_mode")
FEATURES = ("[{name: user_id, side: user, values: integer, rows: 50}, {name: item_id, side: item, values: integer, "
            "rows: 40}, {name: price, type: numeric, side: item, boundaries: [-0.5, 0.5], width: 4}]")
SMALL = ["model.name=dlrm_mlp", "model.hidden=[8]", f"data.features={FEATURES}", "data.synthetic.samples=600",
         "data.synthetic.users=50", "data.synthetic.items=40", "train.global_batch_size=16",
         "output.tensorboard=false", "output.loss_curve=false", "train.peak_tflops=1", "publish.every_steps=1",
         "publish.full_every=100", "publish.keep=30"]


def train(folder, capsys, *more):
    words = ["train", *SMALL, f"data.cache={folder / 'data'}", f"output.directory={folder / 'run'}", *more]
    assert main("recsys", VERBS, words) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("more", [
    ["train.sparse_optimizer={name: adagrad, learning_rate: 0.1}"],
    pytest.param(["train.sparse_optimizer={name: adagrad, learning_rate: 0.1}", "data.tables.place=host"], id="host"),
    pytest.param(["train.sparse_optimizer={name: adagrad, learning_rate: 0.1}",
                  "data.tables={place: host, hot_rows: 20, hot_every: 2}"], marks=pytest.mark.slow, id="hot"),
    # Most ids have no row yet, and train that of the unseen value.
    pytest.param(["train.sparse_optimizer={name: adagrad, learning_rate: 0.1}", "data.tables.place=host",
                  "data.features=" + FEATURES.replace("integer, rows: 50", "dynamic, minimum_count: 6")], id="dynamic"),
    pytest.param(["train.optimizer.name=adam"], marks=pytest.mark.slow, id="adam"),
])
def test_delta_after_delta_is_the_full_export(tmp_path, capsys, more):
    figures = train(tmp_path, capsys, "train.steps=12", *more)
    folder = live_folder(tmp_path / "run")
    current = read_current(folder)
    assert current.step == 12 and figures["version"] == current.version and figures["versions"] > 2
    assert len(current.chain) > 1
    trained, _ = load_current(folder, 64)
    last = Checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    own = {parameter.name: parameter.asnumpy() for parameter in trained.model.get_parameters()}
    for name in last.names("parameters.safetensors"):
        assert np.array_equal(own[name], last.read(name)), name
    if trained.tables is not None:
        other = trained.tables.reread(last.path)
        for name, table in other.tables.items():
            entries = table.entries()
            mine = trained.tables.tables[name]
            assert np.array_equal(mine.gather(mine.find(entries.keys)), table.gather(table.find(entries.keys)))
            assert len(mine) == len(table) >= 5
    if trained.tables is None and "adagrad" in more[0]:
        # Rows that no batch named are not written again and again.
        deltas = [read_delta(path) for _, path in current.chain[1:]]
        rows = sum(len(rows) for delta in deltas for rows, _ in delta.rows.values())
        assert rows <= 3 * 16 * 12


def test_a_folder_that_cannot_be_written_ends_the_run_at_its_start(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["train", *SMALL, f"data.cache={tmp_path / 'data'}", f"output.directory={tmp_path / 'run'}",
             f"publish.directory={tmp_path / 'file'}", "train.steps=3"]
    assert main("recsys", VERBS, words) == 2
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    assert main("recsys", VERBS, [*words, "publish.every_seconds=3"]) == 2
    assert "no event time" in capsys.readouterr().err


def test_versions_come_by_the_time_of_events(tmp_path, capsys):
    """One event a second, 16 a step: 40 seconds are over after every third step."""
    log, folder = tmp_path / "log", tmp_path / "run"
    log.mkdir()
    parquet.write_table(pa.Table.from_pylist(clicks(16 * 20)), log / "day.parquet")
    assert main("recsys", VERBS, ["train", *STREAM, "data.reader=tail", f"data.path={log}", "train.steps=20",
                                  "data.stream.end_after_idle_seconds=0.4", f"output.directory={folder}",
                                  "publish={every_seconds: 40, full_every: 100, keep: 30}"]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["versions"] == 9
    deltas = [read_delta(path) for _, path in read_current(live_folder(folder)).chain[1:]]
    # The first version is of the start, when no event had come.
    assert [delta.step for delta in deltas] == [1, 4, 7, 10, 13, 16, 19, 20]
    assert [delta.event_time for delta in deltas] == [1000.0 + 16 * delta.step - 1 for delta in deltas]
