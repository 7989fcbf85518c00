"""A per-token SwiGLU whose first products are sums of a user's part and a candidate's part."""

from __future__ import annotations

import math

from mindspore import Tensor, nn
from mindspore import dtype as mstype

from parallel.layers.fused import FusedLinear, library
from parallel.layers.grouped import Add, GroupedLinear, Swish, TokenLayout
from recsys.ug_sep.layers import Take


class SplitSwiGLU(nn.Cell):
    """A per-token SwiGLU whose input comes in two parts: what U gives, and what comes from the candidate.

    The first products are sums over both parts; `user` gives U's summands, `candidate` the result.
    """

    def __init__(self, tokens: int, user: int, candidate: int, inner: int, outputs: int, *, layout: TokenLayout,
                 down_gain: float, compute_dtype: mstype) -> None:
        super().__init__()

        def first(inputs: int) -> GroupedLinear:
            # The start is that of one matrix with user + candidate rows.
            gain = math.sqrt((inputs + inner) / (user + candidate + inner))
            return GroupedLinear(tokens, inputs, inner, style="column", gain=gain, layout=layout, bias=False,
                                 compute_dtype=compute_dtype)

        self.gate_user, self.up_user = first(user), first(user)
        self.gate_group, self.up_group = first(candidate), first(candidate)
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
