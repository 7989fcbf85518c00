"""DLRM-MLP: all features side by side through one deep network; the papers' baseline."""

from __future__ import annotations

from typing import Literal

from mindspore import dtype as mstype
from pydantic import Field

from recsys.data.features import FeatureSpec
from recsys.layers.embedding import Join, group_widths
from recsys.ranker import MLP, Ranker
from recsys.settings import RankerSettings


class DLRMMLPSettings(RankerSettings):
    """Sizes of the network."""

    name: Literal["dlrm_mlp"] = "dlrm_mlp"
    """Which ranker."""
    hidden: list[int] = Field(default_factory=lambda: [256, 128, 64])
    """Widths of the layers, ReLU after each."""


class DLRMMLP(Ranker):
    """hidden = MLP(concat of the groups)."""

    def __init__(self, settings: DLRMMLPSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        widths = list(group_widths(spec).values())
        self.join = Join(len(widths))
        self.network = MLP([sum(widths), *settings.hidden], compute_dtype)
        self.make_head(settings.hidden[-1] if settings.hidden else sum(widths))

    def represent(self, groups: tuple, sequences: tuple) -> tuple:
        return self.network(self.join(*groups)), (), ()


SETTINGS, MODEL = DLRMMLPSettings, DLRMMLP
