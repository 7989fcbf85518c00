"""From encoded rows to one vector per semantic group.

Shapes: B batch, M id columns, N numeric columns, L list length, W embedding width, F features.
"""

from __future__ import annotations

import math
from typing import Any

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import SplitWithSize

from parallel.layers.linear import Linear
from parallel.layers.parameter import needs_one_type, parameter
from parallel.sharding.layout import Layer, Operand, OpSharding
from recsys.data.features import Feature, FeatureSpec, NumericSlot, Slot
from recsys.layers.sharded_table import ShardedTable


class Table(Layer):
    """rows_BMW = table_VW[ids_BM]: all features of one embedding width in one lookup.

    Args:
        rows: V.
        width: W.
        std: sigma of the start.

    The op axis shards V (every device looks up its own rows, the results are summed).

    Attributes:
        windows: where the rows of a step are given from outside (`divide`), into how many parts D the batch is divided;
            0 = a plain table.
    """

    windows = 0

    def __init__(self, rows: int, width: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.table = parameter((rows, width), "normal", std, shard_optimizer=False)
        self.gather, self.pick, self.reshape = ops.Gather(), ops.Gather(batch_dims=1), ops.Reshape()

    def divide(self, parts: int) -> None:
        """Makes the table a window [D, V / D, W] for each of D parts of the batch, whose ids are below V / D; the data
        axis then shards D. It has three dims of its own since the partitioner shards what enters a Reshape by all
        devices."""
        (rows, width), name = self.table.shape, self.table.name
        self.table = parameter((parts, rows // parts, width), "normal", self.std, shard_optimizer=False)
        self.windows, self.table.name = parts, name

    def construct(self, ids_BM: Tensor) -> Tensor:
        if self.windows == 0:
            return self.gather(self.table, ids_BM, 0)
        parts, width, (batch, columns) = self.windows, self.table.shape[2], ids_BM.shape
        rows_DNW = self.pick(self.table, self.reshape(ids_BM, (parts, batch * columns // parts)), 1)
        return self.reshape(rows_DNW, (batch, columns, width))

    def weights(self) -> dict[str, Operand]:
        return {"table": ("batch", None, None)} if self.windows else super().weights()

    def sharding(self) -> list[OpSharding]:
        if self.windows:
            return [OpSharding(self.pick, (("batch", None, None), ("batch", None)))]
        return [OpSharding(self.gather, (("vocabulary", None), ("batch", None)), weights=("table",))]


class SplitColumns(Layer):
    """Splits dim 1 into the given sizes; its gradient is one concatenation (slices would add full-size zeros)."""

    def __init__(self, sizes: list[int], dims: int = 3) -> None:
        super().__init__()
        self.sizes, self.dims = tuple(sizes), dims
        self.split = SplitWithSize()

    def construct(self, x: Tensor) -> tuple:
        if len(self.sizes) == 1:
            return (x,)
        return self.split(x, self.sizes, 1)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.split, (("batch", *([None] * (self.dims - 1))),))]


class SliceColumns(Layer):
    """One part of `SplitColumns`, by a slice."""

    def __init__(self, start: int, size: int, dims: int = 3) -> None:
        super().__init__()
        self.start, self.size, self.dims, self.slice = start, size, dims, ops.StridedSlice()

    def construct(self, x: Tensor) -> Tensor:
        if self.dims == 2:
            return self.slice(x, (0, self.start), (x.shape[0], self.start + self.size), (1, 1))
        return self.slice(x, (0, self.start, 0), (x.shape[0], self.start + self.size, x.shape[2]), (1, 1, 1))

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.slice, (("batch", *([None] * (self.dims - 1))),))]


def slices_of(sizes: list[int], dims: int = 3) -> nn.CellList:
    """A `SliceColumns` for each size."""
    return nn.CellList([SliceColumns(sum(sizes[:index]), size, dims) for index, size in enumerate(sizes)])


class Join(Layer):
    """Concatenation of `count` tensors along dim 1."""

    def __init__(self, count: int, dims: int = 2) -> None:
        super().__init__()
        self.count, self.dims = count, dims
        self.concat, self.casts = ops.Concat(axis=1), needs_one_type()

    def construct(self, *parts: Tensor) -> Tensor:
        # Not a tuple: cells of a pipeline stage are graphs of their own, which a tuple does not enter as one.
        if self.count == 1:
            return parts[0]
        if self.casts:  # a float16 part beside a float32 one has no kernel either
            parts = tuple([ops.cast(part, parts[0].dtype) for part in parts])
        return self.concat(parts)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.concat,
                           (("batch", *([None] * (self.dims - 1))),) * self.count)] if self.count > 1 else []


class Present(Layer):
    """mask_BL1: 1 where a list holds a value, 0 where the id is the feature's row for missing values."""

    def __init__(self, missing_row: int) -> None:
        super().__init__()
        self.missing_row = missing_row
        self.differs, self.cast, self.expand = ops.NotEqual(), ops.Cast(), ops.ExpandDims()

    def construct(self, ids_BL: Tensor) -> Tensor:
        return self.expand(self.cast(self.differs(ids_BL, self.missing_row), mstype.float32), -1)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.differs, (("batch", None), ())), OpSharding(self.expand, (("batch", None),))]


class Pooling(Layer):
    """One vector for a list, its padding left out: mean, sum or max. An empty list gives zeros."""

    def __init__(self, kind: str, missing_row: int) -> None:
        super().__init__()
        self.kind = kind
        self.present = Present(missing_row)
        self.weigh, self.sum, self.count = ops.Mul(), ops.ReduceSum(), ops.ReduceSum()
        self.least, self.divide = ops.Maximum(), ops.RealDiv()
        self.max, self.hide, self.lower, self.some, self.keep = (ops.ReduceMax(), ops.Sub(), ops.Mul(), ops.ReduceMax(),
                                                                 ops.Mul())
        self.invert = ops.Sub()

    def construct(self, rows_BLW: Tensor, ids_BL: Tensor) -> Tensor:
        mask_BL1 = self.present(ids_BL)
        if self.kind == "max":
            hidden_BLW = self.hide(rows_BLW, self.lower(self.invert(1.0, mask_BL1), 1e9))
            return self.keep(self.max(hidden_BLW, 1), self.some(mask_BL1, 1))
        total_BW = self.sum(self.weigh(rows_BLW, mask_BL1), 1)
        if self.kind == "sum":
            return total_BW
        return self.divide(total_BW, self.least(self.count(mask_BL1, 1), 1.0))

    def sharding(self) -> list[OpSharding]:
        cube, row = ("batch", None, None), ("batch", None)
        return [OpSharding(self.weigh, (cube, cube)), OpSharding(self.sum, (cube,)), OpSharding(self.count, (cube,)),
                OpSharding(self.least, (row, ())), OpSharding(self.divide, (row, row)), OpSharding(self.max, (cube,)),
                OpSharding(self.hide, (cube, cube)), OpSharding(self.lower, (cube, ())), OpSharding(self.some, (cube,)),
                OpSharding(self.keep, (row, row)), OpSharding(self.invert, ((), cube))]


class TargetAttention(Layer):
    """sum_L a(q, k_l) k_l with a = MLP([q, k, q - k, q * k]), not normalised, padding left out.

    Args:
        width: W.
        hidden: width of the unit's hidden layer (36 in the paper; Swish instead of its Dice).
        length: L.
        missing_row: id of padding.
        compute_dtype: type of the unit's products; rows are weighed and summed in float32.

    Source: Deep Interest Network (arXiv 1706.06978) eq. 3.
    """

    def __init__(self, width: int, hidden: int, length: int, missing_row: int,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.width, self.length = width, length
        self.present = Present(missing_row)
        self.first = Linear(4 * width, hidden, style=None, std=math.sqrt(2.0 / (4 * width + hidden)), rows=length,
                            compute_dtype=compute_dtype)
        self.second = Linear(hidden, 1, style=None, std=math.sqrt(2.0 / (hidden + 1)), rows=length,
                             compute_dtype=compute_dtype)
        self.expand, self.tile, self.minus, self.times = ops.ExpandDims(), ops.Tile(), ops.Sub(), ops.Mul()
        self.concat, self.reshape = ops.Concat(axis=-1), ops.Reshape()
        self.sigmoid, self.swish, self.cast = ops.Sigmoid(), ops.Mul(), ops.Cast()
        self.mask, self.weigh, self.sum = ops.Mul(), ops.Mul(), ops.ReduceSum()

    def construct(self, query_BW: Tensor, rows_BLW: Tensor, ids_BL: Tensor) -> Tensor:
        query_BLW = self.tile(self.expand(query_BW, 1), (1, self.length, 1))
        pairs = self.concat((query_BLW, rows_BLW, self.minus(query_BLW, rows_BLW), self.times(query_BLW, rows_BLW)))
        hidden_NH = self.first(self.reshape(pairs, (-1, 4 * self.width)))
        weight_N1 = self.cast(self.second(self.swish(hidden_NH, self.sigmoid(hidden_NH))), mstype.float32)
        weight_BL1 = self.mask(self.reshape(weight_N1, (-1, self.length, 1)), self.present(ids_BL))
        return self.sum(self.weigh(rows_BLW, weight_BL1), 1)

    def sharding(self) -> list[OpSharding]:
        cube, flat = ("batch", None, None), ("tokens", None)
        return [OpSharding(self.expand, (("batch", None),)), OpSharding(self.tile, (cube,)),
                OpSharding(self.minus, (cube, cube)), OpSharding(self.times, (cube, cube)),
                OpSharding(self.concat, (cube,) * 4), OpSharding(self.sigmoid, (flat,)),
                OpSharding(self.swish, (flat, flat)), OpSharding(self.mask, (cube, cube)),
                OpSharding(self.weigh, (cube, cube)), OpSharding(self.sum, (cube,))]


class Numbers(Layer):
    """value_BN1 * weight_NW + bias_NW: numeric features as points on a learned line."""

    def __init__(self, count: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = parameter((count, width), "normal", std, shard_optimizer=False)
        self.bias = parameter((count, width), "normal", std, shard_optimizer=False)
        self.expand, self.times, self.plus = ops.ExpandDims(), ops.Mul(), ops.Add()

    def construct(self, values_BN: Tensor) -> Tensor:
        return self.plus(self.times(self.expand(values_BN, -1), self.weight), self.bias)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.expand, (("batch", None),)),
                OpSharding(self.times, (("batch", None, None), (None, None))),
                OpSharding(self.plus, (("batch", None, None), (None, None)))]


class FeatureEmbedding(Layer):
    """groups: for each semantic group the concatenation [B, width of the group] of its features' vectors.

    Args:
        spec: features with their columns.
        std: sigma of the tables' start.
        tables: those of a larger spec that this one is a part of; None makes new ones.
        lookup: how they are looked up when they are sharded (`recsys.settings.LookupSettings`); None = `Table`.
        compute_dtype: type of the products of target attention.

    Inputs: ids_BM int32 (rows of the tables), numbers_BN float32. Output: (groups, sequences): one tensor a group in
    the order of `spec.groups`; sequences: (rows_BLW, mask_BL1) for each sequence that is kept as a sequence (pooling:
    none).
    """

    def __init__(self, spec: FeatureSpec, std: float, tables: dict[int, Table] | None = None,
                 lookup: Any = None, compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        self.widths, self.compute_dtype = tuple(spec.tables), compute_dtype
        def made(rows: int, width: int) -> Layer:
            if lookup is not None and lookup.by == "alltoall":
                return ShardedTable(rows, width, std, lookup.capacity_factor, lookup.rounds)
            return Table(rows, width, std)

        self.tables = nn.CellList([made(rows, width) if tables is None else tables[width]
                                   for width, rows in spec.tables.items()])
        runs = runs_of_slots(spec)
        lengths = [sum(slot.length for slot in run) for run in runs]
        self.split_ids = SplitColumns(lengths, 2)
        # Where micro-batches of a pipeline share one graph, MindSpore loses the shapes of a tuple that a cell returns.
        self.sliced = False
        self.id_slices = slices_of(lengths, 2)
        self.row_slices, self.sources = [], [(0, 0)] * len(runs)
        self.members, self.split_rows, self.join_ids = [], [], []
        for width in self.widths:
            mine = [index for index, run in enumerate(runs) if run[0].width == width]
            self.members.append(tuple(mine))
            self.split_rows.append(SplitColumns([lengths[index] for index in mine]))
            self.join_ids.append(Join(len(mine)))
            self.row_slices.append(slices_of([lengths[index] for index in mine]))
            for number, index in enumerate(mine):
                self.sources[index] = (len(self.row_slices) - 1, number)
        self.members, self.sources = tuple(self.members), tuple(self.sources)
        self.row_slices = nn.CellList(self.row_slices)
        self.split_rows, self.join_ids = nn.CellList(self.split_rows), nn.CellList(self.join_ids)
        self._make_numbers(spec, std)
        self._make_plans(spec, runs)
        self.reshape = ops.Reshape()

    def _make_numbers(self, spec: FeatureSpec, std: float) -> None:
        numeric = list(spec.numeric.values())
        self.numbers = Numbers(len(numeric), numeric[0].width, std) if numeric else None
        lengths = [len(run) for run in runs_of_numbers(spec)]
        self.split_numbers = SplitColumns(lengths) if numeric else None
        self.number_slices = slices_of(lengths)

    def _make_plans(self, spec: FeatureSpec, runs: list[list[Slot]]) -> None:
        """For each feature of each group how its vector comes about; one entry for a run of features."""
        place = {slot.feature.name: index for index, run in enumerate(runs) for slot in run}
        column = {slot.feature.name: index for index, run in enumerate(runs_of_numbers(spec)) for slot in run}
        poolings, plans, joins, kept = [], [], [], []
        for features in spec.groups.values():
            plan = []
            for feature in features:
                if not feature.is_list:
                    kind, where = ("number", column) if feature.is_value else ("row", place)
                    first, width = (kind, where[feature.name]), spec.width(feature.name)
                    if plan and plan[-1][:2] == first:
                        width += plan.pop()[2]
                    plan.append((*first, width, 0))
                elif feature.pooling == "none":
                    kept.append((place[feature.name], len(poolings)))
                    poolings.append(Present(spec.slots[feature.name].offset))
                else:
                    kind = "attention" if feature.pooling == "attention" else "pool"
                    query = place[feature.target] if kind == "attention" else len(poolings)
                    plan.append((kind, place[feature.name], query, len(poolings)))
                    poolings.append(_pooling(feature, spec.slots[feature.name], self.compute_dtype))
            plans.append(tuple(plan))
            joins.append(Join(max(1, len(plan))))
        self.plans, self.kept = tuple(plan for plan in plans if plan), tuple(kept)
        self.poolings = nn.CellList(poolings)
        self.joins = nn.CellList([join for join, plan in zip(joins, plans, strict=True) if plan])

    def construct(self, ids_BM: Tensor, numbers_BN: Tensor) -> tuple:
        if self.sliced:
            ids, rows = self._sliced(ids_BM)
        else:
            ids = self.split_ids(ids_BM)
            rows = self._rows(ids_BM, ids)
        numbers = ()
        if self.numbers is not None:
            numbers = self._numbers(self.numbers(numbers_BN))
        groups = ()
        for index in range(len(self.plans)):
            parts = ()
            for kind, place, extra, pooling in self.plans[index]:
                if kind == "row":
                    parts += (self.reshape(rows[place], (-1, extra)),)
                elif kind == "number":
                    parts += (self.reshape(numbers[place], (-1, extra)),)
                elif kind == "pool":
                    parts += (self.poolings[pooling](rows[place], ids[place]),)
                else:
                    query_BW = self.reshape(rows[extra], (-1, rows[extra].shape[-1]))
                    parts += (self.poolings[pooling](query_BW, rows[place], ids[place]),)
            groups += (self.joins[index](*parts),)
        sequences = ()
        for place, pooling in self.kept:
            sequences += ((rows[place], self.poolings[pooling](ids[place])),)
        return groups, sequences

    def apply_sharding(self, axes) -> None:
        self.sliced = axes.stages > 1
        super().apply_sharding(axes)

    def _sliced(self, ids_BM: Tensor) -> tuple:
        """Ids and rows of every run, one slice each."""
        ids, found, rows = (), (), ()
        for piece in self.id_slices:
            ids += (piece(ids_BM),)
        for index in range(len(self.widths)):
            if len(self.widths) == 1:
                found += (self.tables[index](ids_BM),)
            else:
                mine = ()
                for member in self.members[index]:
                    mine += (ids[member],)
                found += (self.tables[index](self.join_ids[index](*mine)),)
        for table, number in self.sources:
            rows += (self.row_slices[table][number](found[table]),)
        return ids, rows

    def _numbers(self, vectors_BNW: Tensor) -> tuple:
        """Vectors of every run of numbers."""
        if not self.sliced:
            return self.split_numbers(vectors_BNW)
        numbers = ()
        for piece in self.number_slices:
            numbers += (piece(vectors_BNW),)
        return numbers

    def _rows(self, ids_BM: Tensor, ids: tuple) -> tuple:
        """Embedding rows of every run, [B, L, W] each, in the order of the runs."""
        if len(self.widths) == 1:
            return self.split_rows[0](self.tables[0](ids_BM))
        found = [None] * len(ids)
        for index in range(len(self.widths)):
            mine = ()
            for member in self.members[index]:
                mine += (ids[member],)
            pieces = self.split_rows[index](self.tables[index](self.join_ids[index](*mine)))
            for number in range(len(mine)):
                found[self.members[index][number]] = pieces[number]
        return tuple(found)


def runs_of_slots(spec: FeatureSpec) -> list[list[Slot]]:
    """Slots whose rows are taken together, in the order of the columns: features of one value that follow each other in
    their group and in the input and have one width; a list, and what a list looks for, is a run of its own.

    So the graph grows with the number of groups and lists, not of features.
    """
    targets = {feature.target for feature in spec.ordered}
    runs: list[list[Slot]] = []
    for features in spec.groups.values():
        last = None
        for feature in features:
            slot = spec.slots.get(feature.name)
            alone = slot is None or feature.is_list or feature.name in targets
            if slot is not None:
                if last is not None and not alone and (last.start + 1, last.width) == (slot.start, slot.width):
                    runs[-1].append(slot)
                else:
                    runs.append([slot])
            last = None if alone else slot
    return sorted(runs, key=lambda run: run[0].start)


def runs_of_numbers(spec: FeatureSpec) -> list[list[NumericSlot]]:
    """The same for features that scale a vector."""
    runs: list[list[NumericSlot]] = []
    for features in spec.groups.values():
        last = None
        for feature in features:
            slot = spec.numeric.get(feature.name)
            if slot is not None:
                if last is not None and last.column + 1 == slot.column:
                    runs[-1].append(slot)
                else:
                    runs.append([slot])
            last = slot
    return sorted(runs, key=lambda run: run[0].column)


def _pooling(feature: Feature, slot: Slot, compute_dtype: mstype) -> Layer:
    if feature.pooling == "attention":
        return TargetAttention(slot.width, feature.attention_size, slot.length, slot.offset, compute_dtype)
    return Pooling(feature.pooling, slot.offset)


def group_widths(spec: FeatureSpec) -> dict[str, int]:
    """Width of each group's vector, groups without one (sequences only) left out."""
    widths = {name: sum(spec.width(f.name) for f in features if not (f.is_list and f.pooling == "none"))
              for name, features in spec.groups.items()}
    return {name: width for name, width in widths.items() if width}
