"""Feed-forward network, sharded over its width. Shapes: N tokens, D width, F feed-forward width."""

from __future__ import annotations

from mindspore import Tensor
from mindspore import dtype as mstype

from parallel.layers.activation import GELU, Gelu
from parallel.layers.linear import Linear
from parallel.sharding.layout import Layer


class FeedForward(Layer):
    """GELU(x W1 + b1) W2 + b2.

    Args:
        width: D.
        inner: F.
        mapping_std: sigma of W1's start.
        projection_std: sigma of W2's start.
        gelu: which GELU.
        compute_dtype: type of the matmuls.

    Source: PanGu-alpha eq. 4. W1 is column-parallel and W2 row-parallel: one AllReduce forward.
    """

    def __init__(self, width: int, inner: int, *, mapping_std: float, projection_std: float, gelu: Gelu = "tanh",
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.mapping = Linear(width, inner, style="column", std=mapping_std, compute_dtype=compute_dtype)
        self.gelu = GELU(gelu)
        self.projection = Linear(inner, width, style="row", std=projection_std, compute_dtype=compute_dtype)

    def construct(self, x_ND: Tensor) -> Tensor:
        return self.projection(self.gelu(self.mapping(x_ND)))
