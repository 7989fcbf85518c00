"""TokenMixer-Large: mixing and reverting, per-token SwiGLU or Sparse-Pertoken MoE (arXiv 2602.06563).

Shapes: T tokens, H mixing heads, B batch, D width, M = T D / H width of a mixed token, n SwiGLU ratio.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mindspore import Tensor, nn
from mindspore import dtype as mstype
from pydantic import Field, model_validator

from parallel.common.errors import UserError
from parallel.common.settings import Settings
from parallel.layers.experts.moe import SparsePertokenMoE
from parallel.layers.grouped import Add, GroupedSwiGLU, TokenLayout
from parallel.layers.norm import RMSNorm
from parallel.sharding.config import ParallelConfig, divides
from recsys.data.features import FeatureSpec
from recsys.layers.embedding import group_widths
from recsys.layers.mixing import TokenMixing
from recsys.layers.tokenization import GroupTokenizer, MeanPool, tokens_of_groups
from recsys.ranker import Ranker, TaskHeads, check_token_axes
from recsys.settings import RankerSettings
from recsys.ug_sep.sides import UGSepSettings


class SparseMoESettings(Settings):
    """Sparse-Pertoken MoE: the dense SwiGLU of every token split into experts (eq. 19-21)."""

    experts: int = Field(8, ge=2, le=10_000)
    """E, the shared expert included; each has 1 / E of the dense inner width."""
    active: int = Field(4, ge=2)
    """k, the shared expert included. k = 2 chooses one routed expert, whose gate is then not renormalised."""
    alpha: float | None = None
    """Gate value scaling; null = E / k (paper Table 12)."""
    dispatch: Literal["auto", "grouped", "capacity", "dropless"] = "auto"
    """grouped: exact, on the CPU; capacity: static shapes, for expert parallelism; dropless: as capacity while it
    trains, and once trained static shapes without padding, by an operator that Ascend has from 910B on; auto: grouped
    on the CPU, on Ascend dropless in bfloat16 and capacity in other types."""
    capacity_factor: float = Field(1.5, gt=0.0)
    """capacity: rows that an expert takes, over its even share; beyond it rows get no routed expert."""
    balance: float = Field(0.0, ge=0.0)
    """Factor of a loss that spreads the samples of every token over its experts, for each token by itself, averaged
    over the networks; 0 = none. The paper's 1:2 goes without one; at 1:4 and with one chosen expert loads differ
    more."""


class TokenMixerLargeSettings(RankerSettings):
    """Sizes and choices of TokenMixer-Large."""

    name: Literal["tokenmixer_large"] = "tokenmixer_large"
    """Which ranker."""
    tokens: int | None = Field(None, ge=1)
    """T with the global token; null = what the groups make."""
    group_tokens: dict[str, int] = Field(default_factory=dict)
    """Tokens that a semantic group makes; 1 where a group is not named."""
    global_token: bool = True
    """A token made of all groups, in front (eq. 3)."""
    tokenizer_hidden: int | None = Field(None, ge=1)
    """Width between the two layers of each group's network; null = one linear layer."""
    width: int = Field(64, ge=1)
    """D."""
    heads: int | None = Field(None, ge=1)
    """H mixing heads, must divide D; null = the number of tokens, or the next smaller number that divides D."""
    layers: int = Field(2, ge=1, le=10_000)
    """L blocks."""
    ratio: float = Field(2.0, gt=0.0)
    """n: inner width of the SwiGLUs over their token's width."""
    block_variant: Literal["figure_prenorm", "equation_prenorm", "equation_postnorm"] = "figure_prenorm"
    """The paper's figure, text and equations disagree. figure_prenorm: X + Revert(F1(Mix(norm X))), then
    X + F2(norm X); equation_prenorm: H + F1(norm H) with H = Mix(X), then X + F2(norm Revert(H));
    equation_postnorm: eq. 12 and 16 as printed, norm after each residual."""
    inner_residual: bool = False
    """figure_prenorm: adds the mixed tokens to the output of F1, h + F1(norm h), as eq. 12 does."""
    inter_residual: int | None = Field(2, ge=1)
    """At every such number of layers the input of the layer that many below is added again, never on the last layer;
    null =
    never. Paper: every 2 or 3 layers."""
    auxiliary_weight: float = Field(0.1, ge=0.0)
    """Factor of the loss of the heads on lower layers (where inter_residual begins); 0 = no such heads. The paper gives
    no number."""
    final_norm: bool = True
    """RMSNorm before the tokens are averaged; needed after pre-norm blocks. The paper does not mention one."""
    down_gain: float = Field(0.01, gt=0.0)
    """Factor of the Xavier start of every last matrix of a SwiGLU (paper Table 14)."""
    moe: SparseMoESettings | None = None
    """Sparse-Pertoken MoE; null = dense."""
    op_sharding: Literal["width", "tokens", "tokens_naive"] = "width"
    """What tensor parallelism (op) shards: inner widths, or tokens (Token Parallel), or tokens only inside the
    networks."""
    ug_sep: UGSepSettings | None = None
    """User and candidate tokens separated, so that a request's user is computed once; null = unseparated."""

    separable: ClassVar[bool] = True

    def full_capacity(self) -> int | None:
        """See `RankerSettings`."""
        return self.moe.experts if self.moe is not None else None

    def keep_all_rows(self, dropless: bool = False) -> None:
        """See `RankerSettings`."""
        if self.moe is not None:
            padded = "capacity" if self.moe.dispatch != "dropless" or not dropless else "dropless"
            self.moe.dispatch, self.moe.capacity_factor = padded, float(self.moe.experts)

    @property
    def inner(self) -> int:
        """F of the networks of tokens, rounded to a whole number."""
        return round(self.ratio * self.width)

    def mixed_inner(self, tokens: int, heads: int) -> int:
        """F of the networks of mixed tokens, of width `tokens` D / `heads`."""
        return round(self.ratio * (tokens * self.width // heads))

    @property
    def residual_sources(self) -> tuple[int, ...]:
        """Layers i that add the output of layer i - inter_residual."""
        gap = self.inter_residual or 0
        return tuple(range(gap, self.layers - 1, gap)) if gap else ()

    @property
    def auxiliary_layers(self) -> tuple[int, ...]:
        """Layers whose outputs have a head of their own: every `inter_residual`-th one (2nd without) but the last."""
        gap = self.inter_residual or 2
        return tuple(range(gap - 1, self.layers - 1, gap)) if self.auxiliary_weight > 0.0 else ()

    @model_validator(mode="after")
    def _check(self) -> TokenMixerLargeSettings:
        if self.moe is not None and self.moe.balance > 0.0 and self.ug_sep is not None:
            raise UserError("is for the form without ug_sep", where="model.moe.balance", value=self.moe.balance,
                            hint="set it to 0")
        if self.heads and self.width % self.heads:
            raise UserError(f"heads must divide width {self.width}", where="model.heads", value=self.heads)
        if self.inner_residual and self.block_variant != "figure_prenorm":
            raise UserError("the other variants have their own inner residual", where="model.inner_residual",
                            hint="set block_variant: figure_prenorm")
        return self


class TokenMixerBlock(nn.Cell):
    """One block; see `TokenMixerLargeSettings.block_variant`."""

    def __init__(self, settings: TokenMixerLargeSettings, tokens: int, heads: int, layout: TokenLayout,
                 compute_dtype: mstype) -> None:
        super().__init__()
        width = settings.width
        mixed = tokens * width // heads
        self.variant, self.inner_residual = settings.block_variant, settings.inner_residual
        # The mean over the two networks of every layer.
        self.balance = settings.moe.balance / (2 * settings.layers) if settings.moe is not None else 0.0
        self.mix = TokenMixing(tokens, heads, width, layout=layout)
        self.revert = TokenMixing(tokens, heads, width, reverting=True, layout=layout)
        inner = settings.mixed_inner(tokens, heads)
        self.first = network(settings, heads, mixed, inner, mixed, layout, compute_dtype)
        self.second = network(settings, tokens, width, settings.inner, width, layout, compute_dtype)
        figure = self.variant == "figure_prenorm"
        self.norm1 = RMSNorm(width if figure else mixed, compute_dtype=compute_dtype, stream=layout.stream)
        self.norm2 = RMSNorm(width, compute_dtype=compute_dtype, stream=layout.stream)
        self.inner_norm = None
        if self.inner_residual:
            self.inner_norm = RMSNorm(mixed, compute_dtype=compute_dtype, stream=layout.stream)
        self.add1, self.add2 = Add(layout.stream), Add(layout.stream)

    def construct(self, x_TBD: Tensor) -> tuple:
        """(x_TBD, penalty): the penalty is 0 where loads are not balanced."""
        if self.variant == "figure_prenorm":
            h_HBM = self.mix(self.norm1(x_TBD))
            if self.inner_norm is not None:
                change_HBM, penalty = self.applied(self.first, self.inner_norm(h_HBM))
                h_HBM = h_HBM + change_HBM
            else:
                h_HBM, penalty = self.applied(self.first, h_HBM)
            x_TBD = self.add1(x_TBD, self.revert(h_HBM))
            change_TBD, more = self.applied(self.second, self.norm2(x_TBD))
            return self.add2(x_TBD, change_TBD), penalty + more
        h_HBM = self.mix(x_TBD)
        if self.variant == "equation_prenorm":
            change_HBM, penalty = self.applied(self.first, self.norm1(h_HBM))
            h_HBM = self.add1(h_HBM, change_HBM)
            change_TBD, more = self.applied(self.second, self.norm2(self.revert(h_HBM)))
            return self.add2(x_TBD, change_TBD), penalty + more
        change_HBM, penalty = self.applied(self.first, h_HBM)
        x_mTBD = self.revert(self.norm1(self.add1(change_HBM, h_HBM)))
        change_TBD, more = self.applied(self.second, x_mTBD)
        return self.norm2(self.add2(change_TBD, x_TBD)), penalty + more

    def applied(self, network: nn.Cell, x_TBD: Tensor) -> tuple:
        """(result of a network of tokens, its part of the penalty in training)."""
        if self.balance > 0.0 and self.training:
            return network(x_TBD), network.balance(x_TBD) * self.balance
        return network(x_TBD), 0.0


def network(settings: TokenMixerLargeSettings, tokens: int, inputs: int, inner: int, outputs: int, layout: TokenLayout,
            compute_dtype: mstype) -> nn.Cell:
    """A per-token network from `inputs` to `outputs`: a dense SwiGLU, or one split into experts."""
    moe, shared = settings.moe, {"layout": layout, "down_gain": settings.down_gain, "outputs": outputs,
                                 "compute_dtype": compute_dtype}
    if moe is None:
        return GroupedSwiGLU(tokens, inputs, inner, **shared)
    return SparsePertokenMoE(tokens, inputs, inner, experts=moe.experts, active=moe.active, alpha=moe.alpha,
                             dispatch=moe.dispatch, capacity_factor=moe.capacity_factor, **shared)


def check_mixed_width(settings: TokenMixerLargeSettings, parallel: ParallelConfig, tokens: int, heads: int) -> None:
    """Raises a `UserError` unless op divides the inner width of the networks of mixed tokens."""
    divides(parallel.op, settings.mixed_inner(tokens, heads), where="parallel.op",
            what="inner width of the networks of mixed tokens,", hint="choose another model.ratio or heads")


def check_routed_experts(moe: SparseMoESettings | None, parallel: ParallelConfig) -> None:
    """Raises a `UserError` unless there are routed experts and expert parallelism divides them."""
    if moe is None:
        raise UserError("the model has no routed experts to shard", where="parallel.expert", value=parallel.expert)
    divides(parallel.expert, moe.experts - 1, where="parallel.expert", what="routed experts")


class TokenMixerLarge(Ranker):
    """Tokens and global token, L blocks with inter-layer residuals, final norm, mean over the tokens, heads."""

    def __init__(self, settings: TokenMixerLargeSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        self.layout = TokenLayout(settings.op_sharding)
        groups = group_widths(spec)
        counts = tokens_of_groups(settings.group_tokens, list(groups))
        self.tokenize = GroupTokenizer(list(groups.values()), counts, settings.width,
                                       global_token=settings.global_token, hidden=settings.tokenizer_hidden,
                                       compute_dtype=compute_dtype)
        self.tokens = self.token_count = self.tokenize.tokens
        if settings.tokens not in (None, self.tokens):
            raise UserError(f"the groups make {self.tokens} tokens with the global one", where="model.tokens",
                            value=settings.tokens, hint=f"set it to {self.tokens}, or name group_tokens")
        self.heads = settings.heads or max(count for count in range(1, self.tokens + 1) if settings.width % count == 0)
        self.layers = nn.CellList([TokenMixerBlock(settings, self.tokens, self.heads, self.layout, compute_dtype)
                                   for _ in range(settings.layers)])
        self.balanced = settings.moe is not None and settings.moe.balance > 0.0
        self.gap = settings.inter_residual or 0
        # Layer i adds the output of layer i - gap, which is the input of layer i - gap + 1.
        self.sources = settings.residual_sources
        self.adds = nn.CellList([Add(self.layout.stream) for _ in self.sources])
        self.auxiliary_layers = settings.auxiliary_layers
        self.auxiliary = nn.CellList([TaskHeads(settings.width, settings.head_hidden, tasks)
                                      for _ in self.auxiliary_layers])
        self.auxiliary_pools = nn.CellList([MeanPool(self.layout) for _ in self.auxiliary])
        self.norm = RMSNorm(settings.width, compute_dtype=compute_dtype,
                            stream=self.layout.stream) if settings.final_norm else None
        self.pool = MeanPool(self.layout)
        self.make_head(settings.width)

    @property
    def auxiliary_weight(self) -> float:
        return self.settings.auxiliary_weight if self.auxiliary_layers else 0.0

    def represent(self, groups: tuple, sequences: tuple) -> tuple:
        x_TBD = self.tokenize(*groups)
        inputs, auxiliary, penalties, added, headed = (), (), (), 0, 0
        for index in range(len(self.layers)):
            inputs += (x_TBD,)
            x_TBD, penalty = self.layers[index](x_TBD)
            if self.balanced:
                penalties += (penalty,)
            if index in self.sources:
                x_TBD = self.adds[added](x_TBD, inputs[index - self.gap + 1])
                added += 1
            if index in self.auxiliary_layers:
                auxiliary += (self.auxiliary[headed](self.auxiliary_pools[headed](x_TBD)),)
                headed += 1
        if self.norm is not None:
            x_TBD = self.norm(x_TBD)
        return self.pool(x_TBD), auxiliary, penalties

    def check_layout(self, parallel: ParallelConfig, batch: int) -> None:
        if self.balanced and parallel.pipeline.stages > 1:
            raise UserError("the loss that balances loads does not go from stage to stage", where="model.moe.balance",
                            value=self.settings.moe.balance, hint="set it to 0, or train without stages")
        super().check_layout(parallel, batch)

    def check_op(self, parallel: ParallelConfig, batch: int) -> None:
        check_token_axes(self.settings, parallel, batch, {self.tokens, self.heads})
        if self.settings.op_sharding == "width":
            check_mixed_width(self.settings, parallel, self.tokens, self.heads)

    def auxiliary_heads(self) -> list[nn.Cell]:
        return list(self.auxiliary)

    def check_experts(self, parallel: ParallelConfig) -> None:
        check_routed_experts(self.settings.moe, parallel)

    def pipeline_cells(self) -> list[nn.Cell | list[nn.Cell]]:
        last = [self.pool, self.head, *([self.norm] if self.norm is not None else [])]
        return [[self.embedding, self.drop, self.tokenize], *self.layers, last]
