"""Wukong: stacked factorization machines and linear compression of the fields (arXiv 2403.02545)."""

from __future__ import annotations

from typing import Literal

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from pydantic import Field

from parallel.layers.norm import LayerNorm
from parallel.layers.parameter import parameter
from parallel.sharding.layout import Layer, OpSharding
from recsys.data.features import FeatureSpec
from recsys.layers.embedding import Join
from recsys.layers.interactions import CUBE, AddRelu, CubeNorm, FieldLinear, Flat, InteractionRanker
from recsys.ranker import MLP
from recsys.settings import RankerSettings


class WukongSettings(RankerSettings):
    """Sizes of the stack."""

    name: Literal["wukong"] = "wukong"
    """Which ranker."""
    layers: int = Field(2, ge=1, le=10_000)
    """Wukong layers."""
    machine_fields: int = Field(8, ge=1)
    """Fields that the factorization-machine block of a layer makes (n_F)."""
    linear_fields: int = Field(8, ge=1)
    """Fields that the linear compression block makes (n_L)."""
    rank: int = Field(8, ge=1)
    """k: the products are X X^T Y with Y of k columns."""
    hidden: list[int] = Field(default_factory=lambda: [128])
    """Widths inside the factorization-machine block's network."""
    top: list[int] = Field(default_factory=lambda: [128, 64])
    """Deep network on the flattened last layer."""


class Products(Layer):
    """X (X^T Y) [B, F, k]: the optimised factorization machine (section 3.4), Y learned."""

    def __init__(self, fields: int, width: int, rank: int) -> None:
        super().__init__()
        self.y = parameter((1, fields, rank), "normal", fields**-0.5)
        self.inner, self.outer = ops.BatchMatMul(transpose_a=True), ops.BatchMatMul()
        self.tile, self.rank = ops.Tile(), rank
        self.flops_per_sample = 4 * fields * width * rank

    def construct(self, x_BFW: Tensor) -> Tensor:
        y_BFk = self.tile(self.y, (x_BFW.shape[0], 1, 1))
        return self.outer(x_BFW, self.inner(x_BFW, y_BFk))

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.inner, (CUBE, CUBE)), OpSharding(self.outer, (CUBE, CUBE))]


class WukongLayer(nn.Cell):
    """LN([MLP(LN(flatten FM(x))), LCB(x)] + shortcut(x)) (eq. 1-5)."""

    def __init__(self, fields: int, width: int, settings: WukongSettings, compute_dtype: mstype) -> None:
        super().__init__()
        made = settings.machine_fields
        self.products = Products(fields, width, settings.rank)
        self.flat = Flat(fields * settings.rank)
        self.norm = LayerNorm(self.flat.size, stream=("batch", None))
        self.network = MLP([self.flat.size, *settings.hidden, made * width], compute_dtype, final_relu=False)
        self.compress = FieldLinear(fields, settings.linear_fields, width)
        self.fields = made + settings.linear_fields
        self.shortcut = FieldLinear(fields, self.fields, width) if self.fields != fields else None
        self.join, self.add, self.last_norm = Join(2, 3), AddRelu(3), CubeNorm(width)
        self.reshape, self.made, self.width = ops.Reshape(), made, width

    def construct(self, x_BFW: Tensor) -> Tensor:
        machine = self.network(self.norm(self.flat(self.products(x_BFW))))
        both = self.join(self.reshape(machine, (-1, self.made, self.width)), self.compress(x_BFW))
        kept = x_BFW if self.shortcut is None else self.shortcut(x_BFW)
        return self.last_norm(self.add(both, kept))


class Wukong(InteractionRanker):
    """hidden = MLP(flatten(Wukong layers(fields)))."""

    def __init__(self, settings: WukongSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        layers, count = [], self.fields.count
        for _ in range(settings.layers):
            layers.append(WukongLayer(count, self.fields.width, settings, compute_dtype))
            count = layers[-1].fields
        self.make_stack(layers, count * self.fields.width, settings.top)


SETTINGS, MODEL = WukongSettings, Wukong
