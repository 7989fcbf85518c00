"""Settings of `train-classifier`."""

from __future__ import annotations

import pydantic

from parallel.common.settings import Settings


class TrainClassifierSettings(Settings):
    """Logistic regression on hashed character n-grams."""

    buckets: int = pydantic.Field(1 << 18, ge=16, le=1 << 24)
    """Number of hashed features."""
    longest: int = pydantic.Field(2, ge=1, le=5)
    """n-grams of 1 to this many characters."""
    regularization: float = pydantic.Field(1e-4, ge=0)
    """Weight of half the squared length of the weights, against the mean loss."""
    iterations: int = pydantic.Field(200, ge=1)
    """Most steps of L-BFGS."""
    held_out: float = pydantic.Field(0.2, gt=0, lt=1)
    """Share of the documents of either class kept for the report."""
    balance: bool = True
    """Give both classes the same total weight."""
    seed: int = 1
    """Decides which documents are held out."""
