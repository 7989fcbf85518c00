"""A table whose rows are on all devices of data x op, each row once: ids go to the devices that hold their rows, the
rows come back, gradients go the same way, by AlltoAll.

Shapes: B batch, M id columns, S parts of the batch (one a device), N = B M / S ids of a part, R devices (= S), V rows,
W width, C ids that a part may ask of a device in one round.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from parallel.layers.parameter import parameter
from parallel.sharding.layout import Axes, Layer, Operand, OpSharding


class ShardedTable(Layer):
    """rows_BMW = table_VW[ids_BM], as `Table`, with device r holding rows r V / R to (r + 1) V / R - 1.

    Each device sorts its part's ids, asks for every distinct one once, and gets at most `rounds` times C rows from any
    other: shapes are static. Ids that find no slot even so make their rows NaN, so that the step does not count and
    the run ends with a line: none is dropped in silence. On one device there is one part, which never overflows.

    Args:
        rows: V, a multiple of R.
        width: W.
        std: sigma of the start.
        factor: C = ceil(factor N / R), at most N.
        rounds: exchanges of C ids; the second and later ones serve what did not fit into the first.
    """

    def __init__(self, rows: int, width: int, std: float, factor: float = 2.0, rounds: int = 2) -> None:
        super().__init__()
        self.table = parameter((rows, width), "normal", std, shard_optimizer=False)
        self.rows, self.width, self.factor, self.rounds, self.parts = rows, width, factor, rounds, 1
        self.reshape, self.cast, self.join = ops.Reshape(), ops.Cast(), ops.Concat(axis=2)
        self.expand = ops.ExpandDims()
        self.beside, self.slice = ops.Concat(axis=1), ops.StridedSlice()
        self.order, self.order_f, self.pick, self.fetch, self.take = (
            ops.TopK(), ops.TopK(), ops.Gather(batch_dims=1), ops.Gather(batch_dims=1), ops.Gather(batch_dims=1))
        self.neg, self.differs, self.cumulate, self.sum = ops.Neg(), ops.NotEqual(), ops.CumSum(), ops.ReduceSum()
        self.own, self.hot_sum, self.starts = ops.Equal(), ops.ReduceSum(), ops.CumSum()
        self.scale, self.minus_row, self.plus_row, self.same = ops.Mul(), ops.Sub(), ops.Add(), ops.Sub()
        self.shard_of, self.lower, self.upper, self.less = ops.FloorDiv(), ops.Maximum(), ops.Minimum(), ops.Less()
        self.upper3 = ops.Minimum()
        self.local, self.far, self.keep, self.choose = ops.Sub(), ops.GreaterEqual(), ops.Select(), ops.Add()
        self.spread, self.there, self.back, self.mark, self.scaled = (
            ops.Add(), ops.Transpose(), ops.Transpose(), ops.Add(), ops.Mul())

    def construct(self, ids_BM: Tensor) -> Tensor:
        batch, columns = ids_BM.shape
        parts, shard = self.parts, self.rows // self.parts
        count = batch * columns // parts
        capacity = min(count, -int(-self.factor * count // parts))
        ids_SN = self.reshape(ids_BM, (parts, count))
        _, order_SN = self.order(self.neg(ids_SN), count)
        sorted_SN = self.pick(ids_SN, order_SN, 1)
        number_SN, distinct_SN, owner_SN = self.distinct(sorted_SN, count, shard)
        starts_SR = self.first_of_owner(owner_SN)
        rounds = ()
        for number in range(self.rounds):
            rounds += (self.exchange(distinct_SN, starts_SR, number * capacity, capacity, count, shard),)
        most = self.rounds * capacity
        found_SKW = self.reshape(self.join(rounds) if self.rounds > 1 else rounds[0],
                                 (parts, parts * most, self.width))
        holder_SN = self.upper(self.shard_of(sorted_SN, shard), parts - 1)
        nth_SN = self.same(number_SN, self.pick(starts_SR, holder_SN, 1))
        slot_SN = self.choose(self.scaled(holder_SN, most), self.upper(nth_SN, most - 1))
        # The inverse of the order that sorted.
        _, back_SN = self.order(self.neg(order_SN), count)
        rows_SNW = self.take(found_SKW, self.pick(slot_SN, back_SN, 1), 1)
        lost_SN = self.cast(self.far(self.pick(nth_SN, back_SN, 1), most), mstype.float32)
        # 0 where the id was served; log(-1) is NaN.
        rows_SNW = self.mark(rows_SNW, self.expand(ops.log(1.0 - 2.0 * lost_SN), -1))
        return self.reshape(rows_SNW, (batch, columns, self.width))

    def distinct(self, sorted_SN: Tensor, count: int, shard: int) -> tuple:
        """(which distinct id each sorted one is, the distinct ids in front in rising order, their devices; slots
        behind the last distinct id name device R, which is none)."""
        before_SN = self.beside((self.slice(sorted_SN, (0, 0), (self.parts, 1), (1, 1)) * 0 - 1,
                                 self.slice(sorted_SN, (0, 0), (self.parts, count - 1), (1, 1))))
        first_SN = self.cast(self.differs(sorted_SN, before_SN), mstype.float32)
        number_SN = self.cast(self.cumulate(first_SN, 1), mstype.int32)
        places_N = Tensor(np.arange(count)[None], mstype.float32)
        _, heads_SN = self.order_f(self.minus_row(self.scale(first_SN, 2.0 * count), places_N), count)
        distinct_SN = self.pick(sorted_SN, heads_SN, 1)
        total_S1 = self.reshape(self.sum(first_SN, 1), (self.parts, 1))
        known_SN = self.less(self.plus_row(first_SN * 0.0, places_N), total_S1)
        owner_SN = self.keep(known_SN, self.shard_of(distinct_SN, shard), distinct_SN * 0 + self.parts)
        return number_SN - 1, distinct_SN, owner_SN

    def first_of_owner(self, owner_SN: Tensor) -> Tensor:
        """starts_SR: where in the distinct ids those of each device begin."""
        devices_R = Tensor(np.arange(self.parts, dtype=np.int32))
        hot_SNR = self.cast(self.own(self.expand(owner_SN, -1), devices_R), mstype.float32)
        counts_SR = self.hot_sum(hot_SNR, 1)
        return self.cast(self.same(self.starts(counts_SR, 1), counts_SR), mstype.int32)

    def exchange(self, distinct_SN: Tensor, starts_SR: Tensor, begin: int, capacity: int, count: int,
                 shard: int) -> Tensor:
        """rows_SRCW of each device's distinct ids number `begin` to `begin + capacity`; what is none of its is any row
        of its, which nobody reads."""
        parts = self.parts
        offsets_C = Tensor(np.arange(begin, begin + capacity)[None, None], mstype.int32)
        place_SRC = self.upper3(self.spread(self.expand(starts_SR, -1), offsets_C), count - 1)
        asked_SRC = self.reshape(self.pick(distinct_SN, self.reshape(place_SRC, (parts, parts * capacity)), 1),
                                 (parts, parts, capacity))
        first_R = Tensor((np.arange(parts) * shard)[None, :, None], mstype.int32)
        local_SRC = self.upper3(self.lower(self.local(asked_SRC, first_R), 0), shard - 1)
        local_RSC = self.there(local_SRC, (1, 0, 2))
        table_RVW = self.reshape(self.table, (parts, shard, self.width))
        rows_RKW = self.fetch(table_RVW, self.reshape(local_RSC, (parts, parts * capacity)), 1)
        return self.back(self.reshape(rows_RKW, (parts, parts, capacity, self.width)), (1, 0, 2, 3))

    def apply_sharding(self, axes: Axes) -> None:
        self.parts = axes.sizes["rows"]
        super().apply_sharding(axes)

    def redistributes(self, axes: Axes) -> bool:
        return axes.sizes["rows"] > 1  # ids go to the devices that hold their rows, and rows back

    def weights(self) -> dict[str, Operand]:
        return {"table": ("rows", None)}

    def sharding(self) -> list[OpSharding]:
        flat, cube, row, none = ("rows", None), ("rows", None, None), (None, None), ()
        one = [self.order, self.order_f, self.neg, self.slice, self.cumulate, self.sum, self.starts, self.expand]
        return ([OpSharding(primitive, (flat,)) for primitive in one]
                + [OpSharding(primitive, (flat, flat)) for primitive in (self.pick, self.differs, self.same,
                                                                         self.choose, self.beside)]
                + [OpSharding(primitive, (flat, row)) for primitive in (self.minus_row, self.plus_row)]
                + [OpSharding(primitive, (flat, none)) for primitive in (self.scale, self.shard_of, self.scaled,
                                                                         self.far, self.upper)]
                + [OpSharding(self.keep, (flat, flat, flat)), OpSharding(self.less, (flat, flat)),
                   OpSharding(self.own, (cube, (None,))), OpSharding(self.hot_sum, (cube,)),
                   OpSharding(self.spread, (cube, (None, None, None))),
                   OpSharding(self.local, (cube, (None, None, None))), OpSharding(self.lower, (cube, none)),
                   OpSharding(self.upper3, (cube, none)),
                   OpSharding(self.there, ((None, "rows", None),)), OpSharding(self.fetch, (cube, flat)),
                   OpSharding(self.back, ((None, "rows", None, None),)),
                   OpSharding(self.join, (("rows", None, None, None),) * self.rounds),
                   OpSharding(self.take, (cube, flat)), OpSharding(self.mark, (cube, cube))])
