"""Dropout without hidden state: the mask is a function of (seed, layer, number of the sample, element), nothing else.

MindSpore's own Dropout keeps a generator inside its kernel, which no checkpoint can save, and its mask depends on how
the batch is sharded. Here samples are numbered through the whole run, and the numbers travel with the rows of the batch
as one more input of the network, `rows_B`. A run that is stopped and resumed, micro-batches, data-parallel ranks,
pipeline stages and blocks that are computed again all see the masks of the uninterrupted run.
"""

from __future__ import annotations

import math

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from parallel.sharding.layout import Layer, Operand, OpSharding

# Odd constants of the 32-bit finaliser of MurmurHash3 (public domain, A. Appleby) as signed integers.
_MIX_1 = int(np.uint32(0x85EBCA6B).astype(np.int32))
_MIX_2 = int(np.uint32(0xC2B2AE35).astype(np.int32))
_GOLDEN = int(np.uint32(0x9E3779B1).astype(np.int32))


def _i32(value: int) -> Tensor:
    return Tensor(np.int32(value))


@ops.constexpr
def position_numbers(positions: int, salt: int) -> Tensor:
    """int32 [1, positions]: salt, and from there on in steps of an odd constant."""
    numbers = np.arange(positions, dtype=np.uint32) * np.uint32(_MIX_1 & 0xFFFFFFFF) + np.uint32(salt & 0xFFFFFFFF)
    return Tensor(numbers.astype(np.int32).reshape(1, positions))


@ops.constexpr
def column_keys(shape: tuple[int, ...], salt: int) -> Tensor:
    """Odd int32 of `shape`: MurmurHash3's finaliser of the columns' numbers, times an odd salt."""
    return Tensor(_column_keys(shape, salt))


def _column_keys(shape: tuple[int, ...], salt: int) -> np.ndarray:
    h = np.arange(1, math.prod(shape) + 1, dtype=np.uint32)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(_MIX_1 & 0xFFFFFFFF)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(_MIX_2 & 0xFFFFFFFF)
    h = ((h ^ (h >> np.uint32(16))) | np.uint32(1)) * np.uint32(salt & 0xFFFFFFFF)
    return h.astype(np.int32).reshape(shape)


@ops.constexpr
def every_eighth(shape: tuple[int, ...], salt: int, place: int) -> Tensor:
    """`column_keys` of the columns place, 8 + place, 16 + place, ... of the last dim."""
    return Tensor(np.ascontiguousarray(_column_keys(shape, salt)[..., place::8]))


class Mix(Layer):
    """MurmurHash3's finaliser on int32 tensors (arithmetic wraps): every input bit reaches every output bit.

    Args:
        operand: named axes that shard the input's dims.

    Returns the hash and the state before the last multiplication.
    """

    def __init__(self, operand: Operand) -> None:
        super().__init__()
        self.operand = operand
        self.shift1, self.shift2, self.shift3 = ops.RightShift(), ops.RightShift(), ops.RightShift()
        self.clear1, self.clear2, self.clear3 = ops.BitwiseAnd(), ops.BitwiseAnd(), ops.BitwiseAnd()
        self.xor1, self.xor2, self.xor3 = ops.BitwiseXor(), ops.BitwiseXor(), ops.BitwiseXor()
        self.times1, self.times2 = ops.Mul(), ops.Mul()

    def construct(self, h: Tensor) -> tuple[Tensor, Tensor]:
        # A logical shift: the arithmetic one of signed integers would smear the sign bit.
        h = self.xor1(h, self.clear1(self.shift1(h, _i32(16)), _i32(0xFFFF)))
        h = self.times1(h, _i32(_MIX_1))
        half = self.xor2(h, self.clear2(self.shift2(h, _i32(13)), _i32(0x7FFFF)))
        h = self.times2(half, _i32(_MIX_2))
        return self.xor3(h, self.clear3(self.shift3(h, _i32(16)), _i32(0xFFFF))), half

    def sharding(self) -> list[OpSharding]:
        one = [self.shift1, self.shift2, self.shift3, self.clear1, self.clear2, self.clear3, self.times1, self.times2]
        return [*(OpSharding(primitive, (self.operand, ())) for primitive in one),
                *(OpSharding(primitive, (self.operand, self.operand)) for primitive in (self.xor1, self.xor2,
                                                                                        self.xor3))]


class DropoutKeys(Layer):
    """Two hashes of every row: of its sample's number, its position in the sample and a salt; int32, both [N, 1].

    One cell serves the dropouts of a layer. Inputs: rows_B, int32 numbers of the samples, and how many rows a sample
    has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.salt = 0
        self.number, self.position, self.reshape = ops.Mul(), ops.Add(), ops.Reshape()
        self.mix = Mix(("batch", None))

    def construct(self, rows_B: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        number_B1 = self.reshape(self.number(rows_B, _i32(_GOLDEN)), (-1, 1))
        first_BS, second_BS = self.mix(self.position(number_B1, position_numbers(positions, self.salt)))
        return self.reshape(first_BS, (-1, 1)), self.reshape(second_BS, (-1, 1))

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.number, (("batch",), ())), OpSharding(self.position, (("batch", None), (None, None)))]


class Dropout(Layer):
    """Zeroes each element with probability `rate` and multiplies the rest by 1 / (1 - rate); identity unless training.

    Element (row i, column j) is kept when the 32-bit hash `a(i) c(j) + b(i)` is at or above a threshold: a and b come
    from `DropoutKeys`, c(j) is an odd hash of the column and the cell's salt (multiply-add hashing, Dietzfelbinger
    1996). It costs two operations an element.

    Args:
        rate: probability of zeroing, in [0, 1).
        operand: named axes that shard the input's dims; None for inputs that are never sharded. Rows are the first dim,
            or with four dims [B, H, S, S] the first and third, heads counting as columns.
    """

    def __init__(self, rate: float, operand: Operand | None = None) -> None:
        super().__init__()
        self.operand = operand
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
        self.rate = rate
        self.inverse_keep = 1.0 / (1.0 - rate)
        # h uniform on signed int32: P(h >= threshold) = 1 - rate.
        self.threshold = _i32(int(np.floor(-(2.0**31) + rate * 2.0**32)))
        self.salt = 1
        self.hash_product, self.hash_sum, self.keep, self.product = ops.Mul(), ops.Add(), ops.GreaterEqual(), ops.Mul()
        self.grow, self.reshape = ops.Mul(), ops.Reshape()

    def construct(self, x: Tensor, keys: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x: any float type; the same shape and type. keys: of its rows; None only where nothing is dropped."""
        if not self.training or self.rate == 0.0:
            return x
        if keys is None:
            raise ValueError("dropout needs the keys of the rows in training")
        row_key, row_sum, columns = keys[0], keys[1], x.shape[1:]
        if len(x.shape) == 4:  # [B, H, S, S]
            thin, columns = (x.shape[0], 1, x.shape[2], 1), (1, x.shape[1], 1, x.shape[3])
            row_key, row_sum = self.reshape(row_key, thin), self.reshape(row_sum, thin)
        hashed = self.hash_sum(self.hash_product(row_key, column_keys(columns, self.salt)), row_sum)
        kept = ops.cast(self.keep(hashed, self.threshold), x.dtype)
        return self.product(x, self.grow(kept, ops.cast(self.inverse_keep, x.dtype)))

    def sharding(self) -> list[OpSharding]:
        if self.operand is None:
            return []
        whole = self.operand
        thin, columns = (whole[0], None), whole[1:]
        if len(whole) == 4:
            thin, columns = (whole[0], None, whole[2], None), (None, whole[1], None, whole[3])
        return [OpSharding(self.hash_product, (thin, columns)), OpSharding(self.hash_sum, (whole, thin)),
                OpSharding(self.keep, (whole, ())), OpSharding(self.grow, (whole, ())),
                OpSharding(self.product, (whole, whole))]


class DropoutBits(Dropout):
    """The mask of a `Dropout` over the probabilities [B, H, S, S] as bits, uint8 [B, H, S, S / 8]: bit i of byte j is 1
    where column 8 j + i is kept, as FlashAttentionScore takes it. The scores need not be in memory for it.

    Args:
        rate: probability of zeroing, in (0, 1).
        heads: H.
    """

    def __init__(self, rate: float, heads: int) -> None:
        super().__init__(rate, ("batch", "heads", None, None))
        self.heads = heads
        self.bit, self.join, self.pack = ops.Mul(), ops.Add(), ops.Cast()

    def construct(self, keys: tuple[Tensor, Tensor], batch: int, positions: int) -> Tensor:
        """keys: of the rows, [B S, 1] each; positions: S, a multiple of 8."""
        row_key = self.reshape(keys[0], (batch, 1, positions, 1))
        row_sum = self.reshape(keys[1], (batch, 1, positions, 1))
        packed = self._eighth(row_key, row_sum, positions, 0)
        for place in range(1, 8):
            kept = self._eighth(row_key, row_sum, positions, place)
            packed = self.join(packed, self.bit(kept, ops.cast(2.0**place, kept.dtype)))
        return self.pack(packed, mstype.uint8)

    def _eighth(self, row_key: Tensor, row_sum: Tensor, positions: int, place: int) -> Tensor:
        """float16 [B, H, S, S / 8], which holds whole numbers up to 2048: 1 where column 8 j + place is kept."""
        columns = every_eighth((1, self.heads, 1, positions), self.salt, place)
        hashed = self.hash_sum(self.hash_product(row_key, columns), row_sum)
        return ops.cast(self.keep(hashed, self.threshold), mstype.float16)

    def sharding(self) -> list[OpSharding]:
        whole = self.operand
        return [*super().sharding(), OpSharding(self.bit, (whole, ())), OpSharding(self.join, (whole, whole))]


def connect_dropout(network: nn.Cell, seed: int) -> bool:
    """Gives every `Dropout` and `DropoutKeys` of `network` a salt of its own; returns whether anything drops, in which
    case the network takes the numbers of its samples, int32 [B], as its last input.

    Args:
        network: any cell; its dropouts are numbered in the order of `cells_and_names`.
        seed: seed of the run.
    """
    cells = [cell for _, cell in network.cells_and_names() if isinstance(cell, (Dropout, DropoutKeys))]
    for index, cell in enumerate(cells):
        digest = np.random.SeedSequence([seed, index]).generate_state(1, np.uint32)[0]
        # A factor has to be odd.
        cell.salt = int((digest | np.uint32(isinstance(cell, Dropout))).astype(np.int32))
    return drops(network)


def drops(network: nn.Cell) -> bool:
    """Whether any `Dropout` of `network` drops anything."""
    return any(cell.rate > 0.0 for _, cell in network.cells_and_names() if isinstance(cell, Dropout))
