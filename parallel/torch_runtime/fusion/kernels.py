"""Triton kernels of the fused nodes that torch has no operator for: cross entropy's rows, AdamW and Adagrad with their
scaling, the gate of a SwiGLU.

Imported on GPUs only. Each is compared with its plain form (`fused`) by `scripts/bench/gpu/train_350m.py`, and by the
tests in Triton's interpreter where Triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.torch_runtime.graph import Node

_BLOCK = 2048


@triton.jit
def _row_sums_kernel(logits, largest, labels, total, chosen, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.load(largest + row).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, columns, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + place, mask=place < columns, other=-float("inf")).to(tl.float32)
        sums += tl.exp(x - top)
    tl.store(total + row, tl.sum(sums, 0))
    label = tl.load(labels + row).to(tl.int64)
    inside = (label >= 0) & (label < columns)
    own = tl.load(logits + row * stride + tl.where(inside, label, 0)).to(tl.float32)
    tl.store(chosen + row, tl.where(inside, own - top, 0.0))


@triton.jit
def _row_sums_grad_kernel(logits, largest, labels, by_total, by_chosen, out, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + place, mask=place < columns, other=-float("inf")).to(tl.float32)
    found = tl.exp(x - tl.load(largest + row).to(tl.float32)) * tl.load(by_total + row)
    label = tl.load(labels + row).to(tl.int64)
    found += tl.where(place == label, tl.load(by_chosen + row), 0.0)
    tl.store(out + row * columns + place, found.to(out.dtype.element_ty), mask=place < columns)


@triton.jit
def _adam_kernel(p, m, v, scalars, gradient, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    rate, beta1, beta2 = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    epsilon, decay = tl.load(scalars + 3), tl.load(scalars + 4)
    factor, skipped = tl.load(scalars + 5), tl.load(scalars + 6)
    g = tl.load(gradient + place, mask=inside).to(tl.float32) * factor
    g = tl.where(skipped > 0.0, 0.0, g)
    own = tl.load(p + place, mask=inside)
    new_m = beta1 * tl.load(m + place, mask=inside) + (1.0 - beta1) * g
    new_v = beta2 * tl.load(v + place, mask=inside) + (1.0 - beta2) * g * g
    tl.store(p + place, own - rate * (new_m / (tl.sqrt(new_v) + epsilon) + decay * own), mask=inside)
    tl.store(m + place, new_m, mask=inside)
    tl.store(v + place, new_v, mask=inside)


@triton.jit
def _adagrad_kernel(p, a, scalars, gradient, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    rate, epsilon = tl.load(scalars), tl.load(scalars + 1)
    factor, skipped = tl.load(scalars + 2), tl.load(scalars + 3)
    g = tl.load(gradient + place, mask=inside).to(tl.float32) * factor
    g = tl.where(skipped > 0.0, 0.0, g)
    total = tl.load(a + place, mask=inside) + g * g
    own = tl.load(p + place, mask=inside)
    tl.store(p + place, own - rate * g / (tl.sqrt(total) + epsilon), mask=inside)
    tl.store(a + place, total, mask=inside)


@triton.jit
def _swish_kernel(g, u, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    x = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.sigmoid(x) * tl.load(u + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swish_grad_kernel(gradient, g, u, dg, du, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    x = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(x)
    swish = x * sigmoid
    by_g = given * tl.load(u + place, mask=inside, other=0.0).to(tl.float32) * (sigmoid + swish * (1.0 - sigmoid))
    tl.store(dg + place, by_g.to(dg.dtype.element_ty), mask=inside)
    tl.store(du + place, (given * swish).to(du.dtype.element_ty), mask=inside)


def row_sums(node: Node, logits: Tensor, largest: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """See `fused`."""
    logits, rows = logits.contiguous(), logits.shape[0]
    total, chosen = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    _row_sums_kernel[(rows,)](logits, largest.contiguous(), labels.contiguous(), total, chosen, logits.shape[1],
                              logits.stride(0), BLOCK=_BLOCK)
    return total, chosen


def row_sums_grad(node: Node, logits: Tensor, largest: Tensor, labels: Tensor, by_total: Tensor,
                  by_chosen: Tensor) -> Tensor:
    """See `fused`."""
    logits = logits.contiguous()
    rows, columns = logits.shape
    out = torch.empty(rows, columns, dtype=getattr(torch, node.outputs[0].dtype), device=logits.device)
    _row_sums_grad_kernel[(rows, triton.cdiv(columns, _BLOCK))](
        logits, largest.contiguous(), labels.contiguous(), by_total.contiguous(), by_chosen.contiguous(), out, columns,
        logits.stride(0), BLOCK=_BLOCK)
    return out


def adam(node: Node, p: Tensor, m: Tensor, v: Tensor, scalars: Tensor, gradient: Tensor, *_: Any) -> None:
    """See `fused`; parameter and moments are float32 and contiguous."""
    block = 1024
    _adam_kernel[(triton.cdiv(p.numel(), block),)](p, m, v, scalars, gradient.contiguous(), p.numel(), BLOCK=block)


def adagrad(node: Node, p: Tensor, a: Tensor, scalars: Tensor, gradient: Tensor) -> None:
    """See `fused`; parameter and sum of squares are float32 and contiguous."""
    block = 1024
    _adagrad_kernel[(triton.cdiv(p.numel(), block),)](p, a, scalars, gradient.contiguous(), p.numel(), BLOCK=block)


def swish(node: Node, g: Tensor, u: Tensor) -> Tensor:
    """See `swiglu`."""
    g, u = g.contiguous(), u.contiguous()
    out = torch.empty_like(g)
    _swish_kernel[(triton.cdiv(g.numel(), _BLOCK),)](g, u, out, g.numel(), BLOCK=_BLOCK)
    return out


def swish_grad(node: Node, gradient: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """See `swiglu`."""
    gradient, g, u = gradient.contiguous(), g.contiguous(), u.contiguous()
    dg, du = torch.empty_like(g), torch.empty_like(u)
    _swish_grad_kernel[(triton.cdiv(g.numel(), _BLOCK),)](gradient, g, u, dg, du, g.numel(), BLOCK=_BLOCK)
    return dg, du
