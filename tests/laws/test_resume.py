"""A run that is stopped and goes on equals the uninterrupted run bit for bit."""

import numpy as np
import pytest

from parallel.training.metrics_log import read_metrics
from parallel.training.mindspore_backend import MindSporeBackend
from parallel.training.settings import LossScaleSettings, OutputSettings
from parallel.training.trainer import Run, Trainer
from tests.parallel.toy import Batches, make_step, settings, values

BROKEN = (2, 6)


def train(folder, stop_at=None):
    """12 steps with dropout, fp16-style loss scale, two broken batches; stopped at `stop_at` as by a signal."""
    chosen = settings(accumulation=2, log_every=3, validate_every=4, seed=5,
                      loss_scale=LossScaleSettings(name="dynamic", initial=2.0**8, window=2))
    output = OutputSettings(directory=str(folder), checkpoint_every=100, tensorboard=False, loss_curve=False)
    step = make_step(chosen, dropout=0.3)
    trainer = Trainer(MindSporeBackend(step), Run(Batches(broken=BROKEN), chosen, output, validation=Batches(seed=3)))

    def stop(step, scalars):
        if step == stop_at:
            trainer.stop.ask("SIGTERM")

    trainer.on_step = stop
    return trainer.run(), values(step)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, *train(folder)


@pytest.mark.parametrize("stops", [pytest.param((5,), id="within a log window", marks=pytest.mark.slow),
                                   pytest.param((3, 7), id="twice, after a skipped step")])
def test_resumed_equals_uninterrupted(uninterrupted, tmp_path, stops):
    folder, figures, expected = uninterrupted
    for stop_at in stops:
        stopped, _ = train(tmp_path, stop_at)
        assert stopped["stopped"] == "SIGTERM" and stopped["steps"] == stop_at
    resumed, got = train(tmp_path)
    assert resumed["steps"] == 12
    for name, value in expected.items():
        assert np.array_equal(got[name], value), name
    assert expected["step"] == 10 and expected["loss_scale"] > 2.0**8
    for name in ("loss", "validation_loss"):
        assert resumed[name] == figures[name]
    timed = ("tokens_per_second", "mfu")
    logs = [[{k: v for k, v in r.items() if k not in timed} for r in read_metrics(f / "metrics.jsonl")]
            for f in (folder, tmp_path)]
    assert logs[0] == logs[1]
    for name in ("parameters.safetensors", "optimizer.safetensors"):
        paths = [f / "checkpoints" / "step_00000012" / name for f in (folder, tmp_path)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
