"""What ReLU-gated experts give, from only the pairs of a row and an expert whose gates are open, in static shapes.

Shapes: T tokens, B batch, D width, E experts of a token, F inner width of them together, f = F / E, O outputs, S
sections (devices of the op axis that hold tokens of their own), M = T E B / S pairs of a section.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from parallel.layers.activation import GELU
from parallel.layers.experts.routed import ExpertProduct
from parallel.layers.grouped import WIDTH_LAYOUT, TokenLayout
from parallel.sharding.layout import Axes, Layer, OpSharding


class OpenExperts(Layer):
    """v_TBO = sum_j G_j (GELU(s W1_j + b1_j) W2_j + b2_j) without the biases b2, for a network that is not trained.

    A section's pairs are sorted: the open ones first, by token, expert and row, then the shut ones. Ascend's
    GroupedMatmul multiplies the rows in front of the last end alone, so its work is that of the open pairs, while all
    shapes are those of the worst case, all gates open: nothing is dropped whatever the gates are. What stands in the
    rows behind the last end is never read.

    Args:
        tokens, experts: T, E.
        layout: what tensor parallelism shards.

    It `fits` one device and a mesh of op alone that shards tokens. The first weight is brought from [T, D, F] into
    [T, E, D, f] in every call.
    """

    def __init__(self, tokens: int, experts: int, *, layout: TokenLayout = WIDTH_LAYOUT) -> None:
        super().__init__()
        self.tokens, self.experts, self.layout, self.sections = tokens, experts, layout, 1
        self.fits = True  # whether the layout is one that this works in
        self.reshape, self.cast, self.order = ops.Reshape(), ops.Cast(), ops.TopK()
        self.flat = ops.Reshape().add_prim_attr("skip_redistribution", True)
        self.turn_gates, self.turn_weight = ops.Transpose(), ops.Transpose()
        self.above, self.lift, self.rank, self.before = ops.Greater(), ops.Mul(), ops.Sub(), ops.Sub()
        self.seen, self.count, self.ends = ops.CumSum(), ops.ReduceSum(), ops.CumSum()
        self.row, self.owner = ops.Gather(), ops.Gather()
        self.take, self.take_bias, self.give = (ops.Gather(batch_dims=1) for _ in range(3))
        self.product1, self.product2, self.add_bias = ExpertProduct(), ExpertProduct(), ops.Add()
        self.gelu = GELU("tanh", (layout.tokens, None))
        self.shut, self.clear, self.weigh, self.total = ops.LessEqual(), ops.MaskedFill(), ops.Mul(), ops.ReduceSum()

    def construct(self, s_TBD: Tensor, gates_TBE: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        tokens, batch, width = s_TBD.shape
        inner, outputs, own = w1.shape[-1] // self.experts, w2.shape[-1], tokens // self.sections
        pairs = own * self.experts * batch
        gates_SM = self.reshape(self.turn_gates(gates_TBE, (0, 2, 1)), (self.sections, pairs))
        order_SM, place_SM, ends_E = self.sorted(self.cast(gates_SM, mstype.float32), batch)
        number = np.arange(pairs, dtype=np.int32)
        row_M, owner_M = Tensor(number // (self.experts * batch) * batch + number % batch), Tensor(number // batch)
        s_SRD = self.reshape(s_TBD, (self.sections, own * batch, width))
        taken_SMD = self.take(s_SRD, self.row(row_M, order_SM, 0), 1)
        w1 = self.turn_weight(self.flat(w1, (-1, width, self.experts, inner)), (0, 2, 1, 3))
        z = self.product1(self.reshape(taken_SMD, (-1, width)), self.flat(w1, (-1, width, inner)), ends_E)
        b1 = self.reshape(b1, (self.sections, own * self.experts, inner))
        b1_SMf = self.take_bias(b1, self.owner(owner_M, order_SM, 0), 1)
        h = self.gelu(self.add_bias(z, self.reshape(b1_SMf, (-1, inner))))
        y = self.product2(h, self.flat(w2, (-1, inner, outputs)), ends_E)
        y_SMO = self.give(self.reshape(y, (self.sections, pairs, outputs)), place_SM, 1)
        gates_SM1 = self.reshape(gates_SM, (self.sections, pairs, 1))
        y_SMO = self.weigh(self.clear(y_SMO, self.shut(gates_SM1, 0.0), self.cast(0.0, y_SMO.dtype)),
                           self.cast(gates_SM1, y_SMO.dtype))
        return self.total(self.reshape(y_SMO, (tokens, self.experts, batch, outputs)), 1)

    def sorted(self, gates_SM: Tensor, batch: int) -> tuple:
        """order_SM: the pair at each place; place_SM: that of each open pair; ends_E: where the pairs of each of all
        tokens' experts end, counted from the first one of their section."""
        pairs = gates_SM.shape[1]
        open_SM = self.cast(self.above(gates_SM, 0.0), mstype.float32)
        # Keys fall with the pair's number; those of the open ones are above 0.
        number_M = Tensor(np.arange(pairs, dtype=np.float32))
        _, order_SM = self.order(self.rank(self.lift(open_SM, 1.0 * pairs), number_M), pairs)
        place_SM = self.before(self.seen(open_SM, 1), open_SM)
        counts = self.count(self.reshape(open_SM, (self.sections, -1, batch)), 2)
        ends_E = self.reshape(self.ends(counts, 1), (self.tokens * self.experts,))
        return order_SM, self.cast(place_SM, mstype.int32), self.cast(ends_E, mstype.int64)

    def apply_sharding(self, axes: Axes) -> None:
        # A weight that comes through a Reshape is cut along its first dim over all devices of a stage.
        self.sections = 1 if self.layout.tokens is None else axes.sizes[self.layout.tokens]
        self.fits = axes.sizes["batch"] == 1 and self.sections == axes.sizes["rows"]
        if not self.fits:
            return
        super().apply_sharding(axes)
        for cell in (self.product1, self.product2):
            cell.product.shard((((self.sections, 1),), ((self.sections, 1, 1),), (self.sections,)))

    def sharding(self) -> list[OpSharding]:
        after = self.layout.tokens_after_batch
        row, plane, cube = ((after,) + (None,) * dims for dims in (1, 2, 3))
        return [OpSharding(self.turn_gates, (plane,)), OpSharding(self.turn_weight, (cube,)),
                OpSharding(self.above, (row, ())), OpSharding(self.lift, (row, ())),
                OpSharding(self.rank, (row, (None,))), OpSharding(self.order, (row,)), OpSharding(self.seen, (row,)),
                OpSharding(self.before, (row, row)), OpSharding(self.count, (plane,)), OpSharding(self.ends, (row,)),
                OpSharding(self.row, ((None,), row)), OpSharding(self.owner, ((None,), row)),
                OpSharding(self.take, (plane, row)), OpSharding(self.take_bias, (plane, row)),
                OpSharding(self.give, (plane, row)), OpSharding(self.add_bias, (row, row)),
                OpSharding(self.shut, (plane, ())), OpSharding(self.clear, (plane, plane, ())),
                OpSharding(self.weigh, (plane, plane)), OpSharding(self.total, (cube,))]
