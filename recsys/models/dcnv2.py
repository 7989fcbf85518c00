"""DCN-V2: explicit crosses beside a deep network (arXiv 2008.13535)."""

from __future__ import annotations

from typing import Literal

from mindspore import dtype as mstype
from mindspore import nn
from pydantic import Field

from recsys.data.features import FeatureSpec
from recsys.layers.embedding import Join, group_widths
from recsys.layers.interactions import Cross
from recsys.ranker import MLP, Ranker
from recsys.settings import RankerSettings


class DCNv2Settings(RankerSettings):
    """Sizes of both parts."""

    name: Literal["dcnv2"] = "dcnv2"
    """Which ranker."""
    crosses: int = Field(3, ge=1, le=10_000)
    """Cross layers."""
    rank: int | None = Field(None, ge=1)
    """Rank of the crosses' matrices; null = full."""
    hidden: list[int] = Field(default_factory=lambda: [256, 128])
    """Widths of the deep network."""
    structure: Literal["parallel", "stacked"] = "parallel"
    """parallel: crosses and deep network side by side; stacked: the deep network on the crosses."""


class DCNv2(Ranker):
    """hidden = [cross(x), MLP(x)] or MLP(cross(x))."""

    def __init__(self, settings: DCNv2Settings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        widths = list(group_widths(spec).values())
        total = sum(widths)
        self.join, self.both = Join(len(widths)), Join(2)
        self.crosses = nn.CellList([Cross(total, settings.rank, compute_dtype) for _ in range(settings.crosses)])
        self.network = MLP([total, *settings.hidden], compute_dtype)
        self.parallel = settings.structure == "parallel"
        self.make_head(settings.hidden[-1] + (total if self.parallel else 0))

    def represent(self, groups: tuple, sequences: tuple) -> tuple:
        x0_BE = self.join(*groups)
        x_BE = x0_BE
        for cross in self.crosses:
            x_BE = cross(x0_BE, x_BE)
        if self.parallel:
            return self.both(x_BE, self.network(x0_BE)), (), ()
        return self.network(x_BE), (), ()


SETTINGS, MODEL = DCNv2Settings, DCNv2
