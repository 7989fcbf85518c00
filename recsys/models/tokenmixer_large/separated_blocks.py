"""Blocks of the separated TokenMixer-Large, one class for each `TokenMixerLargeSettings.block_variant`.

Shapes: R rows of U, N rows of G, T = c_u + c_g tokens, H = h_u + h_g mixing heads (and mixed tokens), D width, d = D /
H, M = T d width of a mixed token, F inner width. A mixed token's columns are T slices of d, U tokens' first; a token's
columns are H slices of d, U heads first.

Which work the masks take away (figure_prenorm): U mixed tokens are 0 from column c_u d on, so their first matrices have
c_u d rows only; of G mixed tokens' results the first c_u d columns would go back to U tokens, so their last matrices
have c_g d columns only; and the share of U heads in G mixed tokens' first products is the same for all candidates of a
request, so it is a component of the state.
"""

from __future__ import annotations

from mindspore import Tensor, nn
from mindspore import dtype as mstype

from parallel.layers.grouped import Add, TokenLayout
from parallel.layers.norm import RMSNorm
from recsys.models.tokenmixer_large.model import TokenMixerLargeSettings, network
from recsys.ug_sep.compensation import Compensation
from recsys.ug_sep.layers import Beside, Blank, Fill, Repeat, Shape, Take, Widths
from recsys.ug_sep.mixing import TwoSidedMixing, TwoSidedReverting
from recsys.ug_sep.ranker import TwoSidedBlock
from recsys.ug_sep.split_swiglu import SplitSwiGLU


def separated_block(settings: TokenMixerLargeSettings, counts: Shape, heads: Shape, layout: TokenLayout,
                    compute_dtype: mstype) -> SeparatedBlock:
    """A block that keeps the number of tokens.

    Args:
        counts: (c_u, c_g).
        heads: (h_u, h_g).
    """
    if settings.block_variant == "equation_prenorm":
        kind = EquationPrenorm
    elif settings.block_variant == "equation_postnorm":
        kind = EquationPostnorm
    elif settings.inner_residual:
        kind = FigureInnerResidual
    else:
        kind = FigurePrenorm if settings.moe is not None else FigureDense
    return kind(settings, counts, heads, layout, compute_dtype)


class SeparatedBlock(TwoSidedBlock):
    """Base: mixing, networks on mixed tokens, reverting, networks on tokens, for each side and with masks.

    As written here mixed tokens have a pre-norm residual, H + F1(norm H). A variant adds the second half
    (`user_tokens`, `candidate_tokens`, `masked_tokens`) and overrides what it does otherwise.

    Args: as of `separated_block`.
    """

    norms_tokens = False
    """Whether norm1 comes before the mixing; otherwise it is one of mixed tokens."""
    needs_all_columns = False
    """Whether a G mixed token's columns that no token takes back are needed, for a norm over all of them."""
    adds_reverted = False
    """Whether the second network reads X + Revert(H), whose columns of G heads are not zero, and not Revert(H)."""

    def __init__(self, settings: TokenMixerLargeSettings, counts: Shape, heads: Shape, layout: TokenLayout,
                 compute_dtype: mstype) -> None:
        super().__init__()
        separation, width, stream = settings.ug_sep, settings.width, layout.stream
        (c_u, c_g), (h_u, h_g) = self.counts, self.heads = counts, heads
        d = width // (h_u + h_g)
        wide = (c_u + c_g) * d
        self.columns = c_u * d, c_g * d
        self.mixing = TwoSidedMixing(counts, heads, width, layout, separation.mixing_mask)
        self.reverting = TwoSidedReverting(counts, heads, width, layout, separation.reverting_mask)
        norm = {"compute_dtype": compute_dtype, "stream": stream}
        self.norm1, self.norm2 = RMSNorm(width if self.norms_tokens else wide, **norm), RMSNorm(width, **norm)
        self.inner_norm = RMSNorm(wide, **norm) if settings.inner_residual else None
        self.user_rows = self.columns[0] if separation.mixing_mask else wide
        self.shortened = separation.reverting_mask and not self.needs_all_columns
        inner, outputs = round(settings.ratio * wide), self.columns[1] if self.shortened else wide
        self.first_user = network(settings, h_u, self.user_rows, inner, wide, layout, compute_dtype)
        self.first_group = self.first_network(settings, wide, inner, outputs, layout, compute_dtype)
        self.second_rows = h_u * d if separation.reverting_mask and not self.adds_reverted else width
        self.second_user, self.second_group = (
            network(settings, count, rows, round(settings.ratio * width), width, layout, compute_dtype)
            for count, rows in ((c_u, self.second_rows), (c_g, width)))
        self.compensation = None
        if separation.compensation != "none":
            self.compensation = Compensation(separation.compensation, h_u, self.user_rows, c_g, width,
                                             separation.compensation_rank or width, compute_dtype)
        self._make_cells(layout)
        given = self.given_shapes()
        self.returned = len(given)
        self.components = [*given, (c_g, h_u * d)]
        if self.compensation is not None:
            self.components.append(self.compensation.shape)

    def _make_cells(self, layout: TokenLayout) -> None:
        stream = layout.stream
        self.take, self.repeat = Take(), Repeat(self.counts[1])
        self.beside_mixed, self.beside_blank, self.blank = Beside(2, stream), Beside(2, stream), Blank(stream)
        self.fill_user, self.fill_candidate = Fill(0, self.columns[1], stream), Fill(self.columns[0], 0, stream)
        self.join_tokens = Beside(0, stream)
        self.add_user_mixed, self.add_candidate_mixed = Add(stream), Add(stream)
        self.add_user_reverted, self.add_candidate_reverted = Add(stream), Add(stream)
        self.add_user, self.add_candidate, self.add_compensation = Add(stream), Add(stream), Add(stream)

    def first_network(self, settings: TokenMixerLargeSettings, wide: int, inner: int, outputs: int,
                      layout: TokenLayout, compute_dtype: mstype) -> nn.Cell:
        """The network of the G mixed tokens, from M to `outputs`."""
        return network(settings, self.heads[1], wide, inner, outputs, layout, compute_dtype)

    def given_shapes(self) -> list[Shape]:
        """(c, K) of what `given` returns."""
        return [(self.heads[1], self.columns[0])]

    # -- U ------------------------------------------------------------------------------------------------------------

    def user(self, x_uRD: Tensor, index_N: Tensor | None = None) -> tuple:
        """(x_uRD, components: what `given` returns, U mixed tokens' results for G tokens [c_g, R, h_u d], compensation
        if any; 0)."""
        own_uRK, other_uRK = self.mixing.split_heads(self.entering(x_uRD))
        own_huRK, given_hgRK = self.mixing.user(own_uRK, other_uRK)
        back_uRK, returned_gRK = self.reverting.user(self.user_mixed(own_huRK))
        components = self.given(given_hgRK) + (returned_gRK,)
        if self.compensation is not None:
            components += (self.compensation(own_huRK),)
        return self.user_tokens(x_uRD, back_uRK, other_uRK), components, 0.0

    def entering(self, x_TBD: Tensor) -> Tensor:
        """What is mixed."""
        return self.norm1(x_TBD) if self.norms_tokens else x_TBD

    def given(self, given_hgRK: Tensor) -> tuple:
        """U's part of the G mixed tokens, or of what their network makes of it."""
        return (given_hgRK,)

    def norm_mixed(self, h_HBM: Tensor) -> Tensor:
        """The norm of mixed tokens."""
        return self.norm1(h_HBM)

    def user_mixed(self, own_huRK: Tensor) -> Tensor:
        """[h_u, R, M]: what becomes of the U mixed tokens, whose columns from c_u d on are zero."""
        h_huRM = self.fill_user(own_huRK)
        normed, _ = self.reverting.split_tokens(self.norm_mixed(h_huRM))
        return self.add_user_mixed(h_huRM, self.first_user(normed))

    # -- G ------------------------------------------------------------------------------------------------------------

    def candidate(self, x_gND: Tensor, components: tuple, index_N: Tensor | None) -> tuple:
        """(x_gND, 0): a candidate's tokens, given the user's components."""
        back_hgNK = self.candidate_mixed(self.mixing.candidate(self.entering(x_gND)), components, index_N)
        y_gND = self.reverting.candidate(self.take.full(components[self.returned], index_N), back_hgNK)
        if self.compensation is not None:
            x_gND = self.add_compensation(x_gND, self.take.full(self.repeat(components[-1]), index_N))
        return self.candidate_tokens(x_gND, y_gND), 0.0

    def candidate_mixed(self, g_hgNK: Tensor, components: tuple, index_N: Tensor | None) -> Tensor:
        """[h_g, N, c_g d]: what becomes of the G mixed tokens, only the columns that G tokens take back."""
        h_hgNM = self.beside_mixed(self.take.full(components[0], index_N), g_hgNK)
        return self.add_candidate_mixed(g_hgNK, self.first_group(self.norm_mixed(h_hgNM)))

    # -- with masks ---------------------------------------------------------------------------------------------------

    def masked(self, x_TBD: Tensor) -> tuple:
        """(x_TBD, ()): the same by masks on full tensors; the only form that runs without one of them."""
        c_u, h_u = self.counts[0], self.heads[0]
        h_HBM = self.mixing.masked(self.entering(x_TBD))
        y_TBD = self.reverting.masked(self.masked_mixed(h_HBM))
        if self.compensation is not None:
            extra = self.repeat(self.compensation(h_HBM[:h_u, :, :self.user_rows]))
            x_TBD = self.join_tokens(x_TBD[:c_u], x_TBD[c_u:] + extra)
        return self.masked_tokens(x_TBD, y_TBD), ()

    def masked_mixed(self, h_HBM: Tensor) -> Tensor:
        """[H, B, M]: what becomes of all mixed tokens."""
        return h_HBM + self.first(self.norm_mixed(h_HBM))

    def first(self, h_HBM: Tensor) -> Tensor:
        """The networks of all mixed tokens; columns that no token takes back are zero."""
        h_u = self.heads[0]
        own, back = self.first_user(h_HBM[:h_u, :, :self.user_rows]), self.first_candidate(h_HBM[h_u:])
        return self.join_tokens(own, self.fill_candidate(back) if self.shortened else back)

    def first_candidate(self, h_hgBM: Tensor) -> Tensor:
        """The network of the G mixed tokens."""
        return self.first_group(h_hgBM)

    def second(self, x_TBD: Tensor) -> Tensor:
        """The networks of all tokens."""
        c_u = self.counts[0]
        return self.join_tokens(self.second_user(x_TBD[:c_u, :, :self.second_rows]), self.second_group(x_TBD[c_u:]))


class EquationPrenorm(SeparatedBlock):
    """H + F1(norm H) with H = Mix(X), then X + F2(norm Revert(H))."""

    def __init__(self, settings: TokenMixerLargeSettings, counts: Shape, heads: Shape, layout: TokenLayout,
                 compute_dtype: mstype) -> None:
        super().__init__(settings, counts, heads, layout, compute_dtype)
        d = settings.width // sum(heads)
        self.split_normed = Widths((heads[0] * d, heads[1] * d), layout.stream)

    def user_tokens(self, x_uRD: Tensor, back_uRK: Tensor, other_uRK: Tensor) -> Tensor:
        """X + F2(norm Revert(H)); columns of G heads, shaped like `other_uRK`, get nothing back."""
        normed, _ = self.split_normed(self.norm2(self.beside_blank(back_uRK, self.blank(other_uRK))))
        return self.add_user(x_uRD, self.second_user(normed))

    def candidate_tokens(self, x_gND: Tensor, y_gND: Tensor) -> Tensor:
        """X + F2(norm Y)."""
        return self.add_candidate(x_gND, self.second_group(self.norm2(y_gND)))

    def masked_tokens(self, x_TBD: Tensor, y_TBD: Tensor) -> Tensor:
        """X + F2(norm Y)."""
        return x_TBD + self.second(self.norm2(y_TBD))


class EquationPostnorm(SeparatedBlock):
    """norm(F1(H) + H) with H = Mix(X), then norm(F2(Revert(H)) + X)."""

    needs_all_columns = True

    def user_mixed(self, own_huRK: Tensor) -> Tensor:
        """[h_u, R, M]: norm(F1(H) + H)."""
        return self.norm1(self.add_user_mixed(self.first_user(own_huRK), self.fill_user(own_huRK)))

    def user_tokens(self, x_uRD: Tensor, back_uRK: Tensor, other_uRK: Tensor) -> Tensor:
        """norm(F2(Revert(H)) + X)."""
        return self.norm2(self.add_user(self.second_user(back_uRK), x_uRD))

    def candidate_mixed(self, g_hgNK: Tensor, components: tuple, index_N: Tensor | None) -> Tensor:
        """[h_g, N, c_g d]: G's columns of norm(F1(H) + H)."""
        h_hgNM = self.beside_mixed(self.take.full(components[0], index_N), g_hgNK)
        _, back = self.reverting.split_tokens(self.norm1(self.add_candidate_mixed(self.first_group(h_hgNM), h_hgNM)))
        return back

    def candidate_tokens(self, x_gND: Tensor, y_gND: Tensor) -> Tensor:
        """norm(F2(Y) + X)."""
        return self.norm2(self.add_candidate(self.second_group(y_gND), x_gND))

    def masked_mixed(self, h_HBM: Tensor) -> Tensor:
        """[H, B, M]: norm(F1(H) + H)."""
        return self.norm1(self.first(h_HBM) + h_HBM)

    def masked_tokens(self, x_TBD: Tensor, y_TBD: Tensor) -> Tensor:
        """norm(F2(Y) + X)."""
        return self.norm2(self.second(y_TBD) + x_TBD)


class FigureInnerResidual(SeparatedBlock):
    """X' = X + Revert(H + F1(norm H)) with H = Mix(norm X), then X' + F2(norm X')."""

    norms_tokens = True
    adds_reverted = True

    def norm_mixed(self, h_HBM: Tensor) -> Tensor:
        """The norm of mixed tokens."""
        return self.inner_norm(h_HBM)

    def user_tokens(self, x_uRD: Tensor, back_uRK: Tensor, other_uRK: Tensor) -> Tensor:
        """X' + F2(norm X'); columns of G heads, shaped like `other_uRK`, get nothing back."""
        x_uRD = self.add_user_reverted(x_uRD, self.beside_blank(back_uRK, self.blank(other_uRK)))
        return self.add_user(x_uRD, self.second_user(self.norm2(x_uRD)))

    def candidate_tokens(self, x_gND: Tensor, y_gND: Tensor) -> Tensor:
        """X' + F2(norm X') with X' = X + Y."""
        x_gND = self.add_candidate_reverted(x_gND, y_gND)
        return self.add_candidate(x_gND, self.second_group(self.norm2(x_gND)))

    def masked_tokens(self, x_TBD: Tensor, y_TBD: Tensor) -> Tensor:
        """X' + F2(norm X') with X' = X + Y."""
        x_TBD = x_TBD + y_TBD
        return x_TBD + self.second(self.norm2(x_TBD))


class FigurePrenorm(FigureInnerResidual):
    """X' = X + Revert(F1(Mix(norm X))), then X' + F2(norm X')."""

    def user_mixed(self, own_huRK: Tensor) -> Tensor:
        """[h_u, R, M]: F1(H)."""
        return self.first_user(own_huRK)

    def candidate_mixed(self, g_hgNK: Tensor, components: tuple, index_N: Tensor | None) -> Tensor:
        """[h_g, N, c_g d]: G's columns of F1(H)."""
        return self.first_group(self.beside_mixed(self.take.full(components[0], index_N), g_hgNK))

    def masked_mixed(self, h_HBM: Tensor) -> Tensor:
        """[H, B, M]: F1(H)."""
        return self.first(h_HBM)


class FigureDense(FigurePrenorm):
    """`FigurePrenorm` without experts: of the G mixed tokens' first products U's part is computed once a request."""

    def first_network(self, settings: TokenMixerLargeSettings, wide: int, inner: int, outputs: int,
                      layout: TokenLayout, compute_dtype: mstype) -> nn.Cell:
        """The network of the G mixed tokens, from M to `outputs`."""
        return SplitSwiGLU(self.heads[1], *self.columns, inner, outputs, layout=layout, down_gain=settings.down_gain,
                           compute_dtype=compute_dtype)

    def given_shapes(self) -> list[Shape]:
        """(c, K) of what `given` returns."""
        return [(self.heads[1], self.first_group.gate_user.outputs)] * 2

    def given(self, given_hgRK: Tensor) -> tuple:
        """U's part of both first products of the G mixed tokens, [h_g, R, F] each."""
        return self.first_group.user(given_hgRK)

    def candidate_mixed(self, g_hgNK: Tensor, components: tuple, index_N: Tensor | None) -> Tensor:
        """[h_g, N, c_g d]: G's columns of F1(H)."""
        return self.first_group.candidate(components[0], components[1], g_hgNK, index_N)

    def first_candidate(self, h_hgBM: Tensor) -> Tensor:
        """The network of the G mixed tokens."""
        given, own = self.reverting.split_tokens(h_hgBM)
        gate, up = self.first_group.user(given)
        return self.first_group.candidate(gate, up, own, None)
