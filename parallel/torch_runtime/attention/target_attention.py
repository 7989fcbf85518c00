"""Target attention in Triton: sum_L a(q, k_l) k_l with a = w2 swish(W1 [q, k, q - k, q * k] + b1) + b2, hidden units on
the chip alone, forward and backward.

Shapes: B samples, L list length, W embedding width, H hidden units.

The four parts of W1 = [a, b, c, d] are put together once a sample: W1 [q, k, q - k, q * k] = k (b - c + q d) +
q (a + c), so a product has W rows where it is written with 4 W.

Imported on GPUs only. `fusion.target_attention` has the plain form, with which the tests compare these kernels in
Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 128, 64, 8
"""Tiles: rows of a list, hidden units."""


@triton.jit
def _effective(base, cross, query, w, column, there, hidden, W: tl.constexpr):
    place = w[:, None] * hidden + column[None, :]
    own = tl.load(base + place, mask=there[None, :], other=0.0).to(tl.float32)
    return own + query[:, None] * tl.load(cross + place, mask=there[None, :], other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(q, k, present, base, cross, own, w2, b2, out, scores, length, hidden, k_sample, k_row,
                    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, W)
    query = tl.load(q + sample * W + w).to(tl.float32)
    total = tl.zeros((W,), tl.float32)
    bias = tl.load(b2).to(tl.float32)
    for begin in range(0, length, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = row < length
        keys = tl.load(k + sample * k_sample + row[:, None] * k_row + w[None, :], mask=inside[:, None], other=0.0)
        narrow, keys = keys.to(base.dtype.element_ty), keys.to(tl.float32)
        score = tl.zeros((ROWS,), tl.float32)
        for start in range(0, hidden, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            there = column < hidden
            both = _effective(base, cross, query, w, column, there, hidden, W).to(base.dtype.element_ty)
            h = tl.dot(narrow, both) + tl.load(own + sample * hidden + column, mask=there, other=0.0)[None, :]
            weight = tl.load(w2 + column, mask=there, other=0.0).to(tl.float32)
            score += tl.sum(h * tl.sigmoid(h) * weight[None, :], 1)
        score = (score + bias) * tl.load(present + sample * length + row, mask=inside, other=0.0)
        tl.store(scores + sample * length + row, score, mask=inside)
        total += tl.sum(keys * score[:, None], 0)
    tl.store(out + sample * W + w, total)


@triton.jit
def _rows_kernel(q, k, present, base, cross, own, w2, scores, dout, dk, dscores, length, hidden, k_sample, k_row,
                 W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Gradients by the rows and by the scores, a tile of rows a program."""
    sample = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, W)
    query = tl.load(q + sample * W + w).to(tl.float32)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < length
    keys = tl.load(k + sample * k_sample + row[:, None] * k_row + w[None, :], mask=inside[:, None], other=0.0)
    narrow, keys = keys.to(base.dtype.element_ty), keys.to(tl.float32)
    gradient = tl.load(dout + sample * W + w).to(tl.float32)
    score = tl.load(scores + sample * length + row, mask=inside, other=0.0)
    dscore = tl.sum(keys * gradient[None, :], 1) * tl.load(present + sample * length + row, mask=inside, other=0.0)
    tl.store(dscores + sample * length + row, dscore, mask=inside)
    total = score[:, None] * gradient[None, :]
    for start in range(0, hidden, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < hidden
        both = _effective(base, cross, query, w, column, there, hidden, W).to(base.dtype.element_ty)
        h = tl.dot(narrow, both) + tl.load(own + sample * hidden + column, mask=there, other=0.0)[None, :]
        weight = tl.load(w2 + column, mask=there, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(h)
        dh = dscore[:, None] * weight[None, :] * sigmoid * (1.0 + h * (1.0 - sigmoid))
        total += tl.dot(dh.to(base.dtype.element_ty), tl.trans(both))
    tl.store(dk + (sample * length + row[:, None]) * W + w[None, :], total, mask=inside[:, None])


@triton.jit
def _columns_kernel(q, k, dscores, base, cross, own, w2, deffective, downs, dw2, length, hidden, k_sample, k_row,
                    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Gradients by what a sample multiplies its rows with, a tile of hidden units a program."""
    sample = tl.program_id(1).to(tl.int64)
    w = tl.arange(0, W)
    query = tl.load(q + sample * W + w).to(tl.float32)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < hidden
    both = _effective(base, cross, query, w, column, there, hidden, W).to(base.dtype.element_ty)
    bias = tl.load(own + sample * hidden + column, mask=there, other=0.0)
    weight = tl.load(w2 + column, mask=there, other=0.0).to(tl.float32)
    product = tl.zeros((W, COLUMNS), tl.float32)
    sums, second = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, length, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = row < length
        keys = tl.load(k + sample * k_sample + row[:, None] * k_row + w[None, :], mask=inside[:, None], other=0.0)
        narrow = keys.to(base.dtype.element_ty)
        dscore = tl.load(dscores + sample * length + row, mask=inside, other=0.0)
        h = tl.dot(narrow, both) + bias[None, :]
        sigmoid = tl.sigmoid(h)
        dh = dscore[:, None] * weight[None, :] * sigmoid * (1.0 + h * (1.0 - sigmoid))
        second += tl.sum(dscore[:, None] * h * sigmoid, 0)
        sums += tl.sum(dh, 0)
        product += tl.dot(tl.trans(narrow), dh.to(base.dtype.element_ty))
    place = sample * hidden + column
    tl.store(downs + place, sums, mask=there)
    tl.store(dw2 + place, second, mask=there)
    tl.store(deffective + (sample * W + w[:, None]) * hidden + column[None, :], product, mask=there[None, :])


def fits(k: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take rows of this shape, on a GPU and in half precision."""
    return (k.is_cuda and dtype in (torch.float16, torch.bfloat16) and k.shape[-1] in (16, 32, 64, 128)
            and k.stride(-1) == 1)


def forward(q: Tensor, k: Tensor, present: Tensor, base: Tensor, cross: Tensor, own: Tensor, w2: Tensor,
            b2: Tensor) -> tuple[Tensor, Tensor]:
    """(out_BW, scores_BL), float32; `present` is [B, L] of 0 and 1.

    Args:
        base: b - c, [W, H], in the type of the products.
        cross: d, [W, H], likewise.
        own: q (a + c) + b1, float32 [B, H].
    """
    samples, length, width = k.shape
    out, scores = (torch.empty(samples, size, dtype=torch.float32, device=k.device) for size in (width, length))
    _forward_kernel[(samples,)](q, k, present, base, cross, own, w2, b2, out, scores, length, base.shape[1],
                                k.stride(0), k.stride(1), W=width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS)
    return out, scores


def backward(dout: Tensor, scores: Tensor, q: Tensor, k: Tensor, present: Tensor, base: Tensor, cross: Tensor,
             own: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
    """(dk_BLW, dscores_BL, gradient of what each sample multiplies its rows with [B, W, H], of `own` [B, H], of w2 by
    sample [B, H]), float32."""
    samples, length, width = k.shape
    hidden = base.shape[1]
    made = {"dtype": torch.float32, "device": k.device}
    dk, dscores = torch.empty(samples, length, width, **made), torch.empty(samples, length, **made)
    deffective = torch.empty(samples, width, hidden, **made)
    downs, dw2 = torch.empty(samples, hidden, **made), torch.empty(samples, hidden, **made)
    sizes, shared = (length, hidden, k.stride(0), k.stride(1)), {"W": width, "ROWS": ROWS, "num_warps": WARPS}
    _rows_kernel[(samples, triton.cdiv(length, ROWS))](
        q, k, present, base, cross, own, w2, scores, dout, dk, dscores, *sizes, COLUMNS=COLUMNS, **shared)
    _columns_kernel[(triton.cdiv(hidden, COLUMNS), samples)](
        q, k, dscores, base, cross, own, w2, deffective, downs, dw2, *sizes, COLUMNS=COLUMNS, **shared)
    return dk, dscores, deffective, downs, dw2
