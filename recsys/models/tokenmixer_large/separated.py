"""TokenMixer-Large with user and candidate tokens separated (UG-Sep, arXiv 2602.10455)."""

from __future__ import annotations

from mindspore import dtype as mstype
from mindspore import nn

from parallel.common.errors import UserError
from parallel.layers.grouped import Add
from parallel.layers.norm import RMSNorm
from parallel.sharding.config import ParallelConfig
from recsys.data.features import FeatureSpec
from recsys.layers.embedding import group_widths
from recsys.models.tokenmixer_large.model import (
    TokenMixerLargeSettings,
    check_mixed_width,
    check_routed_experts,
    network,
)
from recsys.models.tokenmixer_large.separated_blocks import SeparatedBlock, separated_block
from recsys.ranker import TaskHeads
from recsys.ug_sep.layers import Shape
from recsys.ug_sep.pyramid import PyramidBlock, count_pairs
from recsys.ug_sep.ranker import SeparatedRanker
from recsys.ug_sep.sides import heads_of, tokens_of_ratio
from recsys.ug_sep.tokenization import TwoSidedGroupTokenizer


class SeparatedTokenMixerLarge(SeparatedRanker):
    """TokenMixer-Large in two passes; settings as for the unseparated model, with `ug_sep`."""

    def __init__(self, settings: TokenMixerLargeSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        separation = settings.ug_sep
        users, groups = group_widths(self.sides.user.spec), group_widths(self.sides.candidate.spec)
        place = separation.global_token if settings.global_token else "none"
        counts = self._counts(users, groups, place)
        self.tokenize = TwoSidedGroupTokenizer(users, groups, counts, settings.width, named=settings.group_tokens,
                                               global_token=place, hidden=settings.tokenizer_hidden,
                                               compute_dtype=compute_dtype)
        path = count_pairs(counts, separation.layers, settings.layers)
        self.layers = nn.CellList([self._block(before, after, compute_dtype)
                                   for before, after in zip(path[:-1], path[1:], strict=True)])
        self.gap = settings.inter_residual or 0
        # A lower layer's tokens can be added where their number is the same.
        self.sources = tuple(i for i in settings.residual_sources if path[i - self.gap + 1] == path[i + 1])
        adds = [Add(self.layout.stream) for _ in range(2 * settings.layers)]
        self.adds_user, self.adds_candidate = nn.CellList(adds[::2]), nn.CellList(adds[1::2])
        self.auxiliary_layers = settings.auxiliary_layers
        self.auxiliary = nn.CellList([TaskHeads(settings.width, settings.head_hidden, tasks)
                                      for _ in self.auxiliary_layers])
        if settings.final_norm:
            self.norm = RMSNorm(settings.width, compute_dtype=compute_dtype, stream=self.layout.stream)
        self.finish(path, self.tokenize.components)

    def auxiliary_heads(self) -> list[nn.Cell]:
        return list(self.auxiliary)

    def check_op(self, parallel: ParallelConfig, batch: int) -> None:
        super().check_op(parallel, batch)
        for block in self.layers:
            if isinstance(block, SeparatedBlock):
                tokens, heads = sum(block.counts), sum(block.heads)
                check_mixed_width(self.settings, parallel, tokens, heads)

    def check_experts(self, parallel: ParallelConfig) -> None:
        check_routed_experts(self.settings.moe, parallel)

    def _counts(self, users: dict[str, int], groups: dict[str, int], global_token: str) -> Shape:
        settings, extra = self.settings, int(global_token != "none")
        named = settings.group_tokens
        natural = (sum(named.get(name, 1) for name in users) + int(global_token == "per_side"),
                   sum(named.get(name, 1) for name in groups) + extra)
        if settings.ug_sep.ratio is not None:
            return tokens_of_ratio(settings.ug_sep.ratio, settings.tokens or sum(natural))
        if settings.tokens not in (None, sum(natural)):
            raise UserError(f"the groups make {sum(natural)} tokens with global ones", where="model.tokens",
                            value=settings.tokens, hint="give model.ug_sep.ratio")
        return natural

    def _block(self, before: Shape, after: Shape, compute_dtype: mstype) -> nn.Cell:
        settings, tokens = self.settings, sum(before)
        if before != after or settings.ug_sep.residual == "attention":
            return PyramidBlock(settings, before, after, self.layout, compute_dtype, norm=RMSNorm, network=network,
                                inner=settings.ratio, prenorm=True)
        heads = settings.heads or max(n for n in range(1, tokens + 1) if settings.width % n == 0)
        if heads < 2:
            raise UserError("separation needs at least two mixing heads", where="model.heads", value=heads)
        own = settings.ug_sep.user_heads or heads_of(before[0], tokens, heads)
        if own >= heads:
            raise UserError(f"of {heads} mixing heads one must be G", where="model.ug_sep.user_heads", value=own)
        return separated_block(settings, before, (own, heads - own), self.layout, compute_dtype)

    @property
    def auxiliary_weight(self) -> float:
        return self.settings.auxiliary_weight if self.auxiliary_layers else 0.0
