"""Dropout without hidden state: the mask is a function of (seed, layer, number of the sample, element), nothing else.

MindSpore's own Dropout keeps a generator inside its kernel, which no checkpoint can save, and its mask depends on how
the batch is cut. Here samples are numbered through the whole run, and the numbers travel with the rows of the batch as
one more input of the network, `rows_B`. A run that is stopped and resumed, micro-batches, data-parallel ranks, pipeline
stages and blocks that are computed again all see the masks of the straight run.
"""

from __future__ import annotations

import math

import numpy as np
from mindspore import Tensor, nn, ops

from parallel.layout import Cut, Layer, Operand

# Odd constants of the 32-bit finaliser of MurmurHash3 (public domain, A. Appleby) as signed integers.
_MIX_1 = int(np.uint32(0x85EBCA6B).astype(np.int32))
_MIX_2 = int(np.uint32(0xC2B2AE35).astype(np.int32))
_GOLDEN = int(np.uint32(0x9E3779B1).astype(np.int32))


def _i32(value: int) -> Tensor:
    return Tensor(np.int32(value))


@ops.constexpr
def place_numbers(shape: tuple[int, ...]) -> Tensor:
    """int32 of `shape`: a number for each place, from 0 in steps of an odd constant."""
    numbers = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(_MIX_1 & 0xFFFFFFFF)
    return Tensor(numbers.astype(np.int32).reshape(shape))


@ops.constexpr
def column_keys(columns: int) -> Tensor:
    """Odd int32 [columns]: MurmurHash3's finaliser of the column's number."""
    h = np.arange(1, columns + 1, dtype=np.uint32)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(_MIX_1 & 0xFFFFFFFF)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(_MIX_2 & 0xFFFFFFFF)
    return Tensor(((h ^ (h >> np.uint32(16))) | np.uint32(1)).astype(np.int32))


class Mix(Layer):
    """MurmurHash3's finaliser on int32 tensors (arithmetic wraps): every input bit reaches every output bit.

    Args:
        operand: named axes that cut the input's dims; None for inputs that are never cut.

    Returns the hash and the state before the last multiplication.
    """

    def __init__(self, operand: Operand | None) -> None:
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

    def cuts(self) -> list[Cut]:
        if self.operand is None:
            return []
        one = [self.shift1, self.shift2, self.shift3, self.clear1, self.clear2, self.clear3, self.times1, self.times2]
        return [*(Cut(primitive, (self.operand, ())) for primitive in one),
                *(Cut(primitive, (self.operand, self.operand)) for primitive in (self.xor1, self.xor2, self.xor3))]


class Dropout(Layer):
    """Zeroes each element with probability `rate` and multiplies the rest by 1 / (1 - rate); identity unless training.

    Element (row i, column j) is kept when the 32-bit hash `a(i) c(j) + b(i)` is at or above a threshold: a and b are
    hashes of the sample's number, the row's place in it and the layer's salt, c(j) is odd (multiply-add hashing,
    Dietzfelbinger 1996). It costs two operations an element.

    Args:
        rate: probability of zeroing, in [0, 1).
        operand: named axes that cut the input's dims; None for inputs that are never cut. "residual" or "tokens" first
            means that batch and sequence are flattened.
        seed: seed of the run; 32 bits.
    """

    def __init__(self, rate: float, operand: Operand | None = None, seed: int = 0) -> None:
        super().__init__()
        self.operand = operand
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate lies in [0, 1), got {rate}")
        self.rate = rate
        self.inverse_keep = 1.0 / (1.0 - rate)
        # h uniform on signed int32: P(h >= threshold) = 1 - rate.
        self.threshold = _i32(int(np.floor(-(2.0**31) + rate * 2.0**32)))
        self.salt = int(seed)
        self.hash_product, self.hash_sum, self.keep, self.product = ops.Mul(), ops.Add(), ops.GreaterEqual(), ops.Mul()
        self.grow, self.reshape = ops.Mul(), ops.Reshape()
        self.number, self.salted, self.place = ops.Mul(), ops.Add(), ops.Add()
        flat = operand is not None and operand[0] in ("residual", "tokens")
        self.rows = operand and (("batch", None) if flat else operand[:-1])
        self.mix = Mix(self.rows)

    def construct(self, x: Tensor, rows_B: Tensor | None = None) -> Tensor:
        """x: any float type, the batch first, or batch and sequence flattened; the same shape and type.

        rows_B: int32, numbers of the samples; only where nothing is dropped it may be None.
        """
        if not self.training or self.rate == 0.0:
            return x
        if rows_B is None:
            raise ValueError("dropout needs the numbers of the samples in training")
        row_key, row_sum, column_key = self.keys(x.shape, rows_B)
        hashed = self.hash_sum(self.hash_product(row_key, column_key), row_sum)
        kept = ops.cast(self.keep(hashed, self.threshold), x.dtype)
        return self.product(x, self.grow(kept, ops.cast(self.inverse_keep, x.dtype)))

    def cuts(self) -> list[Cut]:
        if self.operand is None:
            return []
        whole, thin = self.operand, (*self.operand[:-1], None)
        return [Cut(self.hash_product, (thin, self.operand[-1:])), Cut(self.hash_sum, (whole, thin)),
                Cut(self.keep, (whole, ())), Cut(self.grow, (whole, ())), Cut(self.product, (whole, whole)),
                Cut(self.number, (("batch",), ())), Cut(self.salted, (("batch",), ())),
                Cut(self.place, (("batch", *[None] * (len(self.rows) - 1)), (None, *self.rows[1:])))]

    def keys(self, shape: tuple, rows_B: Tensor) -> tuple:
        """int32: a(i) and b(i) of the rows, both [..., 1], and odd c(j) of the columns, [columns]."""
        batch, count = rows_B.shape[0], 1
        for size in shape[:-1]:
            count = count * size
        places = shape[1:-1] if shape[0] == batch else (count // batch,)
        number_B = self.salted(self.number(rows_B, _i32(_GOLDEN)), _i32(self.salt))
        number = self.place(self.reshape(number_B, (batch,) + (1,) * len(places)), place_numbers((1,) + places))
        row_key, row_sum = self.mix(number)
        thin = shape[:-1] + (1,)
        return self.reshape(row_key, thin), self.reshape(row_sum, thin), column_keys(shape[-1])


def connect_dropout(network: nn.Cell, seed: int) -> bool:
    """Gives every `Dropout` of `network` a salt of its own; returns whether any of them drops, in which case the
    network takes the numbers of its samples, int32 [B], as its last input.

    Args:
        network: any cell; its dropouts are numbered in the order of `cells_and_names`.
        seed: seed of the run.
    """
    dropouts = [cell for _, cell in network.cells_and_names() if isinstance(cell, Dropout)]
    for index, cell in enumerate(dropouts):
        digest = np.random.SeedSequence([seed, index]).generate_state(1, np.uint32)[0]
        cell.salt = int(digest.astype(np.int32))
    return any(cell.rate > 0.0 for cell in dropouts)
