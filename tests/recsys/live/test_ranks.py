"""Versions of a run whose processes hold slices, by the user's command: what a server loads is the run's checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

from parallel.checkpoint.folder import list_checkpoints  # noqa: E402
from parallel.checkpoint.full import Checkpoint  # noqa: E402
from recsys.live.versions import read_current, read_delta  # noqa: E402
from recsys.serving.follow import live_folder, load_current  # noqa: E402
from tests.recsys.live.test_publish import SMALL  # noqa: E402

pytestmark = pytest.mark.usefixtures("graph_mode")


# Two processes are compiled and trained.
@pytest.mark.slow
@pytest.mark.parametrize("layout", [["parallel.op=2"],
                                    ["parallel.data=2", "parallel.op=2", "parallel.optimizer.shard=2"]])
def test_deltas_of_a_sharded_run_make_its_last_checkpoint(layout, tmp_path):
    nproc = 4 if len(layout) > 1 else 2
    words = ["parallel", "launch", "--config", str(tmp_path / "run.yaml"), "--nproc", str(nproc), *SMALL,
             f"data.cache={tmp_path / 'data'}", f"output.directory={tmp_path / 'run'}", "train.steps=6",
             "publish.full_every=4", "train.sparse_optimizer={name: adagrad, learning_rate: 0.1}", *layout]
    (tmp_path / "run.yaml").write_text("model: {name: dlrm_mlp}\n")
    ended = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-2000:]
    figures = json.loads(ended.stdout.splitlines()[-1])
    folder = live_folder(tmp_path / "run")
    current = read_current(folder)
    assert current.step == 6 and figures["version"] == current.version == figures["versions"] == 7
    assert len(current.chain) == 3
    trained, _ = load_current(folder, 64)
    last = Checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    own = {parameter.name: parameter.asnumpy() for parameter in trained.model.get_parameters()}
    assert set(own) == set(last.names("parameters.safetensors"))
    for name in own:
        assert np.array_equal(own[name], last.read(name)), name
    # A delta holds the rows that a batch of 16 named, not the tables.
    for _, path in current.chain[1:]:
        assert 0 < sum(len(rows) for rows, _ in read_delta(path).rows.values()) <= 3 * 16


# Two or four processes are compiled and trained.
@pytest.mark.slow
@pytest.mark.parametrize("layout", [["parallel.data=2"], ["parallel.data=2", "parallel.op=2"]])
def test_tables_that_lie_on_several_processes_are_published_together(layout, tmp_path):
    """Of MindSpore's processes, and of those on torch, whose dense weights lie in slices."""
    words = ["parallel", "launch", "--config", str(tmp_path / "run.yaml"), "--nproc", str(2 * len(layout)), *SMALL,
             f"data.cache={tmp_path / 'data'}", f"output.directory={tmp_path / 'run'}", "train.steps=6",
             "publish.full_every=4", "train.sparse_optimizer={name: adagrad, learning_rate: 0.1}", *layout,
             "data.tables={place: host, exchange_kb: 1}"]
    (tmp_path / "run.yaml").write_text("model: {name: dlrm_mlp}\n")
    ended = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-2000:]
    figures = json.loads(ended.stdout.splitlines()[-1])
    current = read_current(live_folder(tmp_path / "run"))
    assert current.step == 6 and figures["version"] == current.version == figures["versions"] == 7
    assert len(current.chain) == 3
    trained, _ = load_current(live_folder(tmp_path / "run"), 64)
    other = trained.tables.reread(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    held = 0
    for name, table in other.tables.items():
        entries, mine = table.entries(), trained.tables.tables[name]
        assert len(mine) == len(table)
        np.testing.assert_array_equal(mine.gather(mine.find(entries.keys)), entries.values, err_msg=name)
        held += len(entries)
    assert held > figures["table_rows"] > 0, "one process held everything"
    deltas = [read_delta(path).entries for _, path in current.chain[1:]]
    assert all(0 < sum(map(len, entries.values())) < held for entries in deltas)
