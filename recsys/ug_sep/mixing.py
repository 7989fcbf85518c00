"""Token mixing of user and candidate tokens apart, and its reverse: in slices, and with masks on full tensors.

Shapes: R rows of U, N rows of G, T = c_u + c_g tokens, H = h_u + h_g mixing heads (and mixed tokens), D width, d = D /
H, M = T d width of a mixed token. A mixed token's columns are T slices of d, U tokens' first; a token's columns are H
slices of d, U heads first.
"""

from __future__ import annotations

from mindspore import Tensor, nn

from parallel.layers.grouped import TokenLayout
from recsys.layers.mixing import TokenMixing
from recsys.ug_sep.layers import Beside, Mask, Shape, Widths


class TwoSidedMixing(nn.Cell):
    """Mix(X): heads of tokens become mixed tokens, of which U ones read U tokens only.

    Args:
        counts: (c_u, c_g).
        heads: (h_u, h_g).
        width: D.
        masked: false lets U mixed tokens read the candidate in the form with masks (ablation).
    """

    def __init__(self, counts: Shape, heads: Shape, width: int, layout: TokenLayout, masked: bool) -> None:
        super().__init__()
        (c_u, c_g), (h_u, h_g) = counts, heads
        tokens, mixed, d = c_u + c_g, h_u + h_g, width // (h_u + h_g)
        self.split_heads = Widths((h_u * d, h_g * d), layout.stream)
        self.mix_own, self.mix_given = (TokenMixing(c_u, count, count * d, layout=layout) for count in heads)
        self.mix_candidate = TokenMixing(c_g, h_g, h_g * d, layout=layout)
        self.mix = TokenMixing(tokens, mixed, width, layout=layout)
        self.mask = Mask((mixed, tokens * d), h_u, c_u * d, masked)

    def user(self, own_uRK: Tensor, given_uRK: Tensor) -> tuple:
        """(U's part of the U mixed tokens [h_u, R, c_u d], of the G mixed tokens [h_g, R, c_u d]) from the two kinds of
        heads of U tokens, [c_u, R, h_u d] and [c_u, R, h_g d], which `split_heads` gives."""
        return self.mix_own(own_uRK), self.mix_given(given_uRK)

    def candidate(self, x_gND: Tensor) -> Tensor:
        """G's part of the G mixed tokens, [h_g, N, c_g d]."""
        _, heads = self.split_heads(x_gND)
        return self.mix_candidate(heads)

    def masked(self, x_TBD: Tensor) -> Tensor:
        """[H, B, M]."""
        return self.mask(self.mix(x_TBD))


class TwoSidedReverting(nn.Cell):
    """Revert(H): mixed tokens become tokens again, of which U ones take U mixed tokens only.

    Args:
        counts, heads, width, masked: as of `TwoSidedMixing`.
    """

    def __init__(self, counts: Shape, heads: Shape, width: int, layout: TokenLayout, masked: bool) -> None:
        super().__init__()
        (c_u, c_g), (h_u, h_g) = counts, heads
        tokens, mixed, d = c_u + c_g, h_u + h_g, width // (h_u + h_g)
        self.split_tokens = Widths((c_u * d, c_g * d), layout.stream)
        self.revert_own, self.revert_given = (TokenMixing(count, h_u, h_u * d, reverting=True, layout=layout)
                                              for count in counts)
        self.revert_candidate = TokenMixing(c_g, h_g, h_g * d, reverting=True, layout=layout)
        self.beside = Beside(2, layout.stream)
        self.revert = TokenMixing(tokens, mixed, width, reverting=True, layout=layout)
        self.mask = Mask((tokens, width), c_u, h_u * d, masked)

    def user(self, h_huRM: Tensor) -> tuple:
        """(what U tokens take back [c_u, R, h_u d], what G tokens take of U mixed tokens [c_g, R, h_u d])."""
        own, given = self.split_tokens(h_huRM)
        return self.revert_own(own), self.revert_given(given)

    def candidate(self, given_gNK: Tensor, back_hgNK: Tensor) -> Tensor:
        """[c_g, N, D]: from what U gave and G's columns of the G mixed tokens [h_g, N, c_g d]."""
        return self.beside(given_gNK, self.revert_candidate(back_hgNK))

    def masked(self, h_HBM: Tensor) -> Tensor:
        """[T, B, D]."""
        return self.mask(self.revert(h_HBM))
