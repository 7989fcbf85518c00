"""RankMixer: parameter-free token mixing and per-token feed-forward networks (arXiv 2507.15551).

Shapes: T tokens, B batch, D width, F = k D, E experts.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mindspore import Tensor, nn
from mindspore import dtype as mstype
from pydantic import Field, model_validator

from parallel.common.errors import UserError
from parallel.common.settings import Settings
from parallel.layers.experts.relu_moe import ReluMoE
from parallel.layers.grouped import Add, GroupedFeedForward, TokenLayout
from parallel.layers.norm import LayerNorm
from parallel.sharding.config import ParallelConfig
from recsys.data.features import FeatureSpec
from recsys.layers.embedding import group_widths
from recsys.layers.mixing import TokenMixing
from recsys.layers.tokenization import GroupTokenizer, MeanPool, SliceTokenizer, tokens_of_groups
from recsys.ranker import Ranker, check_token_axes
from recsys.settings import RankerSettings
from recsys.ug_sep.sides import UGSepSettings


class ReluMoESettings(Settings):
    """Experts chosen by ReLU gates, with dense training and sparse inference (eq. 10-11)."""

    experts: int = Field(4, ge=2, le=10_000)
    """Experts of each token; together they are as wide as the dense network."""
    router: Literal["dtsi", "single_relu"] = "dtsi"
    """dtsi: two routers, h_train and h_infer; training takes the mean of both gates, so both get the task's gradient
    (how they enter the forward pass is not in the paper; the mean was chosen here), inference takes h_infer alone.
    single_relu: one router for both, as ReMoE."""
    budget: float = Field(0.5, gt=0.0, le=1.0)
    """Share of experts that should be active; the penalty's factor moves until it is so."""
    penalty: float = Field(1e-8, gt=0.0)
    """First factor of the penalty on gates (ReMoE: 1e-8)."""
    penalty_step: float = Field(1.2, gt=1.0)
    """The factor is multiplied by this at every step above the budget and divided by it below (ReMoE: 1.2)."""
    dispatch: Literal["dense", "dropless"] = "dense"
    """On devices. dense: all experts for all rows; dropless: trains the same way, and where it is used sorts the pairs
    of a row and an expert and multiplies the open ones alone, in static shapes (Ascend 910B and later). The CPU
    multiplies just the open ones in any case."""


class RankMixerSettings(RankerSettings):
    """Sizes and choices of RankMixer."""

    name: Literal["rankmixer"] = "rankmixer"
    """Which ranker."""
    tokens: int = Field(8, ge=1)
    """T; with tokenization groups it must be what the groups make."""
    width: int = Field(64, ge=1)
    """D; T must divide it, since there is one mixing head for each token."""
    layers: int = Field(2, ge=1, le=10_000)
    """L blocks."""
    ffn_ratio: float = Field(4.0, gt=0.0)
    """k: the inner width of the per-token networks is k D (the paper does not say; 4 is the usual)."""
    tokenization: Literal["slices", "groups"] = "slices"
    """slices: eq. 2, equal slices of the concatenation; groups: a token (or more) for each semantic group."""
    group_tokens: dict[str, int] = Field(default_factory=dict)
    """tokenization groups: tokens that a group makes; 1 where a group is not named."""
    shared_projection: bool = False
    """slices: one projection for all tokens."""
    moe: ReluMoESettings | None = None
    """Sparse mixture of experts in place of the per-token networks; null = dense."""
    mixing: bool = True
    """Ablation (paper Table 2): false leaves token mixing out."""
    residual: bool = True
    """Ablation: false leaves the skip connections out."""
    norm: bool = True
    """Ablation: false leaves layer norm out."""
    op_sharding: Literal["width", "tokens", "tokens_naive"] = "width"
    """What tensor parallelism shards: inner widths, or tokens (Token Parallel), or tokens only inside the networks."""
    ug_sep: UGSepSettings | None = None
    """User and candidate tokens separated, so that a request's user is computed once; null = unseparated."""

    separable: ClassVar[bool] = True

    def keep_all_rows(self, dropless: bool = False) -> None:
        """See `RankerSettings`."""
        if self.moe is not None and not dropless:
            self.moe.dispatch = "dense"

    @property
    def inner(self) -> int:
        """F, rounded to a whole number."""
        return round(self.ffn_ratio * self.width)

    @model_validator(mode="after")
    def _tokens_divide_width(self) -> RankMixerSettings:
        if self.width % self.tokens:
            raise UserError(f"tokens must divide width {self.width}", where="model.tokens", value=self.tokens)
        return self


def network(settings: RankMixerSettings, tokens: int, inputs: int, inner: int, outputs: int, layout: TokenLayout,
            compute_dtype: mstype) -> nn.Cell:
    """A per-token network from `inputs` to `outputs`: dense, or ReLU-routed experts."""
    moe = settings.moe
    if moe is None:
        return GroupedFeedForward(tokens, inputs, inner, layout=layout, outputs=outputs, compute_dtype=compute_dtype)
    return ReluMoE(tokens, inputs, inner, experts=moe.experts, router=moe.router, budget=moe.budget,
                   penalty=moe.penalty, penalty_step=moe.penalty_step, layout=layout, outputs=outputs,
                   dispatch=moe.dispatch, compute_dtype=compute_dtype)


def check_gates(moe: ReluMoESettings | None, parallel: ParallelConfig) -> None:
    """Raises a `UserError` where gates have a penalty that would have to go from stage to stage."""
    if moe is not None and parallel.pipeline.stages > 1:
        raise UserError("the penalty of the experts' gates does not go from stage to stage", where="model.moe",
                        value=f"{moe.experts} experts", hint="set it to null, or train without stages")


class RankMixerBlock(nn.Cell):
    """S = LN(TokenMixing(X) + X); X' = LN(PFFN(S) + S), norm after the residual (eq. 1)."""

    def __init__(self, settings: RankMixerSettings, layout: TokenLayout, compute_dtype: mstype) -> None:
        super().__init__()
        tokens, width = settings.tokens, settings.width
        self.mix = TokenMixing(tokens, tokens, width, layout=layout) if settings.mixing else None
        self.norm1 = LayerNorm(width, compute_dtype=compute_dtype, stream=layout.stream) if settings.norm else None
        self.norm2 = LayerNorm(width, compute_dtype=compute_dtype, stream=layout.stream) if settings.norm else None
        self.add1, self.add2 = Add(layout.stream), Add(layout.stream)
        self.network = network(settings, tokens, width, settings.inner, width, layout, compute_dtype)
        self.residual, self.sparse = settings.residual, settings.moe is not None

    def construct(self, x_TBD: Tensor) -> tuple:
        """(x_TBD, penalty): the penalty is 0 without experts."""
        s_TBD = x_TBD
        if self.mix is not None:
            s_TBD = self.mix(x_TBD)
        if self.residual:
            s_TBD = self.add1(s_TBD, x_TBD)
        if self.norm1 is not None:
            s_TBD = self.norm1(s_TBD)
        penalty = 0.0
        if self.sparse:
            y_TBD, penalty = self.network(s_TBD)
        else:
            y_TBD = self.network(s_TBD)
        if self.residual:
            y_TBD = self.add2(y_TBD, s_TBD)
        if self.norm2 is not None:
            y_TBD = self.norm2(y_TBD)
        return y_TBD, penalty


class RankMixer(Ranker):
    """Tokens, L blocks, mean over the tokens, task heads."""

    def __init__(self, settings: RankMixerSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        layout = TokenLayout(settings.op_sharding)
        groups = group_widths(spec)
        if settings.tokenization == "slices":
            self.tokenize = SliceTokenizer(list(groups.values()), settings.tokens, settings.width, layout=layout,
                                           shared=settings.shared_projection, compute_dtype=compute_dtype)
        else:
            counts = tokens_of_groups(settings.group_tokens, list(groups))
            self.tokenize = GroupTokenizer(list(groups.values()), counts, settings.width, global_token=False,
                                           compute_dtype=compute_dtype)
            if self.tokenize.tokens != settings.tokens:
                raise UserError(f"the groups make {self.tokenize.tokens} tokens", where="model.tokens",
                                value=settings.tokens, hint=f"set it to {self.tokenize.tokens}, or name group_tokens")
        self.layers = nn.CellList([RankMixerBlock(settings, layout, compute_dtype) for _ in range(settings.layers)])
        self.pool = MeanPool(layout)
        self.sparse, self.token_count = settings.moe is not None, settings.tokens
        self.make_head(settings.width)

    def represent(self, groups: tuple, sequences: tuple) -> tuple:
        x_TBD = self.tokenize(*groups)
        penalties = ()
        for layer in self.layers:
            x_TBD, penalty = layer(x_TBD)
            if self.sparse:
                penalties += (penalty,)
        return self.pool(x_TBD), (), penalties

    def check_layout(self, parallel: ParallelConfig, batch: int) -> None:
        check_gates(self.settings.moe, parallel)
        super().check_layout(parallel, batch)

    def check_op(self, parallel: ParallelConfig, batch: int) -> None:
        check_token_axes(self.settings, parallel, batch, {self.settings.tokens})

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]]:
        return [[self.embedding, self.drop, self.tokenize], *self.layers, [self.pool, self.head]]
