"""What goes along with a run sees batches before their steps, its state returns with a checkpoint; a stream ends."""

import itertools

import pytest

from parallel.common.errors import UserError
from parallel.training.companions import Companion
from parallel.training.data_source import WaitingSource
from parallel.training.mindspore_backend import MindSporeBackend
from parallel.training.settings import OutputSettings
from parallel.training.trainer import Run, Trainer
from tests.parallel.toy import Batches, make_step, settings


class Tally(Companion):
    """Counts batches; its state is the count."""

    name = "tally"

    def __init__(self) -> None:
        self.count, self.order, self.saved = 0, [], []

    def before_step(self, step, batch):
        self.count += 1
        self.order.append(("before", step, len(batch)))

    def after_step(self, step, outputs):
        self.order.append(("after", step))

    def after_checkpoint(self, step):
        self.saved.append(step)

    def state(self, step):
        return {"count": self.count}

    def restore(self, state):
        self.count = state["count"]


class Ending(Batches, WaitingSource):
    """A stream of five batches."""

    ends, read_ahead = True, True

    def interrupt(self):
        """Waits for nothing."""

    def batches(self, start_step):
        return itertools.islice(super().batches(start_step), max(0, 5 - start_step))


def run(folder, steps, companion, source, **train):
    train = settings(steps=steps, **train)
    output = OutputSettings(directory=str(folder), checkpoint_every=2, tensorboard=False)
    return Trainer(MindSporeBackend(make_step(train)), Run(source, train, output, companions=[companion])).run()


def test_a_companion_goes_along_and_its_state_returns(tmp_path):
    first, second = Tally(), Tally()
    run(tmp_path, 3, first, Batches())
    assert first.order[:3] == [("before", 0, 3), ("after", 1), ("before", 1, 3)] and first.saved == [2, 3]
    figures = run(tmp_path, 12, second, Ending())
    assert second.count == 5 and second.order[0][:2] == ("before", 3)
    assert figures["steps"] == 5 and figures["stopped"] == "end of data"
    assert figures["checkpoint"].endswith("step_00000005")


def test_one_that_sees_every_batch_is_refused_where_the_device_takes_them_by_itself(tmp_path):
    with pytest.raises(UserError, match="train.data_sink: tally sees every batch"):
        run(tmp_path, 2, Tally(), Batches(), data_sink=True)


def test_a_damaged_state_is_one_line(tmp_path):
    run(tmp_path, 2, Tally(), Batches())

    class Other(Tally):
        def restore(self, state):
            self.count = state["missing"]

    with pytest.raises(UserError, match="state of 'tally'"):
        run(tmp_path, 4, Other(), Batches())
