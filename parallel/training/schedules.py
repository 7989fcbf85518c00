"""Learning rate as a function of the step, computed inside the graph so that a device can run many steps alone."""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import Tensor, nn, ops

from parallel.training.settings import OptimizerSettings


class LearningRate(nn.Cell):
    """Linear warm-up, then cosine, linear or constant, at a step counted from 0.

    `rate(step) = peak * step / warmup` for step < warmup, else with `x = min(step, decay_steps) / decay_steps`:
    cosine `end + (peak - end) (1 + cos(pi x)) / 2`, linear `end + (peak - end) (1 - x)`. The decay is read at the
    global step, not at step - warmup: the rule of the released PanGu-alpha code. `step` 0 gives a rate of 0 when there
    is a warm-up.

    Args:
        settings: the optimizer's settings (learning_rate and schedule).
        steps: steps of the run, the default end of the decay.
    """

    def __init__(self, settings: OptimizerSettings, steps: int) -> None:
        super().__init__()
        schedule = settings.schedule
        self.shape = schedule.name
        self.warmup_steps = schedule.warmup_steps
        self.peak = settings.learning_rate
        self.end = schedule.end_learning_rate
        self.inverse_decay = 1.0 / (schedule.decay_steps or steps)
        self.one = Tensor(1.0, ms.float32)

    def construct(self, step: Tensor) -> Tensor:
        """Learning rate at `step` (scalar int32 tensor): scalar float32 tensor."""
        step = ops.cast(step, ms.float32)
        passed = ops.minimum(step * self.inverse_decay, self.one)
        if self.shape == "cosine":
            rate = self.end + (0.5 * (self.peak - self.end)) * (1.0 + ops.cos(passed * math.pi))
        elif self.shape == "linear":
            rate = self.end + (self.peak - self.end) * (1.0 - passed)
        else:
            rate = passed * 0.0 + self.peak
        if self.warmup_steps:
            rising = step * (self.peak / self.warmup_steps)
            rate = ops.select(step < self.warmup_steps, rising, rate)
        return rate
