"""Factors of penalties that hold a budget: moved by a step as a whole, whatever it was split into.

A layer gives such a parameter the gradient "share in use - budget", which micro-batches, ranks and stages average as
they do every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops


def holds_budget(parameter: Parameter) -> bool:
    """Whether a parameter is such a factor; its attribute `budget_step` is then by what it moves."""
    return getattr(parameter, "budget_step", None) is not None


def replicas_in_norm(parameters: Sequence[Parameter]) -> list[float]:
    """How often each gradient counts in the global norm, inverted (`GlobalNorm`): a factor's, which is none, never."""
    return [math.inf if holds_budget(parameter) else 1 for parameter in parameters]


class BudgetFactors(nn.Cell):
    """Multiplies every factor by its step where its gradient is above 0, else divides it (ReMoE, arXiv 2412.14711)."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(list(parameters))
        self.steps = tuple(float(parameter.budget_step) for parameter in parameters)
        self.map = ops.HyperMap()

    def construct(self, gradients: tuple, rate: Tensor, step: Tensor, finite: Tensor | None = None) -> Tensor:
        """Moves the factors; see `Adam.construct`."""
        return ops.depend(step, self.map(ops.partial(moved_factor, finite), self.parameters, gradients, self.steps))


def moved_factor(finite: Tensor | None, factor: Parameter, gradient: Tensor, by: float) -> Tensor:
    """One factor's update."""
    value = ops.select(gradient > 0.0, factor * by, factor / by)
    if finite is not None:
        value = ops.select(finite, value, factor * 1.0)
    return ops.assign(factor, value)
