"""AutoInt: self-attention over the feature fields (arXiv 1810.11921)."""

from __future__ import annotations

from typing import Literal

from mindspore import Tensor, nn
from mindspore import dtype as mstype
from pydantic import Field

from recsys.data.features import FeatureSpec
from recsys.layers.interactions import AddRelu, Attend, Heads, InteractionRanker, PositionLinear
from recsys.settings import RankerSettings


class AutoIntSettings(RankerSettings):
    """Sizes of the attention."""

    name: Literal["autoint"] = "autoint"
    """Which ranker."""
    layers: int = Field(3, ge=1, le=10_000)
    """Interacting layers."""
    heads: int = Field(2, ge=1)
    """Attention heads."""
    head_width: int = Field(16, ge=1)
    """Width of a head."""
    hidden: list[int] = Field(default_factory=lambda: [128, 64])
    """Deep network on the flattened fields (AutoInt+ has it beside; here it is stacked); empty = none."""


class InteractingLayer(nn.Cell):
    """relu(attention(x) + W_res x), scores not scaled (eq. 5-8)."""

    def __init__(self, fields: int, inputs: int, heads: int, head_width: int, compute_dtype: mstype) -> None:
        super().__init__()
        width = heads * head_width
        self.query, self.key, self.value, self.shortcut = (
            PositionLinear(inputs, width, fields, compute_dtype, bias=False) for _ in range(4))
        self.heads, self.attend, self.add = Heads(heads), Attend(1.0), AddRelu(3, True)
        self.flops_per_sample = 2 * fields * (4 * inputs * width + 2 * fields * width)

    def construct(self, x_BFI: Tensor) -> Tensor:
        mixed = self.attend(self.heads(self.query(x_BFI)), self.heads(self.key(x_BFI)), self.heads(self.value(x_BFI)))
        return self.add(self.heads(mixed, True), self.shortcut(x_BFI))


class AutoInt(InteractionRanker):
    """hidden = MLP(flatten(interacting layers(fields)))."""

    def __init__(self, settings: AutoIntSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        width = settings.heads * settings.head_width
        inputs = [self.fields.width] + [width] * (settings.layers - 1)
        layers = [InteractingLayer(self.fields.count, size, settings.heads, settings.head_width, compute_dtype)
                  for size in inputs]
        self.make_stack(layers, self.fields.count * width, settings.hidden)


SETTINGS, MODEL = AutoIntSettings, AutoInt
