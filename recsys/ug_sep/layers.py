"""Small cells of separated rankers: tokens taken apart and joined, masks, what a candidate takes of a user."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import SplitWithSize

from parallel.layers.parameter import needs_one_type
from parallel.sharding.layout import Layer, Operand, OpSharding
from recsys.data.features import FeatureSpec
from recsys.layers.embedding import FeatureEmbedding, Table
from recsys.ug_sep.sides import UserCandidateSplit

Shape = tuple[int, int]


class Columns(Layer):
    """Chosen columns of a tensor [B, M]."""

    def __init__(self, columns: tuple[int, ...]) -> None:
        super().__init__()
        self.columns, self.gather = Tensor(np.array(columns, np.int32)), ops.Gather()

    def construct(self, x_BM: Tensor) -> Tensor:
        return self.gather(x_BM, self.columns, 1)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.gather, (("batch", None), (None,)))]


class TwoSidedEmbedding(nn.Cell):
    """One embedding for each side out of common tables. Called with rows of both sides it gives the groups of both."""

    def __init__(self, spec: FeatureSpec, sides: UserCandidateSplit, std: float,
                 compute_dtype: mstype = mstype.float32) -> None:
        super().__init__()
        tables = {width: Table(rows, width, std) for width, rows in spec.tables.items()}
        self.tables = nn.CellList(list(tables.values()))
        self.user = FeatureEmbedding(sides.user.spec, std, tables, compute_dtype=compute_dtype)
        self.group = FeatureEmbedding(sides.candidate.spec, std, tables, compute_dtype=compute_dtype)
        self.user_ids, self.user_numbers = Columns(sides.user.ids), Columns(sides.user.numbers)
        self.candidate_ids, self.candidate_numbers = Columns(sides.candidate.ids), Columns(sides.candidate.numbers)

    def construct(self, ids_BM: Tensor, numbers_BN: Tensor) -> tuple:
        """(U groups, G groups)."""
        user, _ = self.user(self.user_ids(ids_BM), self.user_numbers(numbers_BN))
        candidate, _ = self.group(self.candidate_ids(ids_BM), self.candidate_numbers(numbers_BN))
        return user, candidate


class Widths(Layer):
    """Slices of the given sizes of the last dim of x_TBD."""

    def __init__(self, sizes: tuple[int, ...], stream: Operand) -> None:
        super().__init__()
        self.sizes, self.stream, self.split = sizes, stream, SplitWithSize()

    def construct(self, x_TBD: Tensor) -> tuple:
        return self.split(x_TBD, self.sizes, 2)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.split, (self.stream,))]


class Beside(Layer):
    """Two tensors [T, B, .] side by side along `dim`: 2 joins widths, 0 joins tokens."""

    def __init__(self, dim: int, stream: Operand) -> None:
        super().__init__()
        # Tokens of two sides are not sharded alike, so where they are joined they are replicated.
        self.stream = stream if dim == 2 else (None, stream[1], stream[2])
        self.concat = ops.Concat(axis=dim)

    def construct(self, one: Tensor, other: Tensor) -> Tensor:
        return self.concat((one, other))

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.concat, (self.stream, self.stream))]


class Pack(Layer):
    """state_RS: components [c, R, k], side by side. A pass ends in it, so every rank of the op axis has all rows;
    without a layout of its own the compiler would shard them.

    Args:
        count: how many components there are.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.transpose, self.reshape, self.concat, self.count = ops.Transpose(), ops.Reshape(), ops.Concat(1), count

    def construct(self, components: tuple, rows: int) -> Tensor:
        flat = ()
        for component in components:
            flat += (self.reshape(self.transpose(component, (1, 0, 2)), (rows, -1)),)
        return self.concat(flat)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.transpose, ((None, "batch", None),)),
                OpSharding(self.concat, (("batch", None),) * self.count)]


class Unpack(Layer):
    """Components [c, R, k] of a state_RS that `Pack` made.

    Args:
        shapes: (c, k) of each.
    """

    def __init__(self, shapes: tuple[Shape, ...]) -> None:
        super().__init__()
        self.split, self.reshape, self.transpose = SplitWithSize(), ops.Reshape(), ops.Transpose()
        self.shapes, self.sizes = shapes, tuple(c * k for c, k in shapes)

    def construct(self, state_RS: Tensor) -> tuple:
        components, parts = (), self.split(state_RS, self.sizes, 1)
        for part, (c, k) in zip(parts, self.shapes):  # noqa: B905 (graphs know no strict)
            components += (self.transpose(self.reshape(part, (state_RS.shape[0], c, k)), (1, 0, 2)),)
        return components

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.split, (("batch", None),)), OpSharding(self.transpose, (("batch", None, None),))]


class Fill(Layer):
    """Zeros after (or before) the last dim of x_TBD."""

    def __init__(self, before: int, after: int, stream: Operand) -> None:
        super().__init__()
        self.stream, self.pad = stream, ops.Pad(((0, 0), (0, 0), (before, after)))

    def construct(self, x_TBD: Tensor) -> Tensor:
        return self.pad(x_TBD)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.pad, (self.stream,))]


class Blank(Layer):
    """Zeros in the shape of x_TBD. (A filled constant would not be sharded as x is.)"""

    def __init__(self, stream: Operand) -> None:
        super().__init__()
        self.stream, self.zeros = stream, ops.ZerosLike()

    def construct(self, x_TBD: Tensor) -> Tensor:
        return self.zeros(x_TBD)

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.zeros, (self.stream,))]


class Mask(Layer):
    """x_TBE with 0 where a U row (the first `rows`) would read a G column (from `columns` on); all of it otherwise.

    Args:
        shape: (T, E).
        on: false lets everything through (ablation).
    """

    def __init__(self, shape: Shape, rows: int, columns: int, on: bool = True) -> None:
        super().__init__()
        mask = np.ones((shape[0], 1, shape[1]), np.float32)
        mask[:rows, :, columns:] = 0.0
        self.on, self.mask, self.times, self.cast = on, Tensor(mask), ops.Mul(), ops.Cast()

    def construct(self, x_TBE: Tensor) -> Tensor:
        return self.times(x_TBE, self.cast(self.mask, x_TBE.dtype)) if self.on else x_TBE


class Repeat(Layer):
    """[count, B, K] out of [1, B, K]; a tensor of more tokens as it is."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.tile = count, ops.Tile()

    def construct(self, x_cBK: Tensor) -> Tensor:
        return self.tile(x_cBK, (self.count, 1, 1)) if x_cBK.shape[0] < self.count else x_cBK

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.tile, ((None, "batch", None),))]


class Take(Layer):
    """Components [c, R, K] for each candidate: row index_N[n] for candidate n; as they are without an index (R = N)."""

    def __init__(self) -> None:
        super().__init__()
        self.gather, self.tile = ops.Gather(), ops.Tile()

    def construct(self, x_cRK: Tensor, index_N: Tensor | None) -> Tensor:
        """[c, N, K], or [c, 1, K] for one request, whose addition broadcasts."""
        if index_N is None or x_cRK.shape[1] == 1:
            return x_cRK
        return self.gather(x_cRK, index_N, 1)

    def full(self, x_cRK: Tensor, index_N: Tensor | None) -> Tensor:
        """[c, N, K] in any case."""
        if index_N is None:
            return x_cRK
        if x_cRK.shape[1] == 1:
            return self.tile(x_cRK, (1, index_N.shape[0], 1))
        return self.gather(x_cRK, index_N, 1)

    def sharding(self) -> list[OpSharding]:
        # A candidate's user may be on any rank, so users are replicated.
        return [OpSharding(self.gather, ((None, None, None), ("batch",)))]


class SharedMean(Layer):
    """hidden_ND: the mean over U and G tokens from the mean of each side.

    Args:
        batch: the named axis of N.
    """

    def __init__(self, batch: str) -> None:
        super().__init__()
        self.batch, self.weigh_user, self.weigh_candidate, self.add = batch, ops.Mul(), ops.Mul(), ops.Add()
        self.casts = needs_one_type()

    def construct(self, user_ND: Tensor, candidate_ND: Tensor, share: float) -> Tensor:
        """`share`: that of U among the tokens."""
        rest = 1.0 - share
        if self.casts:
            share, rest = ops.cast(share, user_ND.dtype), ops.cast(rest, candidate_ND.dtype)
        return self.add(self.weigh_user(user_ND, share), self.weigh_candidate(candidate_ND, rest))

    def sharding(self) -> list[OpSharding]:
        row = (self.batch, None)
        return [OpSharding(self.weigh_user, (row, ())), OpSharding(self.weigh_candidate, (row, ())),
                OpSharding(self.add, (row, row))]
