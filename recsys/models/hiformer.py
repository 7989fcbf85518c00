"""HiFormer: attention over fields with composite (heterogeneous) projections (arXiv 2311.05884).

Shapes: F fields, W field width, T tokens, D width. Fields are the semantic groups, each projected to one token.
"""

from __future__ import annotations

from typing import Literal

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from pydantic import Field, model_validator

from parallel.common.errors import UserError
from parallel.layers.grouped import WIDTH_LAYOUT, Add, GroupedFeedForward
from parallel.layers.norm import LayerNorm
from parallel.sharding.layout import Layer, OpSharding
from recsys.data.features import FeatureSpec
from recsys.layers.embedding import group_widths
from recsys.layers.interactions import Attend, Heads
from recsys.layers.tokenization import GroupTokenizer, MeanPool
from recsys.ranker import Ranker, dense
from recsys.settings import RankerSettings


class HiFormerSettings(RankerSettings):
    """Sizes of the stack."""

    name: Literal["hiformer"] = "hiformer"
    """Which ranker."""
    width: int = Field(32, ge=1)
    """D."""
    heads: int = Field(4, ge=1)
    """Attention heads; must divide D."""
    layers: int = Field(2, ge=1, le=10_000)
    """Layers."""
    ffn_ratio: float = Field(2.0, gt=0.0)
    """Inner width of the per-field feed-forward networks over D."""
    rank: int | None = Field(64, ge=1)
    """Rank of the composite projections; null = full."""

    @model_validator(mode="after")
    def _check(self) -> HiFormerSettings:
        if self.width % self.heads:
            raise UserError(f"heads must divide width {self.width}", where="model.heads", value=self.heads)
        return self


class Composite(nn.Cell):
    """[y_1 .. y_T] = [x_1 .. x_T] W: each token's projection sees all tokens (eq. 7), optionally of low rank."""

    def __init__(self, tokens: int, width: int, rank: int | None, compute_dtype: mstype) -> None:
        super().__init__()
        total = tokens * width
        self.low = rank is not None
        self.down = dense(total, rank, compute_dtype, bias=False) if self.low else None
        self.up = dense(rank or total, total, compute_dtype, bias=False)
        self.tokens, self.width, self.reshape = tokens, width, ops.Reshape()

    def construct(self, x_BE: Tensor) -> Tensor:
        inner = self.down(x_BE) if self.low else x_BE
        return self.reshape(self.up(inner), (-1, self.tokens, self.width))


class Turn(Layer):
    """[T, B, D] to [B, T, D], or back (the same exchange)."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.transpose, self.batch_first = ops.Transpose(), batch_first

    def construct(self, x: Tensor) -> Tensor:
        return self.transpose(x, (1, 0, 2))

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.transpose, (("batch", None, None) if self.batch_first else (None, "batch", None),))]


class HiFormerLayer(nn.Cell):
    """X = LN(X + attention(X)); X = LN(X + FFN_t(X))."""

    def __init__(self, tokens: int, settings: HiFormerSettings, compute_dtype: mstype) -> None:
        super().__init__()
        width = settings.width
        self.total = tokens * width
        self.query, self.key, self.value = (Composite(tokens, width, settings.rank, compute_dtype) for _ in range(3))
        self.heads, self.attend = Heads(settings.heads), Attend((width // settings.heads) ** -0.5)
        self.pairs = Pairs(4 * tokens * tokens * width)
        self.turn, self.back, self.reshape = Turn(False), Turn(True), ops.Reshape()
        self.norm1, self.norm2 = (LayerNorm(width, stream=WIDTH_LAYOUT.stream) for _ in range(2))
        self.add1, self.add2 = Add(WIDTH_LAYOUT.stream), Add(WIDTH_LAYOUT.stream)
        self.network = GroupedFeedForward(tokens, width, round(settings.ffn_ratio * width),
                                          compute_dtype=compute_dtype)

    def construct(self, x_TBD: Tensor) -> Tensor:
        x_BE = self.reshape(self.turn(x_TBD), (-1, self.total))
        mixed = self.attend(self.heads(self.query(x_BE)), self.heads(self.key(x_BE)), self.heads(self.value(x_BE)))
        x_TBD = self.norm1(self.add1(x_TBD, self.back(self.heads(mixed, True))))
        return self.norm2(self.add2(x_TBD, self.network(x_TBD)))


class Pairs(nn.Cell):
    """Stands for the FLOPs of scores and mixing, which have no weights."""

    def __init__(self, flops: int) -> None:
        super().__init__()
        self.flops_per_sample = flops


class HiFormer(Ranker):
    """Tokens of the semantic groups, layers, mean over the tokens."""

    def __init__(self, settings: HiFormerSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        widths = list(group_widths(spec).values())
        self.tokenize = GroupTokenizer(widths, [1] * len(widths), settings.width, global_token=False,
                                       compute_dtype=compute_dtype)
        self.layers = nn.CellList([HiFormerLayer(len(widths), settings, compute_dtype)
                                   for _ in range(settings.layers)])
        self.pool = MeanPool(WIDTH_LAYOUT)
        self.make_head(settings.width)

    def represent(self, groups: tuple, sequences: tuple) -> tuple:
        x_TBD = self.tokenize(*groups)
        for layer in self.layers:
            x_TBD = layer(x_TBD)
        return self.pool(x_TBD), (), ()

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]]:
        return [[self.embedding, self.drop, self.tokenize], *self.layers, [self.pool, self.head]]


SETTINGS, MODEL = HiFormerSettings, HiFormer
