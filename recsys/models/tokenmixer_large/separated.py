"""TokenMixer-Large with user and candidate tokens separated (UG-Sep, arXiv 2602.10455).

Shapes: R rows of U, N rows of G, T = c_u + c_g tokens, H = h_u + h_g mixing heads (and mixed tokens), D width, d = D /
H, M = T d width of a mixed token, F inner width. A mixed token's columns are T slices of d, U tokens' first; a token's
columns are H slices of d, U heads first.

Which work the masks take away (figure_prenorm): U mixed tokens are 0 from column c_u d on, so their first matrices have
c_u d rows only; of G mixed tokens' results the first c_u d columns would go back to U tokens, so their last matrices
have c_g d columns only; and the share of U heads in G mixed tokens' first products is the same for all candidates of a
request, so it is a component of the state.
"""

from __future__ import annotations

import math
from typing import Any

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.common.errors import UserError
from parallel.layers.fused import FusedLinear, library
from parallel.layers.grouped import Add, GroupedLinear, Swish, TokenLayout
from parallel.layers.norm import RMSNorm
from parallel.sharding.config import ParallelConfig
from recsys.data.features import FeatureSpec
from recsys.layers.embedding import Join, group_widths
from recsys.layers.mixing import TokenMixing
from recsys.layers.tokenization import GroupTokenizer, Stack
from recsys.models.tokenmixer_large.model import TokenMixerLargeSettings, check_routed_experts, network
from recsys.ranker import ReLU, TaskHeads, dense
from recsys.ug_sep.compensation import Compensation
from recsys.ug_sep.layers import Beside, Blank, Fill, Mask, Repeat, Shape, Take, Widths
from recsys.ug_sep.pyramid import PyramidBlock, count_pairs
from recsys.ug_sep.ranker import SeparatedRanker, TwoSidedBlock
from recsys.ug_sep.sides import allot, heads_of, tokens_of_ratio


class SplitSwiGLU(nn.Cell):
    """A per-token SwiGLU whose input stands in two parts: what U gives, and what comes from the candidate.

    The first products are sums over both parts; `user` gives U's summands, `candidate` the result.
    """

    def __init__(self, tokens: int, user: int, group: int, inner: int, outputs: int, *, layout: TokenLayout,
                 down_gain: float, compute_dtype: mstype) -> None:
        super().__init__()

        def first(inputs: int) -> GroupedLinear:
            # The start is that of one matrix with user + group rows.
            gain = math.sqrt((inputs + inner) / (user + group + inner))
            return GroupedLinear(tokens, inputs, inner, style="column", gain=gain, layout=layout, bias=False,
                                 compute_dtype=compute_dtype)

        self.gate_user, self.up_user, self.gate_group, self.up_group = first(user), first(user), first(group), first(
            group)
        self.add1, self.add2, self.swish, self.take = Add(layout.inner), Add(layout.inner), Swish(layout.inner), Take()
        self.down = GroupedLinear(tokens, inner, outputs, style="row", gain=down_gain, layout=layout, bias=False,
                                  compute_dtype=compute_dtype)
        kernels = library(compute_dtype)
        self.fused = FusedLinear(kernels) if kernels is not None else None

    def user(self, u_TRI: Tensor) -> tuple:
        """U's part of both first products, [T, R, F] each."""
        return self.gate_user(u_TRI), self.up_user(u_TRI)

    def candidate(self, gate_TRF: Tensor, up_TRF: Tensor, g_TNI: Tensor, index_N: Tensor | None) -> Tensor:
        """[T, N, outputs]."""
        if self.fused is not None and index_N is not None and gate_TRF.shape[1] == 1:
            # What one user adds to all rows is a bias.
            gate = self.fused(g_TNI, self.gate_group.weight, gate_TRF)
            return self.down(self.swish(gate, self.fused(g_TNI, self.up_group.weight, up_TRF)))
        gate = self.add1(self.gate_group(g_TNI), self.take(gate_TRF, index_N))
        up = self.add2(self.up_group(g_TNI), self.take(up_TRF, index_N))
        return self.down(self.swish(gate, up))


class SeparatedBlock(TwoSidedBlock):
    """A block whose tokens stay as many as they are; the variants are those of `TokenMixerLargeSettings`.

    Args:
        counts: (c_u, c_g).
        heads: (h_u, h_g).
    """

    def __init__(self, settings: TokenMixerLargeSettings, counts: Shape, heads: Shape, layout: TokenLayout,
                 compute_dtype: mstype) -> None:
        super().__init__()
        width, separation = settings.width, settings.ug_sep
        self.counts, self.heads, self.variant = counts, heads, settings.block_variant
        tokens, mixed = sum(counts), sum(heads)
        d = width // mixed
        self.from_user, self.from_candidate, wide = counts[0] * d, counts[1] * d, tokens * d
        self.inner_residual = settings.inner_residual
        self._make_mixing(width, d, layout, separation)
        figure = self.variant == "figure_prenorm"
        stream = {"compute_dtype": compute_dtype, "stream": layout.stream}
        self.norm1, self.norm2 = RMSNorm(width if figure else wide, **stream), RMSNorm(width, **stream)
        self.inner_norm = RMSNorm(wide, **stream) if self.inner_residual else None
        self._make_networks(settings, wide, d, layout, compute_dtype)
        self.compensation = None
        if separation.compensation != "none":
            self.compensation = Compensation(separation.compensation, heads[0], self.user_rows, counts[1], width,
                                             separation.compensation_rank or width, compute_dtype)
        self.components = self._components(heads[0] * d)

    def _make_mixing(self, width: int, d: int, layout: TokenLayout, separation: Any) -> None:
        (c_u, c_g), (h_u, h_g), stream = self.counts, self.heads, layout.stream
        own, other = h_u * d, h_g * d
        self.heads_apart, self.heads_again = Widths((own, other), stream), Widths((own, other), stream)
        self.mix_own, self.mix_given = (TokenMixing(c_u, h, h * d, layout=layout) for h in (h_u, h_g))
        self.mix_candidate = TokenMixing(c_g, h_g, other, layout=layout)
        self.tokens_apart = Widths((self.from_user, self.from_candidate), stream)
        self.revert_own, self.revert_given = (TokenMixing(c, h_u, own, reverting=True, layout=layout)
                                              for c in (c_u, c_g))
        self.revert_candidate = TokenMixing(c_g, h_g, other, reverting=True, layout=layout)
        self.blank, self.fill_mixed = Blank(stream), Fill(0, self.from_candidate, stream)
        self.beside, self.beside_given, self.beside_rest = Beside(2, stream), Beside(2, stream), Beside(2, stream)
        self.take = Take()
        self.wide, self.adds = Repeat(c_g), nn.CellList([Add(stream) for _ in range(7)])
        # Of the form with masks.
        tokens, mixed = c_u + c_g, h_u + h_g
        self.mix = TokenMixing(tokens, mixed, width, layout=layout)
        self.revert = TokenMixing(tokens, mixed, width, reverting=True, layout=layout)
        self.mask_mixing = Mask((mixed, tokens * d), h_u, self.from_user, separation.mixing_mask)
        self.mask_reverting = Mask((tokens, width), c_u, own, separation.reverting_mask)
        self.join_tokens, self.fill_before = Beside(0, stream), Fill(self.from_user, 0, stream)

    def _make_networks(self, settings: TokenMixerLargeSettings, wide: int, d: int, layout: TokenLayout,
                       compute_dtype: mstype) -> None:
        separation, width, (c_u, c_g), (h_u, h_g) = settings.ug_sep, settings.width, self.counts, self.heads
        figure, postnorm = self.variant == "figure_prenorm", self.variant == "equation_postnorm"
        inner, inner2 = round(settings.ratio * wide), round(settings.ratio * width)
        self.user_rows = self.from_user if separation.mixing_mask else wide
        # equation_postnorm takes the norm over the whole mixed token, so there all columns are needed.
        self.short = separation.reverting_mask and not postnorm
        outputs = self.from_candidate if self.short else wide
        self.first_user = network(settings, h_u, self.user_rows, inner, wide, layout, compute_dtype)
        self.split = figure and not self.inner_residual and settings.moe is None
        if self.split:
            self.first_group = SplitSwiGLU(h_g, self.from_user, self.from_candidate, inner, outputs, layout=layout,
                                           down_gain=settings.down_gain, compute_dtype=compute_dtype)
        else:
            self.first_group = network(settings, h_g, wide, inner, outputs, layout, compute_dtype)
        # Only after Revert(H) without X are a U token's columns from h_u d on zero.
        self.second_rows = h_u * d if separation.reverting_mask and not figure else width
        self.second_user = network(settings, c_u, self.second_rows, inner2, width, layout, compute_dtype)
        self.second_group = network(settings, c_g, width, inner2, width, layout, compute_dtype)

    def _components(self, own: int) -> list[Shape]:
        (_, c_g), (_, h_g) = self.counts, self.heads
        if self.split:
            inner = self.first_group.gate_user.outputs
            components = [(h_g, inner), (h_g, inner)]
        else:
            components = [(h_g, self.from_user)]
        return [*components, (c_g, own), *([self.compensation.shape] if self.compensation is not None else [])]

    # -- U ------------------------------------------------------------------------------------------------------------

    def user(self, x_uRD: Tensor, index_N: Tensor | None = None) -> tuple:
        """(x_uRD, components: U's part of the G mixed tokens (or of their first products), U mixed tokens' results for
        G tokens [c_g, R, h_u d], compensation if any; 0)."""
        n_uRD = self.norm1(x_uRD) if self.variant == "figure_prenorm" else x_uRD
        own, given = self.heads_apart(n_uRD)
        own_huRK, given_hgRK = self.mix_own(own), self.mix_given(given)
        components = (given_hgRK,)
        if self.split:
            components = self.first_group.user(given_hgRK)
        mine, theirs = self.tokens_apart(self.user_mixed(own_huRK))
        components += (self.revert_given(theirs),)
        if self.compensation is not None:
            components += (self.compensation(own_huRK),)
        return self.user_tokens(x_uRD, self.revert_own(mine), given), components, 0.0

    def user_mixed(self, own_huRK: Tensor) -> Tensor:
        """[h_u, R, M]: what becomes of the U mixed tokens, whose columns from c_u d on are zero."""
        if self.variant == "figure_prenorm" and self.inner_norm is None:
            return self.first_user(own_huRK)
        full = self.fill_mixed(own_huRK)
        if self.variant == "equation_postnorm":
            return self.norm1(self.adds[0](self.first_user(own_huRK), full))
        norm = self.inner_norm if self.inner_norm is not None else self.norm1
        normed, _ = self.tokens_apart(norm(full))
        return self.adds[0](full, self.first_user(normed))

    def user_tokens(self, x_uRD: Tensor, back_uRK: Tensor, given_uRK: Tensor) -> Tensor:
        """The second half of the block, from what came back of the U mixed tokens, [c_u, R, h_u d]; the G heads, shaped
        [c_u, R, h_g d] like `given_uRK`, get nothing back."""
        if self.variant == "equation_postnorm":
            return self.norm2(self.adds[1](self.second_user(back_uRK), x_uRD))
        full = self.beside_rest(back_uRK, self.blank(given_uRK))
        if self.variant == "equation_prenorm":
            normed, _ = self.heads_again(self.norm2(full))
            return self.adds[1](x_uRD, self.second_user(normed))
        x_uRD = self.adds[2](x_uRD, full)
        return self.adds[1](x_uRD, self.second_user(self.norm2(x_uRD)))

    # -- G ------------------------------------------------------------------------------------------------------------

    def candidate(self, x_gND: Tensor, components: tuple, index_N: Tensor | None) -> tuple:
        """(x_gND, 0): a candidate's tokens, given the user's components."""
        n_gND = self.norm1(x_gND) if self.variant == "figure_prenorm" else x_gND
        _, heads = self.heads_apart(n_gND)
        g_hgNK = self.mix_candidate(heads)
        if self.split:
            back = self.first_group.candidate(components[0], components[1], g_hgNK, index_N)
        else:
            back = self.candidate_mixed(self.beside(self.take.full(components[0], index_N), g_hgNK), g_hgNK)
        given = self.take.full(components[2 if self.split else 1], index_N)
        y_gND = self.beside_given(given, self.revert_candidate(back))
        if self.compensation is not None:
            x_gND = self.adds[3](x_gND, self.take.full(self.wide(components[-1]), index_N))
        return self.group_tokens(x_gND, y_gND), 0.0

    def candidate_mixed(self, h_hgNM: Tensor, g_hgNK: Tensor) -> Tensor:
        """[h_g, N, c_g d]: what becomes of the G mixed tokens, only the columns that G tokens take back."""
        if self.variant == "equation_postnorm":
            _, back = self.tokens_apart(self.norm1(self.adds[4](self.first_group(h_hgNM), h_hgNM)))
            return back
        if self.variant == "figure_prenorm" and self.inner_norm is None:
            return self.first_group(h_hgNM)
        norm = self.inner_norm if self.inner_norm is not None else self.norm1
        return self.adds[4](g_hgNK, self.first_group(norm(h_hgNM)))

    def group_tokens(self, x_gND: Tensor, y_gND: Tensor) -> Tensor:
        """The second half of the block."""
        if self.variant == "equation_postnorm":
            return self.norm2(self.adds[5](self.second_group(y_gND), x_gND))
        if self.variant == "equation_prenorm":
            return self.adds[5](x_gND, self.second_group(self.norm2(y_gND)))
        x_gND = self.adds[6](x_gND, y_gND)
        return self.adds[5](x_gND, self.second_group(self.norm2(x_gND)))

    # -- with masks ---------------------------------------------------------------------------------------------------

    def masked(self, x_TBD: Tensor) -> tuple:
        """(x_TBD, ()): the same by masks on whole tensors; the only form that runs without one of them."""
        figure = self.variant == "figure_prenorm"
        h_HBM = self.mask_mixing(self.mix(self.norm1(x_TBD) if figure else x_TBD))
        extra = None
        if self.compensation is not None:
            extra = self.wide(self.compensation(h_HBM[:self.heads[0], :, :self.user_rows]))
        if figure and self.inner_norm is None:
            h_HBM = self.first(h_HBM)
        elif self.variant == "equation_postnorm":
            h_HBM = self.norm1(self.first(h_HBM) + h_HBM)
        else:
            norm = self.inner_norm if self.inner_norm is not None else self.norm1
            h_HBM = h_HBM + self.first(norm(h_HBM))
        y_TBD = self.mask_reverting(self.revert(h_HBM))
        if extra is not None:
            x_TBD = self.join_tokens(x_TBD[:self.counts[0]], x_TBD[self.counts[0]:] + extra)
        if self.variant == "equation_postnorm":
            return self.norm2(self.second(y_TBD) + x_TBD), ()
        if self.variant == "equation_prenorm":
            return x_TBD + self.second(self.norm2(y_TBD)), ()
        x_TBD = x_TBD + y_TBD
        return x_TBD + self.second(self.norm2(x_TBD)), ()

    def first(self, h_HBM: Tensor) -> Tensor:
        """The networks of all mixed tokens; columns that no one takes back are zero."""
        h_u = self.heads[0]
        own = self.first_user(h_HBM[:h_u, :, :self.user_rows])
        if self.split:
            given, g = self.tokens_apart(h_HBM[h_u:])
            gate, up = self.first_group.user(given)
            back = self.first_group.candidate(gate, up, g, None)
        else:
            back = self.first_group(h_HBM[h_u:])
        return self.join_tokens(own, self.fill_before(back) if self.short else back)

    def second(self, x_TBD: Tensor) -> Tensor:
        """The networks of all tokens."""
        c_u = self.counts[0]
        return self.join_tokens(self.second_user(x_TBD[:c_u, :, :self.second_rows]), self.second_group(x_TBD[c_u:]))


class TwoSidedGroupTokenizer(nn.Cell):
    """Tokens by semantic groups for each side, and the global token.

    A global token of all groups is a G token; U's groups enter its first layer by a product of their own, which is a
    component of the state.

    Args:
        users, groups: widths of each side's groups.
        counts: (U, G) tokens, global tokens counted.
        global_token: none, candidate or per_side.
    """

    def __init__(self, users: dict[str, int], groups: dict[str, int], counts: Shape, width: int, *,
                 named: dict[str, int], global_token: str, hidden: int | None,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        options = {"hidden": hidden, "compute_dtype": compute_dtype}
        both = global_token == "per_side"
        self.bundles, self.sides = [], []
        for own, count, extra in ((users, counts[0], both), (groups, counts[1], global_token != "none")):
            bundles = allot(list(own), count - int(extra), named)
            self.bundles.append(tuple(len(names) for names, _ in bundles))
            widths = [sum(own[name] for name in names) for names, _ in bundles]
            # The global token in front of U tokens is an ordinary one; that of G also reads U.
            self.sides.append(GroupTokenizer(widths, [made for _, made in bundles], width,
                                             global_token=extra and own is users, **options))
        self.user_side, self.group_side = self.sides
        self.joins = [nn.CellList([Join(size) for size in sizes]) for sizes in self.bundles]
        self.user_joins, self.candidate_joins = self.joins
        self.bundles = tuple(self.bundles)
        del self.sides, self.joins
        self.has_global = global_token != "none"
        if self.has_global:
            wide, total = hidden or width, sum(users.values()) + sum(groups.values())
            self.global_user = dense(sum(users.values()), wide, compute_dtype, bias=False)
            self.global_group = dense(sum(groups.values()), wide, compute_dtype)
            for linear in (self.global_user, self.global_group):
                linear.weight.start = ("normal", math.sqrt(2.0 / (total + wide)))
            self.global_out = dense(hidden, width, compute_dtype) if hidden else None
            self.relu, self.join_users, self.join_candidate = ReLU(), Join(len(users)), Join(len(groups))
            self.add, self.beside = Add(("batch", None)), Beside(0, (None, "batch", None))
        self.wide, self.take, self.stack, self.reshape = hidden or width, Take(), Stack(1), ops.Reshape()

    @property
    def components(self) -> list[Shape]:
        """(c, K) of what `user` gives to `candidate`."""
        return [(1, self.wide)] if self.has_global else []

    def bundled(self, groups: tuple, sizes: tuple, joins: nn.CellList) -> tuple:
        """Neighbouring groups that make tokens together, side by side."""
        result, taken = (), 0
        for number in range(len(sizes)):
            result += (joins[number](*groups[taken:taken + sizes[number]]),)
            taken += sizes[number]
        return result

    def user(self, groups: tuple) -> tuple:
        """(x_uRD, components)."""
        x_uRD, components = self.user_side(*self.bundled(groups, self.bundles[0], self.user_joins)), ()
        if self.has_global:
            components += (self.reshape(self.global_user(self.join_users(*groups)), (1, -1, self.wide)),)
        return x_uRD, components

    def candidate(self, groups: tuple, components: tuple, index_N: Tensor | None) -> Tensor:
        """x_gND, the global token in front."""
        x_gND = self.group_side(*self.bundled(groups, self.bundles[1], self.candidate_joins))
        if not self.has_global:
            return x_gND
        given_ND = self.reshape(self.take.full(components[0], index_N), (-1, self.wide))
        made_ND = self.add(self.global_group(self.join_candidate(*groups)), given_ND)
        if self.global_out is not None:
            made_ND = self.global_out(self.relu(made_ND))
        return self.beside(self.stack(made_ND), x_gND)


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
        # A lower layer's tokens can be added where they are still as many.
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

    def check_experts(self, parallel: ParallelConfig) -> None:
        check_routed_experts(self.settings.moe, parallel)

    def _counts(self, users: dict[str, int], groups: dict[str, int], place: str) -> Shape:
        settings, extra = self.settings, int(place != "none")
        named = settings.group_tokens
        natural = (sum(named.get(name, 1) for name in users) + int(place == "per_side"),
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
        return SeparatedBlock(settings, before, (own, heads - own), self.layout, compute_dtype)

    @property
    def auxiliary_weight(self) -> float:
        return self.settings.auxiliary_weight if self.auxiliary_layers else 0.0
