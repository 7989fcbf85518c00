"""A two-layer perceptron with dropout and a source of its batches, small enough to compile in a second."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from parallel.layers.dropout import Dropout, DropoutKeys
from parallel.training.data_source import DataSource, sample_numbers
from parallel.training.optimizers.run import Optimizer
from parallel.training.settings import LossScaleSettings, OptimizerSettings, ScheduleSettings, TrainSettings
from parallel.training.step import TrainStep

INPUTS, WIDTH, OUTPUTS = 6, 10, 3


class Perceptron(nn.Cell):
    """tanh(x W1 + b1) W2, mean squared error over rows whose mask is 1; returns (loss, weight)."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.weight1 = Parameter(Tensor(0.5 * rng.standard_normal((INPUTS, WIDTH)).astype(np.float32)), name="weight1")
        self.bias1 = Parameter(Tensor(0.1 * rng.standard_normal(WIDTH).astype(np.float32)), name="bias1")
        self.weight2 = Parameter(Tensor(0.5 * rng.standard_normal((WIDTH, OUTPUTS)).astype(np.float32)), name="weight2")
        self.dropout, self.keys = Dropout(dropout), DropoutKeys()

    def construct(self, x, y, mask, rows_B=None):
        keys = self.keys(rows_B, 1) if rows_B is not None else None
        hidden = self.dropout(ops.tanh(ops.matmul(x, self.weight1) + self.bias1), keys)
        error = ops.reduce_sum(ops.square(ops.matmul(hidden, self.weight2) - y), -1)
        weight = ops.reduce_sum(mask)
        return ops.reduce_sum(error * mask) / ops.maximum(weight, Tensor(1.0)), weight


class Batches(DataSource):
    """Batch i is a function of (seed, i); batches whose number is in `broken` hold a NaN."""

    columns = ("x", "y", "mask")

    def __init__(self, rows: int = 8, steps_per_epoch: int = 5, seed: int = 0, broken: tuple[int, ...] = ()) -> None:
        self.rows, self.steps_per_epoch, self.seed, self.broken = rows, steps_per_epoch, seed, broken
        self.read = 0

    def batches(self, start_step: int):
        index = start_step
        while True:
            yield self.batch(index)
            self.read += 1
            index += 1

    def batch(self, index: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng((self.seed, index))
        x = rng.standard_normal((self.rows, INPUTS)).astype(np.float32)
        if index in self.broken:
            x[0, 0] = np.nan
        y = np.tanh(x[:, :OUTPUTS] - x[:, OUTPUTS:])
        return x, y.astype(np.float32), (rng.random(self.rows) < 0.7).astype(np.float32)


def settings(**changes) -> TrainSettings:
    """Short-run settings: AdamW at 0.02 without warm-up."""
    optimizer = OptimizerSettings(learning_rate=0.02, schedule=ScheduleSettings(warmup_steps=0))
    return TrainSettings(**{"optimizer": optimizer, "steps": 12, "log_every": 2, "validate_every": None, **changes})


def make_step(train: TrainSettings, dropout: float = 0.0, **options) -> TrainStep:
    """Network, optimizer and step from the same start values every time."""
    network = Perceptron(dropout)
    return TrainStep(network, Optimizer(network.trainable_params(), train.optimizer, train.steps), train, weighted=True,
                     **options)


def run(step: TrainStep, batches) -> list[list[float]]:
    """The five scalars of each step, fed as the trainer does."""
    if step.numbered:
        batches = [(*batch, sample_numbers(i, len(batch[0]))) for i, batch in enumerate(batches)]
    return [[value.asnumpy().item() for value in step(*map(Tensor, batch))] for batch in batches]


def values(step: TrainStep) -> dict[str, np.ndarray]:
    """Everything that the step holds, by name."""
    return {parameter.name: parameter.asnumpy().copy() for parameter in step.get_parameters()}


DYNAMIC = LossScaleSettings(name="dynamic", initial=2.0**10, window=3)
