"""Rankers on real rows beside the checkout."""

from pathlib import Path

import pytest

from parallel.common.settings import load_settings
from recsys.data.log import prepare
from recsys.settings import DataSettings, Run

CTR = Path("../shared/data/ctr")
pytestmark = [pytest.mark.shared_data, pytest.mark.skipif(not CTR.is_dir(), reason="../shared/data/ctr is absent")]


def test_movielens_100k_is_split_by_time(tmp_path):
    log = prepare(DataSettings(reader="movielens", path=str(CTR / "ml-100k"), cache=str(tmp_path)), 16)
    assert [len(part) for part in log.parts.values()] == [80000, 10000, 10000]
    assert abs(float(log.parts["train"].labels.mean()) - 0.55) < 0.01
    assert len(log.vocabulary.values["user_id"]) == 751


def test_criteo_rows_are_read(tmp_path):
    log = prepare(DataSettings(reader="criteo", path=str(CTR / "criteo" / "criteo_sample.csv"), cache=str(tmp_path)), 8)
    assert sum(len(part) for part in log.parts.values()) == 200
    assert log.report["missing"]["I1"] == 90 and len(log.spec.slots) == 39


@pytest.mark.slow
@pytest.mark.parametrize("model", ["rankmixer", "tokenmixer_large"])
def test_movielens_auc(model, tmp_path):
    """Peers in torch on the same split: LR 0.676, FM 0.696."""
    from recsys.train import run

    path = f"configs/recsys/{model}.yaml"
    words = ["data.reader=movielens", f"data.path={CTR / 'ml-100k'}", f"data.cache={tmp_path}", "train.steps=320",
             "model.dropout=0.2", "train.optimizer.learning_rate=0.001", "train.validate_every=80",
             f"output.directory={tmp_path / 'run'}"]
    assert run(load_settings(Run.for_file(path, words), path, words))["auc"] > 0.696
