"""RankMixer with user and candidate tokens separated (UG-Sep, arXiv 2602.10455).

Shapes: R rows of U, N rows of G, T = c_u + c_g tokens = mixing heads, D width, d = D / T.

A U mixed token is 0 from column c_u d on, but RankMixer adds the token itself before its network, so here the network's
first matrix keeps all its rows; all that G needs of U are the heads of the U tokens that are in G mixed tokens.
"""

from __future__ import annotations

from mindspore import Tensor, nn
from mindspore import dtype as mstype

from parallel.common.errors import UserError
from parallel.layers.grouped import Add, TokenLayout
from parallel.layers.norm import LayerNorm
from parallel.sharding.config import ParallelConfig
from recsys.data.features import FeatureSpec
from recsys.layers.embedding import group_widths
from recsys.layers.tokenization import SliceTokenizer
from recsys.models.rankmixer.model import RankMixerSettings, check_gates, network
from recsys.ug_sep.compensation import Compensation
from recsys.ug_sep.layers import Beside, Blank, Repeat, Shape, Take
from recsys.ug_sep.mixing import TwoSidedMixing
from recsys.ug_sep.pyramid import PyramidBlock, count_pairs
from recsys.ug_sep.ranker import SeparatedRanker, TwoSidedBlock
from recsys.ug_sep.sides import tokens_of_ratio
from recsys.ug_sep.tokenization import TwoSidedGroupTokenizer


class SeparatedBlock(TwoSidedBlock):
    """S = LN(Mix(X) M_mix + X), X' = LN(PFFN(S) + S), each side with networks of its own and the norms in common."""

    def __init__(self, settings: RankMixerSettings, counts: Shape, layout: TokenLayout, compute_dtype: mstype) -> None:
        super().__init__()
        width, separation, (c_u, c_g) = settings.width, settings.ug_sep, counts
        tokens, stream = c_u + c_g, layout.stream
        d = width // tokens
        self.counts, self.mixes, self.residual = counts, settings.mixing, settings.residual
        self.sparse, inner = settings.moe is not None, settings.inner
        self.mixing = TwoSidedMixing(counts, counts, width, layout, separation.mixing_mask)
        self.blank, self.beside, self.beside_rest = Blank(stream), Beside(2, stream), Beside(2, stream)
        self.take = Take()
        norm = {"compute_dtype": compute_dtype, "stream": stream}
        self.norm1 = LayerNorm(width, **norm) if settings.norm else None
        self.norm2 = LayerNorm(width, **norm) if settings.norm else None
        self.network_user, self.network_group = (network(settings, count, width, inner, width, layout, compute_dtype)
                                                 for count in counts)
        self.add_user, self.add_candidate, self.add_compensation = Add(stream), Add(stream), Add(stream)
        self.add_user_mixed, self.add_candidate_mixed, self.repeat = Add(stream), Add(stream), Repeat(c_g)
        self.compensation = None
        self.rows = c_u * d if separation.mixing_mask else width
        if separation.compensation != "none":
            self.compensation = Compensation(separation.compensation, c_u, self.rows, c_g, width,
                                             separation.compensation_rank or width, compute_dtype)
        self.components = [*([(c_g, c_u * d)] if self.mixes else []),
                           *([self.compensation.shape] if self.compensation is not None else [])]
        self.join_tokens = Beside(0, stream)

    def half(self, s_TBD: Tensor, network: nn.Cell, add: nn.Cell, index_N: Tensor | None) -> tuple:
        """(LN(PFFN(S) + S), penalty) with S = LN of what is given."""
        if self.norm1 is not None:
            s_TBD = self.norm1(s_TBD)
        penalty = 0.0
        if self.sparse:
            y_TBD, penalty = network(s_TBD, index_N)
        else:
            y_TBD = network(s_TBD)
        if self.residual:
            y_TBD = add(y_TBD, s_TBD)
        if self.norm2 is not None:
            y_TBD = self.norm2(y_TBD)
        return y_TBD, penalty

    def user(self, x_uRD: Tensor, index_N: Tensor | None = None) -> tuple:
        """(x_uRD, components: U heads of the G mixed tokens [c_g, R, c_u d], compensation if any; penalty)."""
        s_uRD, components = x_uRD, ()
        own, other = self.mixing.split_heads(x_uRD)
        source = own
        if self.mixes:
            source, given = self.mixing.user(own, other)
            components += (given,)
            # The mixed token ends where the mask begins.
            s_uRD = (self.beside_rest(self.add_user_mixed(source, own), other) if self.residual
                     else self.beside_rest(source, self.blank(other)))
        if self.compensation is not None:
            components += (self.compensation(source),)
        x_uRD, penalty = self.half(s_uRD, self.network_user, self.add_user, index_N)
        return x_uRD, components, penalty

    def candidate(self, x_gND: Tensor, components: tuple, index_N: Tensor | None) -> tuple:
        """(x_gND, penalty)."""
        s_gND = x_gND
        if self.mixes:
            s_gND = self.beside(self.take.full(components[0], index_N), self.mixing.candidate(x_gND))
            if self.residual:
                s_gND = self.add_candidate_mixed(s_gND, x_gND)
        if self.compensation is not None:
            s_gND = self.add_compensation(s_gND, self.take.full(self.repeat(components[-1]), index_N))
        return self.half(s_gND, self.network_group, self.add_candidate, None)

    def masked(self, x_TBD: Tensor) -> tuple:
        """(x_TBD, penalties): the same by masks on full tensors."""
        c_u, s_TBD = self.counts[0], x_TBD
        source = x_TBD[:c_u, :, :self.rows]
        if self.mixes:
            s_TBD = self.mixing.masked(x_TBD)
            source = s_TBD[:c_u, :, :self.rows]
            if self.residual:
                s_TBD = s_TBD + x_TBD
        if self.compensation is not None:
            s_TBD = self.join_tokens(s_TBD[:c_u], s_TBD[c_u:] + self.repeat(self.compensation(source)))
        own, penalty = self.half(s_TBD[:c_u], self.network_user, self.add_user, None)
        other, more = self.half(s_TBD[c_u:], self.network_group, self.add_candidate, None)
        return self.join_tokens(own, other), (penalty, more)


class TwoSidedSliceTokenizer(nn.Cell):
    """Each side's concatenation split into equal slices, one a token (RankMixer eq. 2)."""

    components: tuple = ()

    def __init__(self, users: dict[str, int], groups: dict[str, int], counts: Shape, width: int, *,
                 layout: TokenLayout, shared: bool, compute_dtype: mstype) -> None:
        super().__init__()
        self.user_side, self.group_side = (
            SliceTokenizer(list(own.values()), count, width, layout=layout, shared=shared, compute_dtype=compute_dtype)
            for own, count in ((users, counts[0]), (groups, counts[1])))

    def user(self, groups: tuple) -> tuple:
        """(x_uRD, no components)."""
        return self.user_side(*groups), ()

    def candidate(self, groups: tuple, components: tuple, index_N: Tensor | None) -> Tensor:
        """x_gND."""
        return self.group_side(*groups)


class SeparatedRankMixer(SeparatedRanker):
    """RankMixer in two passes; settings as for the unseparated model, with `ug_sep`."""

    def __init__(self, settings: RankMixerSettings, spec: FeatureSpec, tasks: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__(settings, spec, tasks, compute_dtype)
        separation, width = settings.ug_sep, settings.width
        if separation.user_heads is not None:
            raise UserError("RankMixer has a mixing head for each token", where="model.ug_sep.user_heads",
                            value=separation.user_heads, hint="leave it out")
        users, groups = group_widths(self.sides.user.spec), group_widths(self.sides.candidate.spec)
        counts = self._counts(users, groups)
        if settings.tokenization == "slices":
            self.tokenize = TwoSidedSliceTokenizer(users, groups, counts, width, layout=self.layout,
                                                   shared=settings.shared_projection, compute_dtype=compute_dtype)
        else:
            self.tokenize = TwoSidedGroupTokenizer(users, groups, counts, width, named=settings.group_tokens,
                                                   global_token="none", hidden=None, compute_dtype=compute_dtype)
        path = count_pairs(counts, separation.layers, settings.layers)
        self.layers = nn.CellList([self._block(before, after, compute_dtype)
                                   for before, after in zip(path[:-1], path[1:], strict=True)])
        self.sparse = settings.moe is not None
        self.finish(path, list(self.tokenize.components))

    def check_layout(self, parallel: ParallelConfig, batch: int) -> None:
        check_gates(self.settings.moe, parallel)
        super().check_layout(parallel, batch)

    def _counts(self, users: dict[str, int], groups: dict[str, int]) -> Shape:
        settings = self.settings
        if settings.ug_sep.ratio is not None:
            return tokens_of_ratio(settings.ug_sep.ratio, settings.tokens)
        made = [sum(settings.group_tokens.get(name, 1) for name in side) for side in (users, groups)]
        if settings.tokenization == "slices" or sum(made) != settings.tokens:
            raise UserError("without a ratio the groups must make the tokens", where="model.ug_sep.ratio",
                            hint=f"give a ratio, or tokenization: groups and tokens: {sum(made)}")
        return made[0], made[1]

    def _block(self, before: Shape, after: Shape, compute_dtype: mstype) -> nn.Cell:
        settings = self.settings
        if before != after or settings.ug_sep.residual == "attention":
            return PyramidBlock(settings, before, after, self.layout, compute_dtype, norm=LayerNorm, network=network,
                                inner=settings.ffn_ratio, prenorm=False)
        return SeparatedBlock(settings, before, self.layout, compute_dtype)
