"""Which rule moves the rows of a table on the host, with which numbers at which step. Needs no MindSpore."""

from __future__ import annotations

import math

from parallel.common.errors import UserError
from parallel.training.settings import OptimizerSettings
from recsys.settings import RankerTrain
from recsys.tables.dynamic import RULES, Rule

_MEANT = {"adam": "lazy_adam", "adamw": "lazy_adam"}


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """`parallel.training.schedules.LearningRate` outside of a graph, in float64.

    Args:
        settings: of one optimizer.
        step: from 0.
        steps: of the run.
    """
    schedule, peak = settings.schedule, settings.learning_rate
    end = schedule.end_learning_rate
    passed = min(step / (schedule.decay_steps or steps), 1.0)
    if step < schedule.warmup_steps:
        return step * peak / schedule.warmup_steps
    if schedule.name == "cosine":
        return end + 0.5 * (peak - end) * (1.0 + math.cos(math.pi * passed))
    return end + (peak - end) * (1.0 - passed) if schedule.name == "linear" else peak


class TableOptimizer:
    """The rule of every step.

    Args:
        train: the `train:` block; `sparse_optimizer`, or else `optimizer`, is meant.

    Raises:
        UserError: the optimizer has no form that touches only the rows of a step.
    """

    def __init__(self, train: RankerTrain) -> None:
        self.settings, self.steps = train.sparse_optimizer or train.optimizer, train.steps
        self.name = _MEANT.get(self.settings.name, self.settings.name)
        if self.name not in RULES:
            raise UserError("has no form that touches only the rows of a step", where="train.sparse_optimizer.name",
                            value=self.settings.name, hint=f"choose one of {', '.join(sorted(RULES))}")
        if self.settings.weight_decay:
            raise UserError("rows on the host are not decayed", where="train.sparse_optimizer.weight_decay",
                            value=self.settings.weight_decay, hint="set it to 0")

    @property
    def state_start(self) -> float:
        """What the states of a row start from."""
        return self.settings.initial_accumulator if "adagrad" in self.name else 0.0

    def rule(self, step: int) -> Rule:
        """Of a step, counted from 0 (without those that were skipped)."""
        own, (beta1, beta2) = self.settings, self.settings.betas
        corrections = (1.0 - beta1 ** (step + 1), 1.0 - beta2 ** (step + 1)) if own.bias_correction else (1.0, 1.0)
        return Rule(self.name, learning_rate(own, step, self.steps), own.epsilon, beta1, beta2, *corrections)
