"""Dynamic ids learnt from a stream: ids get rows and lose them by the time of events; a stopped run goes on bit for
bit."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from parallel.common.command import main
from recsys.__main__ import VERBS
from recsys.data.features import Feature, assign_columns, expand
from recsys.tables.files import read_entries, table_files
from recsys.tables.host import HostTables
from tests.recsys.data.streams.events import SMALL, clicks
from tests.recsys.tables.test_host import settings_of

pytestmark = pytest.mark.usefixtures("graph_mode")
FEATURES = ("[{name: user_id, side: user, values: dynamic, expire_after: 100, expire_unit: seconds},"
            "{name: item_id, side: item, values: dynamic, minimum_count: 2},"
            "{name: tags, type: multi, side: item, values: hash, rows: 32, length: 4},"
            "{name: price, type: numeric, side: item, boundaries: [0.2, 0.5, 0.8]}]")


def run(folder, log, capsys, steps: int) -> dict:
    words = ["train", *SMALL, f"data.features={FEATURES}", "data.reader=tail", f"data.path={log}",
             "data.tables={place: host, sweep_every: 4}", "train.sparse_optimizer.name=rowwise_adagrad",
             "data.stream.end_after_idle_seconds=0.4", f"output.directory={folder}", f"train.steps={steps}"]
    assert main("recsys", VERBS, words) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_a_stream_of_dynamic_ids(tmp_path, capsys):
    log = tmp_path / "log"
    log.mkdir()
    parquet.write_table(pa.Table.from_pylist(clicks(16 * 20)), log / "day.parquet")
    uninterrupted = run(tmp_path / "straight", log, capsys, 20)
    run(tmp_path / "stopped", log, capsys, 10)
    resumed = run(tmp_path / "stopped", log, capsys, 20)
    assert resumed["auc"] == uninterrupted["auc"] and uninterrupted["auc"] > 0.5
    folders = [tmp_path / name / "checkpoints" / "step_00000020" for name in ("straight", "stopped")]
    for path in sorted(folders[0].rglob("*.safetensors")):
        assert (folders[1] / path.relative_to(folders[0])).read_bytes() == path.read_bytes(), path.name
    entries = read_entries(table_files(folders[0])["user_id"][0])
    # One event a second: of 320 seconds the users of the last 100 are there, by the clock of the events.
    times = entries.seen[entries.keys >= 0]
    assert len(times) > 20 and times.max() == 1000 + 16 * 20 - 1 and times.min() >= 1000 + 320 - 100 - 16 * 5


def test_a_sweep_goes_by_the_time_of_its_step():
    """The next batch of a stream may not have come when a sweep is due."""
    spec = assign_columns(expand([Feature(name="user", side="user", values="dynamic", expire_after=10,
                                          expire_unit="seconds")]), 16)
    tables, times = HostTables(settings_of(sweep_every=2), spec, 8), {}
    tables.clock = lambda: times.get(tables.steps + 1) or 1.0
    held = []
    for step in (1, 2, 3, 4):
        times[step] = 100.0 * step
        tables.fetch(tables.columns.keys(np.full((8, 1), step)), train=True)
        tables.end_step()
        held.append(sorted(key for key in tables.tables["user"].entries().keys.tolist() if key >= 0))
    assert held == [[1], [2], [2, 3], [4]]
