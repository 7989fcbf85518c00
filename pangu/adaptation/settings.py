"""What a model is adapted to, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from parallel.common.settings import Settings

Target = Literal["query", "key", "value", "output", "mapping", "projection"]


class LowRankSettings(Settings):
    """Low-rank adapters (LoRA, arXiv 2106.09685)."""

    rank: int = Field(8, ge=1, le=1024)
    """Rank of the change of every adapted matrix."""
    alpha: float = Field(16.0, gt=0.0, lt=1e6)
    """Strength: the change is multiplied by alpha / rank."""
    targets: list[Target] = Field(["query", "value"], min_length=1)
    """Which matrices of every layer are adapted: those of attention (query, key, value, output) and of the
    feed-forward network (mapping, projection). The paper adapts query and value."""


class AdaptSettings(Settings):
    """Training on pairs of prompt and answer, from a trained model; the loss is that of the answers alone."""

    checkpoint: str
    """The trained model: a checkpoint, or the folder of a run (its newest)."""
    pairs: str
    """jsonl with `prompt` and `answer` on every line; plain or .xz .gz .zst."""
    validation: str | None = None
    """Pairs to validate on; null = none."""
    low_rank: LowRankSettings | None = None
    """Train adapters beside frozen weights; null = train all weights."""
