"""Parameter-free token mixing and its inverse. Shapes: T tokens, H mixing heads, B batch, D width, K = D / H."""

from __future__ import annotations

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from parallel.common.errors import UserError
from parallel.layers.fused import FusedTokenMix, library
from parallel.layers.grouped import WIDTH_LAYOUT, TokenLayout
from parallel.sharding.layout import Axes, Layer, OpSharding


class TokenMixing(Layer):
    """h_HBM with M = T K: head h of every token, side by side (RankMixer eq. 3-4, TokenMixer-Large eq. 9-11).

    The inverse (`reverting=True`, TokenMixer-Large eq. 13-15) brings [H, B, T K] back to [T, B, H K]. Both are the same
    exchange of two dims with the roles of T and H swapped; at H = T mixing is its own inverse.

    Args:
        tokens: T.
        heads: H.
        width: D, that of the original tokens.
        reverting: whether this is the way back.
        layout: what tensor parallelism shards.

    Raises:
        UserError: H does not divide D.
    """

    def __init__(self, tokens: int, heads: int, width: int, *, reverting: bool = False,
                 layout: TokenLayout = WIDTH_LAYOUT) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"the mixing heads must divide the width {width}", where="model.heads", value=heads,
                            hint="the default is one head for each token")
        self.sources, self.targets = (heads, tokens) if reverting else (tokens, heads)
        self.piece = width // heads
        self.layout = layout
        self.reshape, self.transpose = ops.Reshape(), ops.Transpose()
        kernels = library(mstype.float32)
        self.fused = FusedTokenMix(kernels) if kernels is not None else None

    def construct(self, x_SBE: Tensor) -> Tensor:
        batch = x_SBE.shape[1]
        pieces_SBRK = self.reshape(x_SBE, (self.sources, batch, self.targets, self.piece))
        if self.fused is not None and x_SBE.dtype == mstype.float32:
            pieces_RBSK = self.fused(pieces_SBRK)
        else:
            pieces_RBSK = self.transpose(pieces_SBRK, (2, 1, 0, 3))
        return self.reshape(pieces_RBSK, (self.targets, batch, self.sources * self.piece))

    def redistributes(self, axes: Axes) -> bool:
        return self.layout.tokens is not None and axes.sizes["feature_tokens"] > 1

    def sharding(self) -> list[OpSharding]:
        tokens, batch, _ = self.layout.stream
        return [OpSharding(self.transpose, ((tokens, batch, None, None),))]
