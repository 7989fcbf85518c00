"""A table whose rows are on all devices of data x op, each row once: ids go to the devices that hold their rows, the
rows come back, gradients go the same way, by AlltoAll.

Shapes: B batch, M id columns, S parts of the batch (one a device), N = B M / S ids of a part, R devices (= S), V rows,
W width, C ids that a part may ask of a device in one round.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from parallel.layers.embedding import RowSlots, RowTable
from parallel.layers.parameter import parameter
from parallel.sharding.layout import Axes, Operand, OpSharding
from recsys.tables.names import ACCUMULATOR


class ShardedTable(RowTable):
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

    Attributes:
        ids_of_step: B M of a training step; whoever sets `by_rows` says it.
        axes: sizes of the layout's axes, once it has one.
    """

    ids_of_step = 0
    axes: Axes | None = None

    def __init__(self, rows: int, width: int, std: float, factor: float = 2.0, rounds: int = 2) -> None:
        super().__init__()
        self.table = parameter((rows, width), "normal", std, shard_optimizer=False)
        self.rows_of_table, self.width, self.factor, self.rounds, self.parts = rows, width, factor, rounds, 1
        self.reshape, self.cast, self.join, self.join_ids = ops.Reshape(), ops.Cast(), ops.Concat(2), ops.Concat(2)
        self.expand = ops.ExpandDims()
        self.beside, self.slice = ops.Concat(axis=1), ops.StridedSlice()
        self.order, self.order_f, self.pick, self.take = (
            ops.TopK(), ops.TopK(), ops.Gather(batch_dims=1), ops.Gather(batch_dims=1))
        self.neg, self.differs, self.cumulate, self.sum = ops.Neg(), ops.NotEqual(), ops.CumSum(), ops.ReduceSum()
        self.own, self.hot_sum, self.starts = ops.Equal(), ops.ReduceSum(), ops.CumSum()
        self.scale, self.minus_row, self.plus_row, self.same = ops.Mul(), ops.Sub(), ops.Add(), ops.Sub()
        self.shard_of, self.lower, self.upper, self.less = ops.FloorDiv(), ops.Maximum(), ops.Minimum(), ops.Less()
        self.upper3, self.keep3 = ops.Minimum(), ops.Select()
        self.local, self.far, self.keep, self.choose = ops.Sub(), ops.GreaterEqual(), ops.Select(), ops.Add()
        self.spread, self.there, self.back, self.mark, self.scaled = (
            ops.Add(), ops.Transpose(), ops.Transpose(), ops.Add(), ops.Mul())
        self.holder, self.cut_ids, self.cut_rows = ops.Equal(), ops.StridedSlice(), ops.StridedSlice()
        self.fetch, self.read_state = ops.Gather(batch_dims=1), ops.Gather(batch_dims=1)
        self.slots: RowSlots | None = None

    def keep_accumulator(self, start: float) -> None:
        """Gives the table's rows one number of state each, for row-wise Adagrad."""
        made = parameter((self.rows_of_table, 1), "fill", start, shard_optimizer=False)
        made.name, made.requires_grad = f"{self.table.name}{ACCUMULATOR}", False
        self.accumulator = made

    def capacity(self, count: int) -> int:
        """C for N ids of a part."""
        return min(count, -int(-self.factor * count // self.parts))

    def make_slots(self) -> RowSlots:
        """See `RowTable`; `ids_of_step` says how many ids a step has (B M)."""
        if self.slots is None:
            most = self.rounds * self.capacity(self.ids_of_step // self.parts)
            self.slots = RowSlots(self.table.name, (self.parts, self.parts * most, self.width))
            if self.axes is not None:
                self.slots.apply_sharding(self.axes)
        return self.slots

    def construct(self, ids_BM: Tensor) -> Tensor:
        batch, columns = ids_BM.shape
        parts, shard = self.parts, self.rows_of_table // self.parts
        count = batch * columns // parts
        capacity = self.capacity(count)
        most = self.rounds * capacity
        ids_SN = self.reshape(ids_BM, (parts, count))
        _, order_SN = self.order(self.neg(ids_SN), count)
        sorted_SN = self.pick(ids_SN, order_SN, 1)
        number_SN, distinct_SN, owner_SN = self.distinct(sorted_SN, count, shard)
        starts_SR = self.first_of_owner(owner_SN)
        found_SKW = self.exchange(self.asked(distinct_SN, owner_SN, starts_SR, most, count, shard), capacity)
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

    def asked(self, distinct_SN: Tensor, owner_SN: Tensor, starts_SR: Tensor, most: int, count: int,
              shard: int) -> Tensor:
        """asked_SRM: the first `most` (M) of each part's distinct ids that each device holds, by their rows in its
        shard; -1 in slots without one."""
        parts = self.parts
        places_M = Tensor(np.arange(most)[None, None], mstype.int32)
        # Behind the last id is a place that names no device.
        place_SRM = self.upper3(self.spread(self.expand(starts_SR, -1), places_M), count)
        flat_SK = self.reshape(place_SRM, (parts, parts * most))
        none_S1 = self.slice(owner_SN, (0, 0), (parts, 1), (1, 1)) * 0 + parts
        owner_SRM = self.reshape(self.pick(self.beside((owner_SN, none_S1)), flat_SK, 1), (parts, parts, most))
        id_SRM = self.reshape(self.pick(self.beside((distinct_SN, none_S1)), flat_SK, 1), (parts, parts, most))
        devices_R = Tensor(np.arange(parts)[None, :, None], mstype.int32)
        local_SRM = self.local(id_SRM, Tensor(np.arange(parts)[None, :, None] * shard, mstype.int32))
        return self.keep3(self.holder(owner_SRM, devices_R), local_SRM, place_SRM * 0 - 1)

    def exchange(self, asked_SRM: Tensor, capacity: int) -> Tensor:
        """found_SKW: the rows asked for; in slots without one any row, which nobody reads. Ids go and rows come back in
        rounds of C."""
        parts, rounds = self.parts, self.rounds
        most = rounds * capacity
        sent, received = (), ()
        for number in range(rounds):
            begin, end = number * capacity, (number + 1) * capacity
            sent += (self.there(self.cut_ids(asked_SRM, (0, 0, begin), (parts, parts, end), (1, 1, 1)), (1, 0, 2)),)
        asked_RSM = self.join_ids(sent) if rounds > 1 else sent[0]
        asked_RK = self.reshape(asked_RSM, (parts, parts * most))
        rows_RKW = self.rows(self.lower(asked_RK, 0), asked_RK)
        rows_RSMW = self.reshape(rows_RKW, (parts, parts, most, self.width))
        for number in range(rounds):
            begin, end = number * capacity, (number + 1) * capacity
            received += (self.back(self.cut_rows(rows_RSMW, (0, 0, begin, 0), (parts, parts, end, self.width),
                                                 (1, 1, 1, 1)), (1, 0, 2, 3)),)
        return self.reshape(self.join(received) if rounds > 1 else received[0], (parts, parts * most, self.width))

    def rows(self, local_RK: Tensor, asked_RK: Tensor) -> Tensor:
        """rows_RKW of the devices' shards."""
        parts, shard = self.parts, self.rows_of_table // self.parts
        rows_RKW = self.fetch(self.reshape(self.table, (parts, shard, self.width)), local_RK, 1)
        if self.slots is None or not self.training:
            return rows_RKW
        rows_RKW = self.slots(ops.stop_gradient(rows_RKW), asked_RK)
        if self.accumulator is not None:
            # Read here so that the partitioner shards it as the table is; the optimizer alone needs it.
            rows_RKW = ops.depend(rows_RKW, self.read_state(self.reshape(self.accumulator, (parts, shard, 1)), local_RK,
                                                            1))
        return rows_RKW

    def apply_sharding(self, axes: Axes) -> None:
        self.parts, self.axes = axes.sizes["rows"], axes
        super().apply_sharding(axes)

    def redistributes(self, axes: Axes) -> bool:
        return axes.sizes["rows"] > 1  # ids go to the devices that hold their rows, and rows back

    def weights(self) -> dict[str, Operand]:
        own = {"table": ("rows", None)}
        return own if self.accumulator is None else {**own, "accumulator": ("rows", None)}

    def sharding(self) -> list[OpSharding]:
        flat, cube, row, none = ("rows", None), ("rows", None, None), (None, None), ()
        received, cube4 = (None, "rows", None), ("rows", None, None, None)
        one = [self.order, self.order_f, self.neg, self.slice, self.cumulate, self.sum, self.starts, self.expand]
        return ([OpSharding(primitive, (flat,)) for primitive in one]
                + [OpSharding(primitive, (flat, flat)) for primitive in (self.pick, self.differs, self.same,
                                                                         self.choose, self.beside)]
                + [OpSharding(primitive, (flat, row)) for primitive in (self.minus_row, self.plus_row)]
                + [OpSharding(primitive, (flat, none)) for primitive in (self.scale, self.shard_of, self.scaled,
                                                                         self.far, self.upper, self.lower)]
                + [OpSharding(primitive, (cube, (None, None, None))) for primitive in (self.spread, self.local,
                                                                                       self.holder)]
                + [OpSharding(self.keep, (flat, flat, flat)), OpSharding(self.less, (flat, flat)),
                   OpSharding(self.own, (cube, (None,))), OpSharding(self.hot_sum, (cube,)),
                   OpSharding(self.keep3, (cube, cube, cube)), OpSharding(self.upper3, (cube, none)),
                   OpSharding(self.cut_ids, (cube,)), OpSharding(self.there, (received,)),
                   OpSharding(self.join_ids, (cube,) * self.rounds), OpSharding(self.fetch, (cube, flat)),
                   OpSharding(self.read_state, (cube, flat)),
                   OpSharding(self.cut_rows, (cube4,)), OpSharding(self.back, ((None, "rows", None, None),)),
                   OpSharding(self.join, (cube4,) * self.rounds),
                   OpSharding(self.take, (cube, flat)), OpSharding(self.mark, (cube, cube))])
