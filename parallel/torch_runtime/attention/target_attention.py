"""Target attention in Triton: sum_L a(q, k_l) k_l with a = w2 swish(W1 [q, k, q - k, q * k] + b1) + b2, hidden units on
the chip alone, forward and backward.

Shapes: B samples, L list length, W embedding width, H hidden units, filled up to a multiple of 64 whose weights are 0.

The four parts of W1 = [a, b, c, d] are put together once a sample: W1 [q, k, q - k, q * k] = k (b - c + q d) +
q (a + c), so a product has W rows where it is written with 4 W. "Effective" is b - c + q d, [B, W, H].

Imported on GPUs only. `fusion.target_attention` has the plain form, with which the tests compare these kernels in
Triton's interpreter. Which tiles a kernel runs with is measured when it first meets a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

UNITS = 64
"""Hidden units are filled up to a multiple of it; a tile holds so many, or several times as many."""
TILES = {"forward": ((128, 64, 4), (64, 64, 4), (128, 64, 8)), "rows": ((128, 64, 8), (64, 64, 4), (64, 128, 4)),
         "columns": ((32, 128, 4, False), (128, 64, 4, False), (64, 64, 4, True), (32, 128, 4, True),
                     (64, 128, 8, True))}
"""Rows of a list, hidden units, warps (and whether hidden units are the products' rows): what is tried, the first where
nothing can be measured."""
_chosen: dict[tuple, tuple] = {}
_SHARE = 128  # samples whose gradients a program of `_sums_kernel` adds up


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    if FAST:  # one instruction in place of an exponential and a division; about 11 bits
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True,
                                         pack=1)
        found = 0.5 + 0.5 * tanh
    else:
        found = tl.sigmoid(x)
    return found


@triton.jit
def _effective_kernel(q, base, cross, effective, hidden, W: tl.constexpr, COLUMNS: tl.constexpr):
    """base + q cross of a sample and a tile of hidden units."""
    sample = tl.program_id(0).to(tl.int64)
    w, column = tl.arange(0, W), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = w[:, None] * hidden + column[None, :]
    factor = tl.load(q + sample * W + w).to(cross.dtype.element_ty).to(tl.float32)
    found = tl.load(base + at).to(tl.float32) + factor[:, None] * tl.load(cross + at).to(tl.float32)
    tl.store(effective + sample * W * hidden + at, found.to(effective.dtype.element_ty))


@triton.jit
def _forward_kernel(k, present, effective, own, w2, b2, out, scores, length, hidden, k_sample, k_row, W: tl.constexpr,
                    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, W)
    k, effective, own = k + sample * k_sample, effective + sample * W * hidden, own + sample * hidden
    present, scores = present + sample * length, scores + sample * length
    total = tl.zeros((W,), tl.float32)
    bias = tl.load(b2).to(tl.float32)
    for begin in range(0, length, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = row < length
        keys = tl.load(k + row[:, None] * k_row + w[None, :], mask=inside[:, None], other=0.0)
        narrow, keys = keys.to(effective.dtype.element_ty), keys.to(tl.float32)
        score = tl.zeros((ROWS,), tl.float32)
        for start in range(0, hidden, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            both = tl.load(effective + w[:, None] * hidden + column[None, :])
            h = tl.dot(narrow, both) + tl.load(own + column)[None, :]
            score += tl.sum(h * _sigmoid(h, FAST) * tl.load(w2 + column)[None, :], 1)
        score = (score + bias) * tl.load(present + row, mask=inside, other=0.0)
        tl.store(scores + row, score, mask=inside)
        total += tl.sum(keys * score[:, None], 0)
    tl.store(out + sample * W + w, total)


@triton.jit
def _rows_kernel(k, present, effective, own, w2, scores, dout, dk, dscores, narrowed, length, hidden, k_sample, k_row,
                 W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr):
    """Gradients by the rows and by the scores, a tile of rows a program; the rows in the type of the products."""
    sample = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, W)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < length
    k, effective, own = k + sample * k_sample, effective + sample * W * hidden, own + sample * hidden
    keys = tl.load(k + row[:, None] * k_row + w[None, :], mask=inside[:, None], other=0.0)
    narrow, keys = keys.to(effective.dtype.element_ty), keys.to(tl.float32)
    place = row[:, None] * W + w[None, :]
    tl.store(narrowed + sample * length * W + place, narrow, mask=inside[:, None])
    gradient = tl.load(dout + sample * W + w).to(tl.float32)
    score = tl.load(scores + sample * length + row, mask=inside, other=0.0)
    dscore = tl.sum(keys * gradient[None, :], 1) * tl.load(present + sample * length + row, mask=inside, other=0.0)
    tl.store(dscores + sample * length + row, dscore, mask=inside)
    total = tl.zeros((ROWS, W), tl.float32)
    for start in range(0, hidden, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        both = tl.load(effective + w[:, None] * hidden + column[None, :])
        h = tl.dot(narrow, both) + tl.load(own + column)[None, :]
        sigmoid = _sigmoid(h, FAST)
        slope = tl.load(w2 + column)[None, :] * sigmoid * (1.0 + h * (1.0 - sigmoid))
        total += tl.dot(slope.to(effective.dtype.element_ty), tl.trans(both))
    total = total * dscore[:, None] + score[:, None] * gradient[None, :]
    tl.store(dk + sample * length * W + place, total, mask=inside[:, None])


@triton.jit
def _columns_kernel(narrowed, dscores, effective, own, w2, cross, deffective, downs, dw2, dq, length, hidden,
                    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr):
    """Gradients by what a sample multiplies its rows with, a tile of hidden units a program."""
    sample = tl.program_id(1).to(tl.int64)
    w = tl.arange(0, W)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = w[:, None] * hidden + column[None, :]
    both = tl.load(effective + sample * W * hidden + at)
    bias, weight = tl.load(own + sample * hidden + column), tl.load(w2 + column)
    narrowed, dscores = narrowed + sample * length * W, dscores + sample * length
    product = tl.zeros((W, COLUMNS), tl.float32)
    sums, second = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, length, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = row < length
        narrow = tl.load(narrowed + row[:, None] * W + w[None, :], mask=inside[:, None], other=0.0)
        dscore = tl.load(dscores + row, mask=inside, other=0.0)
        h = tl.dot(narrow, both) + bias[None, :]
        sigmoid = _sigmoid(h, FAST)
        swish = h * sigmoid
        dh = dscore[:, None] * (sigmoid + swish * (1.0 - sigmoid))
        second += tl.sum(dscore[:, None] * swish, 0)
        sums += tl.sum(dh, 0)
        product += tl.dot(tl.trans(narrow), dh.to(narrow.dtype))
    place = sample * hidden + column
    tl.store(downs + place, sums * weight)
    tl.store(dw2 + place, second)
    product = product * weight[None, :]
    tl.store(deffective + sample * W * hidden + at, product)
    factor = tl.load(cross + at).to(tl.float32)
    tl.store(dq + (tl.program_id(0) * tl.num_programs(1) + sample) * W + w, tl.sum(product * factor, 1))


@triton.jit
def _turned_columns_kernel(narrowed, dscores, effective, own, w2, cross, deffective, downs, dw2, dq, length, hidden,
                           W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr):
    """The same with hidden units as rows of the products: sums over a list's rows then stay within a thread, and slopes
    within registers."""
    sample = tl.program_id(1).to(tl.int64)
    w = tl.arange(0, W)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = w[None, :] * hidden + column[:, None]
    both = tl.load(effective + sample * W * hidden + at)
    bias, weight = tl.load(own + sample * hidden + column), tl.load(w2 + column)
    narrowed, dscores = narrowed + sample * length * W, dscores + sample * length
    product = tl.zeros((COLUMNS, W), tl.float32)
    sums, second = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, length, ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = row < length
        narrow = tl.load(narrowed + row[:, None] * W + w[None, :], mask=inside[:, None], other=0.0)
        dscore = tl.load(dscores + row, mask=inside, other=0.0)
        h = tl.dot(both, tl.trans(narrow)) + bias[:, None]
        sigmoid = _sigmoid(h, FAST)
        swish = h * sigmoid
        second += tl.sum(dscore[None, :] * swish, 1)
        dh = dscore[None, :] * (sigmoid + swish * (1.0 - sigmoid))
        sums += tl.sum(dh, 1)
        product += tl.dot(dh.to(narrow.dtype), narrow)
    place = sample * hidden + column
    tl.store(downs + place, sums * weight)
    tl.store(dw2 + place, second)
    product = product * weight[:, None]
    tl.store(deffective + sample * W * hidden + at, product)
    factor = tl.load(cross + at).to(tl.float32)
    tl.store(dq + (tl.program_id(0) * tl.num_programs(1) + sample) * W + w, tl.sum(product * factor, 0))


@triton.jit
def _sums_kernel(deffective, q, plain, weighed, samples, hidden, W: tl.constexpr, COLUMNS: tl.constexpr,
                 SHARE: tl.constexpr):
    """Sums over a share of the samples of d and of q d, for one row of W and a tile of hidden units."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    first, second = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    begin = tl.program_id(2) * SHARE
    for sample in range(begin, tl.minimum(begin + SHARE, samples)):
        place = sample * W + row
        d = tl.load(deffective + place * hidden + column, mask=inside, other=0.0)
        first += d
        second += tl.load(q + place) * d
    place = (tl.program_id(2) * W + row) * hidden + column
    tl.store(plain + place, first, mask=inside)
    tl.store(weighed + place, second, mask=inside)


def fits(k: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take rows of this shape, on a GPU and in half precision."""
    return (k.is_cuda and dtype in (torch.float16, torch.bfloat16) and k.shape[-1] in (16, 32, 64, 128)
            and k.stride(-1) == 1)


def filled(x: Tensor) -> Tensor:
    """A tensor whose last dim, hidden units, is filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % UNITS))


def effective(q: Tensor, base: Tensor, cross: Tensor) -> Tensor:
    """base + q cross by sample, [B, W, H]; of q [B, W], and `filled` base and cross [W, H] in the type of the products.
    """
    (samples, width), hidden = q.shape, base.shape[1]
    found = torch.empty(samples, width, hidden, dtype=base.dtype, device=q.device)
    _effective_kernel[(samples, hidden // UNITS)](q.contiguous(), base, cross, found, hidden, W=width, COLUMNS=UNITS)
    return found


def forward(k: Tensor, present: Tensor, effective: Tensor, own: Tensor, w2: Tensor,
            b2: Tensor) -> tuple[Tensor, Tensor]:
    """(out_BW, scores_BL), float32; `present` is [B, L] of 0 and 1.

    Args:
        effective: [B, W, H] in the type of the products.
        own: q (a + c) + b1, float32 [B, H].
        w2: float32 [H].
    """
    samples, length, width = k.shape
    out, scores = (torch.empty(samples, size, dtype=torch.float32, device=k.device) for size in (width, length))
    hidden = effective.shape[2]

    def launch(rows: int, columns: int, warps: int) -> None:
        _forward_kernel[(samples,)](k, present, effective, own, w2, b2, out, scores, length, hidden, k.stride(0),
                                    k.stride(1), W=width, ROWS=rows, COLUMNS=columns, FAST=k.is_cuda, num_warps=warps)

    _run("forward", k, hidden, launch)
    return out, scores


def backward(dout: Tensor, scores: Tensor, q: Tensor, k: Tensor, present: Tensor, effective: Tensor, own: Tensor,
             w2: Tensor, cross: Tensor) -> tuple[Tensor, ...]:
    """Gradients, float32: (dk_BLW, dscores_BL, of `own` [B, H], of w2 by sample [B, H], of q by q x cross [B, W], and
    the sums over samples of the gradient of `effective` and of that times q, each [W, H]).

    Args:
        q: float32 [B, W].
        effective: base + q cross, as `forward` has it.
        cross: [W, H], in the type of the products.
    """
    samples, length, width = k.shape
    hidden = effective.shape[2]
    made = {"dtype": torch.float32, "device": k.device}
    dk, dscores = torch.empty(samples, length, width, **made), torch.empty(samples, length, **made)
    deffective = torch.empty(samples, width, hidden, **made)
    downs, dw2 = torch.empty(samples, hidden, **made), torch.empty(samples, hidden, **made)
    narrowed = torch.empty(samples, length, width, dtype=effective.dtype, device=k.device)
    dq = torch.empty(hidden // UNITS, samples, width, **made)

    def rows_launch(rows: int, columns: int, warps: int) -> None:
        _rows_kernel[(samples, triton.cdiv(length, rows))](
            k, present, effective, own, w2, scores, dout, dk, dscores, narrowed, length, hidden, k.stride(0),
            k.stride(1), W=width, ROWS=rows, COLUMNS=columns, FAST=k.is_cuda, num_warps=warps)

    def columns_launch(rows: int, columns: int, warps: int, turned: bool) -> None:
        (_turned_columns_kernel if turned else _columns_kernel)[(hidden // columns, samples)](
            narrowed, dscores, effective, own, w2, cross, deffective, downs, dw2, dq, length, hidden, W=width,
            ROWS=rows, COLUMNS=columns, FAST=k.is_cuda, num_warps=warps)

    _run("rows", k, hidden, rows_launch)
    tiles = hidden // _run("columns", k, hidden, columns_launch)[1]
    return dk, dscores, downs, dw2, dq[:tiles].sum(0), *_summed(deffective, q)


def _summed(deffective: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the samples of d [B, W, H], and of q [B, W] d."""
    samples, width, hidden = deffective.shape
    shares, columns = triton.cdiv(samples, _SHARE), min(256, triton.next_power_of_2(hidden))
    plain, weighed = (torch.empty(shares, width, hidden, dtype=torch.float32, device=q.device) for _ in range(2))
    _sums_kernel[(width, triton.cdiv(hidden, columns), shares)](deffective, q, plain, weighed, samples, hidden, W=width,
                                                                COLUMNS=columns, SHARE=_SHARE, num_warps=2)
    return plain.sum(0), weighed.sum(0)


def _run(name: str, k: Tensor, hidden: int, launch: Callable[..., None]) -> tuple:
    """Launches a kernel with the tiles that are fastest for this shape, found by the clock at its first launch; which
    they are."""
    key = (name, tuple(k.shape), hidden, k.dtype)
    if key not in _chosen:
        fitting = [tile for tile in TILES[name] if hidden % tile[1] == 0]
        timed = k.is_cuda and not torch.cuda.is_current_stream_capturing()
        _chosen[key] = min(fitting, key=lambda tile: _milliseconds(lambda: launch(*tile))) if timed else fitting[0]
    launch(*_chosen[key])
    return _chosen[key]


def _milliseconds(launch: Callable[[], Any]) -> float:
    try:
        launch()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(2):
            launch()
        end.record()
        end.synchronize()
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    return begin.elapsed_time(end)
