"""What the rows of a mixture's tokens get of their chosen experts, in static shapes: padded, or sorted by expert.

Shapes: T tokens, B batch, D width, R routed experts of a token, E = T R, A experts chosen, F inner width of one expert,
C capacity, G data-parallel parts of the batch, N pairs of a row and an expert that it chose, S slots.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import GroupedMatmul

from parallel.layers.grouped import WIDTH_LAYOUT, Swish, TokenLayout
from parallel.sharding.layout import Axes, Layer, Operand, OpSharding


def routed_weight(layout: TokenLayout) -> Operand:
    """How a weight [T, E, ., .] of the routed experts is sharded."""
    return (layout.tokens, "experts", None, None)


class CapacityExperts(Layer):
    """y_TBD: the sum of the chosen experts' SwiGLUs of their rows times their gates, padded: in training each expert
    takes at most C rows of each data-parallel part, and rows beyond that get nothing from it. In inference C is the
    samples of the part: every row gets its experts.

    Args:
        tokens: T.
        experts: R.
        factor: C = ceil(factor x rows / R) in training; factor >= R drops nothing.
        layout: what tensor parallelism shards.

    The batch is seen as G parts, one a device of the data axis, so that routing needs no exchange; the only exchanges
    are those that bring the rows to the devices that hold their experts and back (expert parallelism).
    """

    def __init__(self, tokens: int, experts: int, factor: float, *, layout: TokenLayout = WIDTH_LAYOUT) -> None:
        super().__init__()
        self.tokens, self.experts, self.factor, self.layout, self.parts = tokens, experts, factor, layout, 1
        self.reshape, self.order, self.cast = ops.Reshape(), ops.TopK(), ops.Cast()
        self.same, self.expand = ops.Equal(), ops.ExpandDims()
        self.turn_rows, self.turn_chosen, self.turn_back = ops.Transpose(), ops.Transpose(), ops.Transpose()
        self.there, self.back = ops.Transpose(), ops.Transpose()
        self.pick, self.pick_order, self.pick_back = (ops.Gather(batch_dims=2) for _ in range(3))
        self.count, self.seen, self.starts = ops.ReduceSum(), ops.CumSum(), ops.CumSum()
        self.own, self.own_sum, self.keep = ops.Mul(), ops.ReduceSum(), ops.Mul()
        self.fit, self.total, self.turn_gates = ops.Mul(), ops.ReduceSum(), ops.Transpose()
        self.product1, self.product2, self.product3 = ops.BatchMatMul(), ops.BatchMatMul(), ops.BatchMatMul()
        self.swish = Swish((layout.tokens, "experts", "data_in_expert", None))

    def construct(self, x_TBD: Tensor, chosen_TBA: Tensor, gates_TBA: Tensor, gate: Tensor, up: Tensor,
                  down: Tensor) -> Tensor:
        return self.padded(x_TBD, chosen_TBA, gates_TBA, gate, up, down)

    def padded(self, x_TBD: Tensor, chosen_TBA: Tensor, gates_TBA: Tensor, gate: Tensor, up: Tensor,
               down: Tensor) -> Tensor:
        """The result by products over C rows of every expert."""
        tokens, batch, width = x_TBD.shape
        active, parts = chosen_TBA.shape[2], self.parts
        rows = batch // parts * active
        capacity = min(rows, -int(-self.factor * rows // self.experts))
        if not self.training:  # a sample chooses an expert once
            capacity = batch // parts
        chosen_GTN = self.turn_chosen(self.reshape(chosen_TBA, (tokens, parts, rows)), (1, 0, 2))
        read_GTS, slot_GTN, fits_GTN = self.plan(chosen_GTN, rows, capacity, active)
        x_GTBD = self.turn_rows(self.reshape(x_TBD, (tokens, parts, batch // parts, width)), (1, 0, 2, 3))
        taken = self.reshape(self.pick(x_GTBD, read_GTS, 2), (parts, tokens, self.experts, capacity, width))
        taken = self.reshape(self.there(taken, (1, 2, 0, 3, 4)), (tokens, self.experts, parts * capacity, width))
        y = self.product3(self.swish(self.product1(taken, gate), self.product2(taken, up)), down)
        outputs = down.shape[-1]
        y = self.back(self.reshape(y, (tokens, self.experts, parts, capacity, outputs)), (2, 0, 1, 3, 4))
        y_GTND = self.pick_back(self.reshape(y, (parts, tokens, self.experts * capacity, outputs)), slot_GTN, 2)
        gates_GTN = self.turn_gates(self.reshape(gates_TBA, (tokens, parts, rows)), (1, 0, 2))
        return self.weighed(y_GTND, self.fit(gates_GTN, self.cast(fits_GTN, gates_GTN.dtype)), active)

    def weighed(self, y_GTND: Tensor, gates_GTN: Tensor, active: int) -> Tensor:
        """[T, B, D]: the sums over a sample's pairs of their results times their gates."""
        parts, tokens, rows, outputs = y_GTND.shape
        y_GTND = self.keep(y_GTND, self.reshape(gates_GTN, (parts, tokens, rows, 1)))
        y_GTBD = self.total(self.reshape(y_GTND, (parts, tokens, rows // active, active, outputs)), 3)
        return self.reshape(self.turn_back(y_GTBD, (1, 0, 2, 3)), (tokens, parts * (rows // active), outputs))

    def ranked(self, chosen_GTN: Tensor, rows: int) -> tuple:
        """order_GTN: pairs in the order of their experts; hot_GTNR: 1 where a pair is an expert's; counts_GTR,
        starts_GTR: pairs of each expert, and of those before it; nth_GTN: of its expert's pairs, those before a pair.
        """
        number_GTN = self.cast(chosen_GTN, mstype.float32)
        # Descending (expert, position) keys: the k-th largest is the k-th pair in the order of the experts.
        _, order_GTN = self.order(number_GTN * (-1.0 * rows) - Tensor(np.arange(rows, dtype=np.float32)), rows)
        experts_R = Tensor(np.arange(self.experts, dtype=np.int32))
        hot_GTNR = self.cast(self.same(self.expand(chosen_GTN, -1), experts_R), mstype.float32)
        counts_GTR = self.count(hot_GTNR, 2)
        starts_GTR = self.starts(counts_GTR, 2) - counts_GTR
        nth_GTN = self.own_sum(self.own(self.seen(hot_GTNR, 2), hot_GTNR), 3) - 1.0
        return order_GTN, hot_GTNR, counts_GTR, starts_GTR, nth_GTN

    def plan(self, chosen_GTN: Tensor, rows: int, capacity: int, active: int) -> tuple:
        """read_GTS: the row that slot s = (expert, c) reads; slot_GTN: where a pair's result is; fits_GTN: whether
        it has a slot at all."""
        shape = (self.parts, self.tokens, self.experts * capacity)
        order_GTN, _, _, starts_GTR, nth_GTN = self.ranked(chosen_GTN, rows)
        starts_GTR1 = self.reshape(starts_GTR, (*shape[:2], self.experts, 1))
        # Beyond an expert's last pair any pair will do: nothing reads its slot.
        place = ops.minimum(starts_GTR1 + Tensor(np.arange(capacity, dtype=np.float32)), rows - 1.0)
        read_GTS = self.pick_order(order_GTN, self.reshape(self.cast(place, mstype.int32), shape), 2) // active
        slot_GTN = self.cast(chosen_GTN, mstype.float32) * (1.0 * capacity) + ops.minimum(nth_GTN, capacity - 1.0)
        return read_GTS, self.cast(slot_GTN, mstype.int32), nth_GTN < 1.0 * capacity

    def apply_sharding(self, axes) -> None:
        self.parts = axes.sizes["batch"]
        super().apply_sharding(axes)

    def redistributes(self, axes: Axes) -> bool:
        return axes.sizes["experts"] > 1  # rows go to the devices of their experts and back

    def sharding(self) -> list[OpSharding]:
        token, after = self.layout.tokens, self.layout.tokens_after_batch
        row, plane, cube = (("batch", after) + (None,) * dims for dims in (1, 2, 3))
        expert, weight = (token, "experts", "data_in_expert", None), routed_weight(self.layout)
        return [OpSharding(self.turn_chosen, ((token, "batch", None),)),
                OpSharding(self.turn_rows, ((token, "batch", None, None),)), OpSharding(self.turn_back, (plane,)),
                OpSharding(self.there, (cube,)), OpSharding(self.back, ((token, None, "batch", None, None),)),
                OpSharding(self.order, (row,)), OpSharding(self.expand, (row,)),
                OpSharding(self.same, (plane, (None,))), OpSharding(self.count, (plane,)),
                OpSharding(self.seen, (plane,)), OpSharding(self.fit, (row, row)), OpSharding(self.total, (cube,)),
                OpSharding(self.turn_gates, ((token, "batch", None),)), OpSharding(self.starts, (row,)),
                OpSharding(self.pick, (plane, row)), OpSharding(self.pick_order, (row, row)),
                OpSharding(self.pick_back, (plane, row)), OpSharding(self.own, (plane, plane)),
                OpSharding(self.own_sum, (plane,)), OpSharding(self.keep, (plane, plane)),
                *(OpSharding(product, (expert, weight)) for product in (self.product1, self.product2, self.product3))]


class ExpertProduct(nn.Cell):
    """y_NO = rows of x_NI times the weight of the expert that they belong to, w_EIO: Ascend's GroupedMatmul.

    Rows are sorted by expert; ends_E int64 says where each expert's rows end. No gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        # One tensor of all rows in, one out, cut along the rows.
        self.product = GroupedMatmul(split_item=3, group_type=0)

    def construct(self, x_NI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
        return self.product([x_NI], [w_EIO], None, None, None, None, None, ends_E)[0]


class DroplessExperts(CapacityExperts):
    """As `CapacityExperts`, but a network that is used sorts its rows by expert and multiplies just them: the same
    static shapes whatever is chosen, no padding, none dropped. While it trains, and where the batch lies in several
    data-parallel parts, it is padded.

    Its product knows the operator's devices: Ascend 910B and later (the chips with bfloat16). Each device of the op
    axis counts rows from its own first one, since the partitioner cuts `ends_E` and leaves its values as they are.
    """

    def __init__(self, tokens: int, experts: int, factor: float, *, layout: TokenLayout = WIDTH_LAYOUT) -> None:
        super().__init__(tokens, experts, factor, layout=layout)
        self.sections = 1
        self.flat = ops.Reshape().add_prim_attr("skip_redistribution", True)
        self.grouped1, self.grouped2, self.grouped3 = ExpertProduct(), ExpertProduct(), ExpertProduct()
        self.gated = Swish((layout.tokens, None))
        self.first, self.first_sum, self.ends = ops.Mul(), ops.ReduceSum(), ops.CumSum()

    def construct(self, x_TBD: Tensor, chosen_TBA: Tensor, gates_TBA: Tensor, gate: Tensor, up: Tensor,
                  down: Tensor) -> Tensor:
        if self.training or self.parts > 1:
            return self.padded(x_TBD, chosen_TBA, gates_TBA, gate, up, down)
        tokens, batch, width = x_TBD.shape
        active = chosen_TBA.shape[2]
        rows, all_experts = batch * active, self.tokens * self.experts
        chosen_GTN = self.turn_chosen(self.reshape(chosen_TBA, (tokens, 1, rows)), (1, 0, 2))
        order_GTN, hot_GTNR, counts_GTR, starts_GTR, nth_GTN = self.ranked(chosen_GTN, rows)
        x_GTBD = self.turn_rows(self.reshape(x_TBD, (tokens, 1, batch, width)), (1, 0, 2, 3))
        taken_ND = self.reshape(self.pick(x_GTBD, order_GTN // active, 2), (tokens * rows, width))
        ends = self.ends(self.reshape(counts_GTR, (self.sections, all_experts // self.sections)), 1)
        ends_E = self.cast(self.reshape(ends, (all_experts,)), mstype.int64)
        inner = self.gated(self.grouped1(taken_ND, self.flat(gate, (-1, *gate.shape[2:])), ends_E),
                           self.grouped2(taken_ND, self.flat(up, (-1, *up.shape[2:])), ends_E))
        y_NO = self.grouped3(inner, self.flat(down, (-1, *down.shape[2:])), ends_E)
        before = self.first_sum(self.first(hot_GTNR, self.reshape(starts_GTR, (1, tokens, 1, self.experts))), 3)
        y_GTNO = self.pick_back(self.reshape(y_NO, (1, tokens, rows, down.shape[-1])),
                                self.cast(before + nth_GTN, mstype.int32), 2)
        gates_GTN = self.turn_gates(self.reshape(gates_TBA, (tokens, 1, rows)), (1, 0, 2))
        return self.weighed(y_GTNO, gates_GTN, active)

    def apply_sharding(self, axes: Axes) -> None:
        super().apply_sharding(axes)
        if self.parts > 1:
            return
        self.sections = 1 if self.layout.tokens is None else axes.sizes[self.layout.tokens]
        for cell in (self.grouped1, self.grouped2, self.grouped3):
            cell.product.shard((((self.sections, 1),), ((self.sections, 1, 1),), (self.sections,)))

    def sharding(self) -> list[OpSharding]:
        after = self.layout.tokens_after_batch
        plane = ("batch", after, None, None)
        return [*super().sharding(), OpSharding(self.first, (plane, plane)), OpSharding(self.first_sum, (plane,)),
                OpSharding(self.ends, ((after, None),))]
