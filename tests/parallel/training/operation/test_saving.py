"""Checkpoints in the background: training goes on meanwhile, what is saved is the state of their step, one is under way
at a time, a stop waits, a failure ends the run. The phases of many ranks: tests/parallel/torch_runtime."""

import errno
import os
import signal
import threading

import pytest

from parallel.checkpoint import writing
from parallel.checkpoint.folder import list_checkpoints
from parallel.checkpoint.sharded import Slices
from parallel.common.errors import UserError
from parallel.training.mindspore_backend import MindSporeBackend
from parallel.training.settings import OutputSettings
from parallel.training.trainer import Run, Trainer
from tests.parallel.torch_runtime.launches import assert_same_tensors as same
from tests.parallel.toy import Batches, make_step, settings


def trainer(folder, on_step=None, background=True, companions=(), **output):
    train = settings()
    output = OutputSettings(**{"directory": str(folder), "checkpoint_every": 4, "tensorboard": False, "keep": 5,
                               "loss_curve": False, "save_in_background": background, **output})
    return Trainer(MindSporeBackend(make_step(train)), Run(Batches(), train, output, on_step=on_step,
                                                           companions=companions))


class Gate:
    """Holds the writing of tensors up until it is opened."""

    def __init__(self, monkeypatch) -> None:
        self.open, self.at, self.call = threading.Event(), [], writing.write_safetensors
        monkeypatch.setattr(writing, "write_safetensors", self.write)

    def write(self, path, *rest):
        self.at.append(path.parent.name)
        assert self.open.wait(60.0)
        return self.call(path, *rest)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    trainer(folder, background=False).run()
    return folder


def test_training_goes_on_and_the_state_is_that_of_its_step(straight, tmp_path, monkeypatch):
    gate, seen = Gate(monkeypatch), []

    def on_step(step, _):
        seen.append((step, len(list_checkpoints(tmp_path / "checkpoints"))))
        if step == 7:
            gate.open.set()

    figures = trainer(tmp_path, on_step).run()
    assert [there for step, there in seen if step <= 7] == [0] * 7, "four steps were made while it was written"
    assert figures["checkpoint"].endswith("step_00000012")
    for step in (4, 8, 12):
        name = f"checkpoints/step_{step:08d}"
        same(Slices(tmp_path / name), Slices(straight / name))


def test_one_is_under_way_at_a_time_and_a_stop_waits_for_it(straight, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)

    def on_step(step, _):
        if step == 8:
            assert len(gate.at) == 1, "the next has not begun"
            gate.open.set()
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    figures = trainer(tmp_path, on_step).run()
    assert figures["stopped"] == "SIGTERM" and figures["checkpoint"].endswith("step_00000010")
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == [
        "step_00000004", "step_00000008", "step_00000010"]
    assert sorted(os.listdir(tmp_path / "checkpoints"))[0] == "step_00000004", "nothing half-made beside them"
    assert trainer(tmp_path).run()["steps"] == 12
    same(Slices(tmp_path / "checkpoints/step_00000012"), Slices(straight / "checkpoints/step_00000012"))


def test_a_failure_ends_the_run_and_leaves_what_was_there(tmp_path, monkeypatch):
    call = writing.write_safetensors

    def full(path, *rest):
        if "step_00000008" in path.parent.name:
            raise OSError(errno.ENOSPC, "full", str(path))
        return call(path, *rest)

    monkeypatch.setattr(writing, "write_safetensors", full)
    with pytest.raises(UserError, match="no space left"):
        trainer(tmp_path).run()
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000004"]


def test_companions_that_cannot_wait_are_refused(tmp_path):
    from tests.parallel.training.test_companions import Tally

    with pytest.raises(UserError, match="'tally' of this run needs each checkpoint at once"):
        trainer(tmp_path, companions=[Tally()])
