"""What each process of test_data_parallel runs: the toy network on its rows of every batch, for 6 steps."""

import sys
from pathlib import Path

import numpy as np

from parallel.training.data_source import DataSource
from parallel.training.device import start_device
from parallel.training.mindspore_backend import MindSporeBackend
from parallel.training.settings import LossScaleSettings, OutputSettings
from parallel.training.trainer import Run, Trainer
from tests.parallel.toy import Batches, make_step, settings, values

BROKEN_STEP = 3


class Rows(DataSource):
    """A rank's rows of the global batches."""

    def __init__(self, source: Batches, rank: int, ranks: int) -> None:
        self.source, self.rank, self.ranks = source, rank, ranks
        self.columns, self.steps_per_epoch = source.columns, source.steps_per_epoch

    def batches(self, start_step):
        for batch in self.source.batches(start_step):
            yield tuple(np.array_split(part, self.ranks)[self.rank] for part in batch)


def main(folder: Path) -> None:
    """Trains and saves the five scalars of every step and all values as `rank_<r>.npz`."""
    processes = start_device()
    chosen = settings(steps=6, accumulation=2, loss_scale=LossScaleSettings(name="dynamic", initial=256.0, window=2))
    step = make_step(chosen, dropout=0.3, group=processes.group, rank=processes.rank, ranks=processes.ranks)
    rows = [Rows(Batches(rows=16, seed=s, broken=broken), processes.rank, processes.ranks)
            for s, broken in ((0, (BROKEN_STEP,)), (1, ()))]
    seen = []
    output = OutputSettings(directory=str(folder / "run"), tensorboard=False, loss_curve=False)
    trainer = Trainer(MindSporeBackend(step), Run(rows[0], chosen, output, validation=rows[1],
                                                  on_step=lambda _, message: seen.append(list(message.values()))))
    figures = trainer.run()
    np.savez(folder / f"rank_{processes.rank}.npz", seen=np.array(seen, np.float64),
             validation=figures["validation_loss"], **{f"value.{k}": v for k, v in values(step).items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
