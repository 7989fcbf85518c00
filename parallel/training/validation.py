"""The loss on held-out batches, on any backend."""

from __future__ import annotations

import itertools
import math

from parallel.training.backend import Backend
from parallel.training.data_source import DataSource


class Validation:
    """Mean loss over a validation source and its exponential, the perplexity. Callable as `evaluate(step) -> dict`.

    Args:
        backend: whose network is validated (with dropout off).
        source: this process's rows of batches of the training shape.
        batches: how many to use; None = steps_per_epoch.
    """

    def __init__(self, backend: Backend, source: DataSource, batches: int | None = None) -> None:
        self.backend, self.source = backend, source
        self.count = min(batches or source.steps_per_epoch, source.steps_per_epoch)

    def __call__(self, step: int) -> dict[str, float]:
        """{"validation_loss", "validation_perplexity"}, the same on all ranks."""
        total = weight = 0.0
        for batch in itertools.islice(self.source.batches(0), self.count):
            part, part_weight = self.backend.loss(batch)
            total, weight = total + part, weight + part_weight
        return perplexity(*self.backend.exchange([total, weight]))


def perplexity(total: float, weight: float) -> dict[str, float]:
    """Mean of a loss that was summed by weight, and its exponential; too large for a float, it is infinite."""
    loss = total / weight if weight else math.nan
    return {"validation_loss": loss, "validation_perplexity": math.exp(loss) if loss < 700.0 else math.inf}
