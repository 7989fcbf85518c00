"""Attention with the project's own dropout on the probabilities, in Triton: nothing of size S x S is kept.

Element (row i, column j) of a head is kept where rows[i] columns[j] + sums[i] (int32, wrapping) is not below a
threshold (`parallel.layers.dropout`), so the mask is computed again in the backward pass.

Source: FlashAttention-2 (Dao 2023): one pass with a running maximum and sum; backward from the logarithm of the sum
and delta_i = sum_k dout_ik out_ik, which holds with dropout, too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.torch_runtime.program import Node

_LOG2E = 1.4426950408889634
_ROWS, _COLUMNS = 64, 64


@triton.jit
def _scores(q, k, bias, m, n, length, stride_m, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, LOG2E: tl.constexpr):
    """Scores of a block in units of log 2; hidden ones at -10000 as in the graph, those outside at -inf."""
    s = tl.dot(q, tl.trans(k)).to(tl.float32)
    if HAS_BIAS:
        s += tl.load(bias + m[:, None] * stride_m + n[None, :], mask=(m[:, None] < length) & (n[None, :] < length),
                     other=0.0).to(tl.float32)
    s = s * LOG2E
    if CAUSAL:
        s = tl.where(m[:, None] >= n[None, :], s, -float("inf"))
    return tl.where(n[None, :] < length, s, -float("inf"))


@triton.jit
def _kept(rows, sums, columns, threshold):
    return (rows[:, None] * columns[None, :] + sums[:, None]) >= threshold


@triton.jit
def _forward_kernel(q, k, v, bias, rows, sums, columns, out, lse, heads, length, threshold, scale,
                    qb, qh, qs, kb, kh, ks, vb, vh, vs, ob, oh, os, bias_b, bias_s,
                    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
                    N: tl.constexpr, LOG2E: tl.constexpr):
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    m, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, WIDTH)
    own = m[:, None] < length
    block_q = tl.load(q + batch * qb + head * qh + m[:, None] * qs + d[None, :], mask=own, other=0.0)
    row, add = (tl.load(rows + batch * length + m, mask=m < length, other=0),
                tl.load(sums + batch * length + m, mask=m < length, other=0))
    top = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, WIDTH), tl.float32)
    last = length
    if CAUSAL:
        last = tl.minimum(length, (tl.program_id(0) + 1) * M)
    for begin in range(0, last, N):
        n = begin + tl.arange(0, N)
        inside = n[:, None] < length
        block_k = tl.load(k + batch * kb + head * kh + n[:, None] * ks + d[None, :], mask=inside, other=0.0)
        block_v = tl.load(v + batch * vb + head * vh + n[:, None] * vs + d[None, :], mask=inside, other=0.0)
        s = _scores(block_q, block_k, bias + batch * bias_b, m, n, length, bias_s, CAUSAL, HAS_BIAS, LOG2E)
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        column = tl.load(columns + head * length + n, mask=n < length, other=0)
        p = tl.where(_kept(row, add, column, threshold), p, 0.0)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(block_v.dtype), block_v).to(tl.float32)
        top = new
    mixed = mixed / total[:, None] * scale
    tl.store(out + batch * ob + head * oh + m[:, None] * os + d[None, :], mixed.to(out.dtype.element_ty), mask=own)
    tl.store(lse + tl.program_id(1) * length + m, top + tl.log2(total), mask=m < length)


@triton.jit
def _backward_rows_kernel(dout, q, k, v, bias, rows, sums, columns, lse, delta, dq, heads, length, threshold, scale,
                          gb, gh, gs, qb, qh, qs, kb, kh, ks, vb, vh, vs, ob, oh, os, bias_b, bias_s,
                          CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
                          N: tl.constexpr, LOG2E: tl.constexpr):
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    m, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, WIDTH)
    own = m[:, None] < length
    block_q = tl.load(q + batch * qb + head * qh + m[:, None] * qs + d[None, :], mask=own, other=0.0)
    block_g = tl.load(dout + batch * gb + head * gh + m[:, None] * gs + d[None, :], mask=own, other=0.0)
    row, add = (tl.load(rows + batch * length + m, mask=m < length, other=0),
                tl.load(sums + batch * length + m, mask=m < length, other=0))
    logs = tl.load(lse + tl.program_id(1) * length + m, mask=m < length, other=0.0)
    own_delta = tl.load(delta + tl.program_id(1) * length + m, mask=m < length, other=0.0)
    found = tl.zeros((M, WIDTH), tl.float32)
    last = length
    if CAUSAL:
        last = tl.minimum(length, (tl.program_id(0) + 1) * M)
    for begin in range(0, last, N):
        n = begin + tl.arange(0, N)
        inside = n[:, None] < length
        block_k = tl.load(k + batch * kb + head * kh + n[:, None] * ks + d[None, :], mask=inside, other=0.0)
        block_v = tl.load(v + batch * vb + head * vh + n[:, None] * vs + d[None, :], mask=inside, other=0.0)
        s = _scores(block_q, block_k, bias + batch * bias_b, m, n, length, bias_s, CAUSAL, HAS_BIAS, LOG2E)
        p = tl.exp2(s - logs[:, None])
        column = tl.load(columns + head * length + n, mask=n < length, other=0)
        dp = tl.dot(block_g, tl.trans(block_v)).to(tl.float32)
        dp = tl.where(_kept(row, add, column, threshold), dp * scale, 0.0)
        ds = p * (dp - own_delta[:, None])
        found += tl.dot(ds.to(block_k.dtype), block_k).to(tl.float32)
    tl.store(dq + batch * ob + head * oh + m[:, None] * os + d[None, :], found.to(dq.dtype.element_ty), mask=own)


@triton.jit
def _backward_columns_kernel(dout, q, k, v, bias, rows, sums, columns, lse, delta, dk, dv, heads, length, threshold,
                             scale, gb, gh, gs, qb, qh, qs, kb, kh, ks, vb, vh, vs, ob, oh, os, bias_b, bias_s,
                             CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
                             N: tl.constexpr, LOG2E: tl.constexpr):
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    n, d = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, WIDTH)
    own = n[:, None] < length
    block_k = tl.load(k + batch * kb + head * kh + n[:, None] * ks + d[None, :], mask=own, other=0.0)
    block_v = tl.load(v + batch * vb + head * vh + n[:, None] * vs + d[None, :], mask=own, other=0.0)
    column = tl.load(columns + head * length + n, mask=n < length, other=0)
    by_k, by_v = tl.zeros((N, WIDTH), tl.float32), tl.zeros((N, WIDTH), tl.float32)
    first = 0
    if CAUSAL:
        first = tl.program_id(0) * N // M * M
    for begin in range(first, length, M):
        m = begin + tl.arange(0, M)
        inside = m[:, None] < length
        block_q = tl.load(q + batch * qb + head * qh + m[:, None] * qs + d[None, :], mask=inside, other=0.0)
        block_g = tl.load(dout + batch * gb + head * gh + m[:, None] * gs + d[None, :], mask=inside, other=0.0)
        row, add = (tl.load(rows + batch * length + m, mask=m < length, other=0),
                    tl.load(sums + batch * length + m, mask=m < length, other=0))
        logs = tl.load(lse + tl.program_id(1) * length + m, mask=m < length, other=float("inf"))
        own_delta = tl.load(delta + tl.program_id(1) * length + m, mask=m < length, other=0.0)
        s = _scores(block_q, block_k, bias + batch * bias_b, m, n, length, bias_s, CAUSAL, HAS_BIAS, LOG2E)
        p = tl.exp2(s - logs[:, None])
        kept = _kept(row, add, column, threshold)
        by_v += tl.dot(tl.trans(tl.where(kept, p * scale, 0.0)).to(block_g.dtype), block_g).to(tl.float32)
        dp = tl.where(kept, tl.dot(block_g, tl.trans(block_v)).to(tl.float32) * scale, 0.0)
        ds = p * (dp - own_delta[:, None])
        by_k += tl.dot(tl.trans(ds).to(block_q.dtype), block_q).to(tl.float32)
    tl.store(dk + batch * ob + head * oh + n[:, None] * os + d[None, :], by_k.to(dk.dtype.element_ty), mask=own)
    tl.store(dv + batch * ob + head * oh + n[:, None] * os + d[None, :], by_v.to(dv.dtype.element_ty), mask=own)


def _shared(node: Node, q: Tensor, bias: Tensor | None, parts: tuple) -> dict[str, Any]:
    """Arguments that all three kernels have."""
    rows, sums, columns = (part.contiguous().reshape(-1) for part in parts)
    if bias is not None:
        bias = bias.contiguous()
    return {"bias": q if bias is None else bias, "rows": rows, "sums": sums, "columns": columns, "heads": q.shape[1],
            "length": q.shape[2], "threshold": node.attributes["threshold"], "scale": node.attributes["scale"],
            "bias_b": 0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
            "bias_s": 0 if bias is None else bias.stride(2), "CAUSAL": node.attributes["causal"],
            "HAS_BIAS": bias is not None, "WIDTH": q.shape[3], "M": _ROWS, "N": _COLUMNS, "LOG2E": _LOG2E}


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {name + place: tensor.stride(dim) for name, tensor in tensors.items() for dim, place in enumerate("bhs")}


def _ready(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def forward(node: Node, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, parts: tuple) -> tuple[Tensor, Tensor]:
    """(out [B, H, S, K], log2 of the sum of exponentials [B, H, S]); q is scaled already, K a power of two from 16."""
    q, k, v = _ready(q, k, v)
    batch, heads, length, width = q.shape
    # Rows of all heads beside each other, as the projection behind reads them.
    out = torch.empty(batch, length, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    _forward_kernel[(triton.cdiv(length, _ROWS), batch * heads)](
        q=q, k=k, v=v, out=out, lse=lse, **_strides(q=q, k=k, v=v, o=out), **_shared(node, q, bias, parts))
    return out, lse


def backward(node: Node, dout: Tensor, found: tuple, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
             parts: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v, from what `forward` found."""
    out, lse = found
    dout, q, k, v = _ready(dout, q, k, v)
    batch, heads, length, width = q.shape
    delta = (dout.float() * out.float()).sum(-1).contiguous()
    dq, dk, dv = (torch.empty(batch, length, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
                  for _ in range(3))
    shared = {"dout": dout, "q": q, "k": k, "v": v, "lse": lse, "delta": delta,
              **_strides(g=dout, q=q, k=k, v=v, o=dq), **_shared(node, q, bias, parts)}
    _backward_rows_kernel[(triton.cdiv(length, _ROWS), batch * heads)](dq=dq, **shared)
    _backward_columns_kernel[(triton.cdiv(length, _COLUMNS), batch * heads)](dk=dk, dv=dv, **shared)
    return dq, dk, dv
