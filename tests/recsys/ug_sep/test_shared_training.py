"""`train.share_users` by the user's command: the run of every sample by itself, its users computed once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from parallel.checkpoint.folder import list_checkpoints
from parallel.checkpoint.full import Checkpoint
from parallel.common.command import main
from parallel.training.metrics_log import read_metrics
from recsys.__main__ import VERBS
from recsys.live.versions import read_current
from recsys.serving.follow import live_folder, load_current
from recsys.ug_sep import user_aggregation

pytestmark = pytest.mark.usefixtures("graph_mode")
STEPS = 6
SMALL = ["--config", "configs/recsys/rankmixer_ug_sep.yaml", "data.synthetic.samples=800", "data.synthetic.users=20",
         "data.synthetic.items=30", "data.together=8", "model.layers=1", "model.width=16", "train.global_batch_size=64",
         f"train.steps={STEPS}", f"train.validate_every={STEPS}", "train.log_every=1", "train.keep_best=null",
         "train.optimizer.learning_rate=0.01", "train.sparse_optimizer={name: adagrad, learning_rate: 0.1}",
         "output.tensorboard=false", "output.loss_curve=false", "train.peak_tflops=1"]


def trained(folder, capsys, *more: str) -> dict:
    words = [*SMALL, f"data.cache={folder.parent / 'data'}", f"output.directory={folder}", *more]
    assert main("recsys", VERBS, ["train", *words]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def losses_of(folder) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


def test_a_run_with_shared_users_is_the_run_without(tmp_path, capsys, monkeypatch):
    rows, share = [], user_aggregation.share
    monkeypatch.setattr(user_aggregation, "share", lambda *of: (rows.append(share(*of)), rows[-1])[1])
    plain = trained(tmp_path / "plain", capsys)
    assert not rows
    # Published as well: a delta has the rows of both sides.
    shared = trained(tmp_path / "shared", capsys, "train.share_users=true", "publish.every_steps=2",
                     "publish.full_every=100")
    assert len(rows) >= STEPS and max(len(batch[4]) for batch in rows) <= 32, "no batch had users to share"
    np.testing.assert_allclose(losses_of(tmp_path / "shared"), losses_of(tmp_path / "plain"), rtol=2e-5)
    for name in ("auc", "logloss", "validation_auc"):
        assert shared[name] == pytest.approx(plain[name], abs=1e-4)
    one, other = (Checkpoint(list_checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("plain", "shared"))
    for name in one.names("parameters.safetensors"):
        np.testing.assert_allclose(other.read(name), one.read(name), atol=2e-4, err_msg=name)
    folder = live_folder(tmp_path / "shared")
    assert read_current(folder).step == STEPS and len(read_current(folder).chain) > 1
    served, _ = load_current(folder, 64)
    for parameter in served.model.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), other.read(parameter.name), err_msg=parameter.name)
