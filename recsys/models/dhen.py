"""DHEN: layers that are ensembles of interaction modules (arXiv 2203.11014).

Shapes: B batch, F fields, W field width.
"""

from __future__ import annotations

from typing import Literal

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from pydantic import Field

from parallel.common.errors import UserError
from recsys.data.features import FeatureSpec
from recsys.layers.interactions import (
    AddRelu,
    Attend,
    Cross,
    CubeNorm,
    FieldLinear,
    Flat,
    Heads,
    InteractionRanker,
    PositionLinear,
)
from recsys.ranker import MLP
from recsys.settings import RankerSettings


class DHENSettings(RankerSettings):
    """Sizes of the stack."""

    name: Literal["dhen"] = "dhen"
    """Which ranker."""
    layers: int = Field(2, ge=1, le=10_000)
    """Ensemble layers."""
    modules: list[Literal["cross", "attention", "linear", "deep"]] = Field(
        default_factory=lambda: ["cross", "attention", "linear"], min_length=1)
    """Interaction modules of each layer; their outputs are added."""
    fields: int = Field(8, ge=1)
    """Fields that each layer makes."""
    heads: int = Field(2, ge=1)
    """Heads of the module attention; must divide the embedding size."""
    rank: int = Field(32, ge=1)
    """Rank of the module cross."""
    hidden: int = Field(128, ge=1)
    """Inner width of the module deep."""
    top: list[int] = Field(default_factory=lambda: [128, 64])
    """Deep network on the flattened last layer."""


class CrossModule(nn.Cell):
    """A cross of the flattened fields with themselves, then compression to the layer's fields."""

    def __init__(self, fields: int, width: int, settings: DHENSettings, compute_dtype: mstype) -> None:
        super().__init__()
        self.flat, self.cross = Flat(fields * width), Cross(fields * width, settings.rank, compute_dtype)
        self.compress = FieldLinear(fields, settings.fields, width, compute_dtype)
        self.reshape, self.shape = ops.Reshape(), (-1, fields, width)

    def construct(self, x_BFW: Tensor) -> Tensor:
        flat_BE = self.flat(x_BFW)
        return self.compress(self.reshape(self.cross(flat_BE, flat_BE), self.shape))


class AttentionModule(nn.Cell):
    """Self-attention over the fields, then compression."""

    def __init__(self, fields: int, width: int, settings: DHENSettings, compute_dtype: mstype) -> None:
        super().__init__()
        self.query, self.key, self.value = (PositionLinear(width, width, fields, compute_dtype, bias=False)
                                            for _ in range(3))
        self.heads, self.attend = Heads(settings.heads), Attend((width // settings.heads) ** -0.5)
        self.compress = FieldLinear(fields, settings.fields, width)
        self.flops_per_sample = (6 * fields * width * width + 4 * fields * fields * width
                                 + self.compress.flops_per_sample)

    def construct(self, x_BFW: Tensor) -> Tensor:
        mixed = self.attend(self.heads(self.query(x_BFW)), self.heads(self.key(x_BFW)), self.heads(self.value(x_BFW)))
        return self.compress(self.heads(mixed, True))


class LinearModule(nn.Cell):
    """New fields as weighted sums of the old ones."""

    def __init__(self, fields: int, width: int, settings: DHENSettings, compute_dtype: mstype) -> None:
        super().__init__()
        self.compress = FieldLinear(fields, settings.fields, width)

    def construct(self, x_BFW: Tensor) -> Tensor:
        return self.compress(x_BFW)


class DeepModule(nn.Cell):
    """An MLP of the flattened fields."""

    def __init__(self, fields: int, width: int, settings: DHENSettings, compute_dtype: mstype) -> None:
        super().__init__()
        self.flat = Flat(fields * width)
        self.network = MLP([fields * width, settings.hidden, settings.fields * width], compute_dtype, final_relu=False)
        self.reshape, self.shape = ops.Reshape(), (-1, settings.fields, width)

    def construct(self, x_BFW: Tensor) -> Tensor:
        return self.reshape(self.network(self.flat(x_BFW)), self.shape)


MODULES = {"cross": CrossModule, "attention": AttentionModule, "linear": LinearModule, "deep": DeepModule}


class EnsembleLayer(nn.Cell):
    """LN(sum of the modules + shortcut) (eq. 2-3; the paper leaves open how outputs are joined: here they are
    added)."""

    def __init__(self, fields: int, width: int, settings: DHENSettings, compute_dtype: mstype) -> None:
        super().__init__()
        self.members = nn.CellList([MODULES[name](fields, width, settings, compute_dtype)
                                    for name in settings.modules])
        self.adds = nn.CellList([AddRelu(3) for _ in settings.modules])
        self.shortcut = FieldLinear(fields, settings.fields, width) if fields != settings.fields else None
        self.norm = CubeNorm(width)

    def construct(self, x_BFW: Tensor) -> Tensor:
        total = x_BFW if self.shortcut is None else self.shortcut(x_BFW)
        for index in range(len(self.members)):
            total = self.adds[index](total, self.members[index](x_BFW))
        return self.norm(total)


class DHEN(InteractionRanker):
    """hidden = MLP(flatten(ensemble layers(fields)))."""

    def __init__(self, settings: DHENSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        counts = [self.fields.count] + [settings.fields] * (settings.layers - 1)
        if self.fields.width % settings.heads:
            raise UserError(f"heads must divide the embedding size {self.fields.width}", where="model.heads",
                            value=settings.heads)
        self.make_stack([EnsembleLayer(count, self.fields.width, settings, compute_dtype) for count in counts],
                        settings.fields * self.fields.width, settings.top)


SETTINGS, MODEL = DHENSettings, DHEN
