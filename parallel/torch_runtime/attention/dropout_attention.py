"""Attention with the project's own dropout on the probabilities, in Triton: nothing of size S x S is kept.

Element (row i, column j) of a head is kept where rows[i] columns[j] + sums[i] (int32, wrapping) is not below a
threshold (`parallel.layers.dropout`), so the mask is computed again in the backward pass. Which columns a row sees is
told by a bias [B, 1, S, S], by causality alone, or by the numbers of the documents: then a row i sees the columns from
the first of its document to i, and blocks outside are passed over.

Source: FlashAttention-2 (Dao 2023): one pass with a running maximum and sum; backward from the logarithm of the sum
and delta_i = sum_k dout_ik out_ik, which holds with dropout, too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.torch_runtime.graph import Node

_LOG2E = 1.4426950408889634
_ALL, _BIASED, _DOCUMENTS = 0, 1, 2
# Rows, columns, warps and stages of a block; by kernel.
TILES = {"forward": (128, 64, 4, 3), "rows": (64, 32, 4, 3), "columns": (64, 64, 4, 2)}


@triton.jit
def _scores(q, k, bias, documents, own, m, n, length, stride_m, CAUSAL: tl.constexpr, MASK: tl.constexpr,
            LOG2E: tl.constexpr):
    """Scores of a block in units of log 2; hidden ones far below all others, those outside at -inf."""
    s = tl.dot(q, tl.trans(k)).to(tl.float32)
    if MASK == 1:
        s += tl.load(bias + m[:, None] * stride_m + n[None, :], mask=(m[:, None] < length) & (n[None, :] < length),
                     other=0.0).to(tl.float32)
    s = s * LOG2E
    if MASK == 2:
        theirs = tl.load(documents + n, mask=n < length, other=-1)
        s = tl.where(own[:, None] == theirs[None, :], s, -1.0e30)
    if CAUSAL:
        s = tl.where(m[:, None] >= n[None, :], s, -1.0e30)
    return tl.where(n[None, :] < length, s, -float("inf"))


@triton.jit
def _kept(rows, sums, columns, threshold):
    return (rows[:, None] * columns[None, :] + sums[:, None]) >= threshold


@triton.jit
def _forward_kernel(q, k, v, bias, documents, first, last, rows, sums, columns, out, lse, heads, length, threshold,
                    scale, qb, qh, qs, kb, kh, ks, vb, vh, vs, ob, oh, os, bias_b, bias_s,
                    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, WIDTH: tl.constexpr,
                    M: tl.constexpr, N: tl.constexpr, LOG2E: tl.constexpr):
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    m, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, WIDTH)
    inside_m = m[:, None] < length
    block_q = tl.load(q + batch * qb + head * qh + m[:, None] * qs + d[None, :], mask=inside_m, other=0.0)
    row = tl.load(rows + batch * length + m, mask=m < length, other=0)
    add = tl.load(sums + batch * length + m, mask=m < length, other=0)
    own = m
    top = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, WIDTH), tl.float32)
    begin_at, end_at = 0, length
    if CAUSAL:
        end_at = tl.minimum(length, (tl.program_id(0) + 1) * M)
    if MASK == 2:
        own = tl.load(documents + batch * length + m, mask=m < length, other=-2)
        begin_at = tl.min(tl.load(first + batch * length + m, mask=m < length, other=length), 0) // N * N
    for begin in range(begin_at, end_at, N):
        n = begin + tl.arange(0, N)
        inside = n[:, None] < length
        block_k = tl.load(k + batch * kb + head * kh + n[:, None] * ks + d[None, :], mask=inside, other=0.0)
        block_v = tl.load(v + batch * vb + head * vh + n[:, None] * vs + d[None, :], mask=inside, other=0.0)
        s = _scores(block_q, block_k, bias + batch * bias_b, documents + batch * length, own, m, n, length, bias_s,
                    CAUSAL, MASK, LOG2E)
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            column = tl.load(columns + head * length + n, mask=n < length, other=0)
            p = tl.where(_kept(row, add, column, threshold), p, 0.0)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(block_v.dtype), block_v).to(tl.float32)
        top = new
    mixed = mixed / total[:, None] * scale
    tl.store(out + batch * ob + head * oh + m[:, None] * os + d[None, :], mixed.to(out.dtype.element_ty), mask=inside_m)
    tl.store(lse + tl.program_id(1) * length + m, top + tl.log2(total), mask=m < length)


@triton.jit
def _backward_rows_kernel(dout, q, k, v, bias, documents, first, last, rows, sums, columns, lse, delta, dq, heads,
                          length, threshold, scale, gb, gh, gs, qb, qh, qs, kb, kh, ks, vb, vh, vs, ob, oh, os, bias_b,
                          bias_s, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
                          WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LOG2E: tl.constexpr):
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    m, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, WIDTH)
    inside_m = m[:, None] < length
    block_q = tl.load(q + batch * qb + head * qh + m[:, None] * qs + d[None, :], mask=inside_m, other=0.0)
    block_g = tl.load(dout + batch * gb + head * gh + m[:, None] * gs + d[None, :], mask=inside_m, other=0.0)
    row = tl.load(rows + batch * length + m, mask=m < length, other=0)
    add = tl.load(sums + batch * length + m, mask=m < length, other=0)
    logs = tl.load(lse + tl.program_id(1) * length + m, mask=m < length, other=0.0)
    own_delta = tl.load(delta + tl.program_id(1) * length + m, mask=m < length, other=0.0)
    own = m
    found = tl.zeros((M, WIDTH), tl.float32)
    begin_at, end_at = 0, length
    if CAUSAL:
        end_at = tl.minimum(length, (tl.program_id(0) + 1) * M)
    if MASK == 2:
        own = tl.load(documents + batch * length + m, mask=m < length, other=-2)
        begin_at = tl.min(tl.load(first + batch * length + m, mask=m < length, other=length), 0) // N * N
    for begin in range(begin_at, end_at, N):
        n = begin + tl.arange(0, N)
        inside = n[:, None] < length
        block_k = tl.load(k + batch * kb + head * kh + n[:, None] * ks + d[None, :], mask=inside, other=0.0)
        block_v = tl.load(v + batch * vb + head * vh + n[:, None] * vs + d[None, :], mask=inside, other=0.0)
        s = _scores(block_q, block_k, bias + batch * bias_b, documents + batch * length, own, m, n, length, bias_s,
                    CAUSAL, MASK, LOG2E)
        p = tl.exp2(s - logs[:, None])
        dp = tl.dot(block_g, tl.trans(block_v)).to(tl.float32)
        if DROPOUT:
            column = tl.load(columns + head * length + n, mask=n < length, other=0)
            dp = tl.where(_kept(row, add, column, threshold), dp * scale, 0.0)
        ds = p * (dp - own_delta[:, None])
        found += tl.dot(ds.to(block_k.dtype), block_k).to(tl.float32)
    tl.store(dq + batch * ob + head * oh + m[:, None] * os + d[None, :], found.to(dq.dtype.element_ty), mask=inside_m)


@triton.jit
def _backward_columns_kernel(dout, q, k, v, bias, documents, first, last, rows, sums, columns, lse, delta, dk, dv,
                             heads, length, threshold, scale, gb, gh, gs, qb, qh, qs, kb, kh, ks, vb, vh, vs, ob, oh,
                             os, bias_b, bias_s, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
                             WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LOG2E: tl.constexpr):
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    n, d = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, WIDTH)
    inside_n = n[:, None] < length
    block_k = tl.load(k + batch * kb + head * kh + n[:, None] * ks + d[None, :], mask=inside_n, other=0.0)
    block_v = tl.load(v + batch * vb + head * vh + n[:, None] * vs + d[None, :], mask=inside_n, other=0.0)
    column = tl.load(columns + head * length + n, mask=n < length, other=0)
    by_k, by_v = tl.zeros((N, WIDTH), tl.float32), tl.zeros((N, WIDTH), tl.float32)
    begin_at, end_at = 0, length
    if CAUSAL:
        begin_at = tl.program_id(0) * N // M * M
    if MASK == 2:
        end_at = tl.minimum(length, 1 + tl.max(tl.load(last + batch * length + n, mask=n < length, other=0), 0))
    for begin in range(begin_at, end_at, M):
        m = begin + tl.arange(0, M)
        inside = m[:, None] < length
        block_q = tl.load(q + batch * qb + head * qh + m[:, None] * qs + d[None, :], mask=inside, other=0.0)
        block_g = tl.load(dout + batch * gb + head * gh + m[:, None] * gs + d[None, :], mask=inside, other=0.0)
        logs = tl.load(lse + tl.program_id(1) * length + m, mask=m < length, other=float("inf"))
        own_delta = tl.load(delta + tl.program_id(1) * length + m, mask=m < length, other=0.0)
        own = m
        if MASK == 2:
            own = tl.load(documents + batch * length + m, mask=m < length, other=-2)
        s = _scores(block_q, block_k, bias + batch * bias_b, documents + batch * length, own, m, n, length, bias_s,
                    CAUSAL, MASK, LOG2E)
        p = tl.exp2(s - logs[:, None])
        dp = tl.dot(block_g, tl.trans(block_v)).to(tl.float32)
        given = p
        if DROPOUT:
            row = tl.load(rows + batch * length + m, mask=m < length, other=0)
            add = tl.load(sums + batch * length + m, mask=m < length, other=0)
            kept = _kept(row, add, column, threshold)
            given = tl.where(kept, p * scale, 0.0)
            dp = tl.where(kept, dp * scale, 0.0)
        by_v += tl.dot(tl.trans(given).to(block_g.dtype), block_g).to(tl.float32)
        ds = p * (dp - own_delta[:, None])
        by_k += tl.dot(tl.trans(ds).to(block_q.dtype), block_q).to(tl.float32)
    tl.store(dk + batch * ob + head * oh + n[:, None] * os + d[None, :], by_k.to(dk.dtype.element_ty), mask=inside_n)
    tl.store(dv + batch * ob + head * oh + n[:, None] * os + d[None, :], by_v.to(dv.dtype.element_ty), mask=inside_n)


def _shared(node: Node, q: Tensor, bias: Tensor | None, spans: tuple, parts: tuple) -> dict[str, Any]:
    """Arguments that all three kernels have."""
    nothing = q.new_zeros((), dtype=torch.int32) if not (spans and parts) else None
    rows, sums, columns = (part.contiguous().reshape(-1) for part in parts) if parts else (nothing,) * 3
    documents, first, last = (item.contiguous() for item in spans) if spans else (nothing,) * 3
    if bias is not None:
        bias = bias.contiguous()
    mask = _DOCUMENTS if spans else _ALL if bias is None else _BIASED
    return {"bias": q if bias is None else bias, "documents": documents, "first": first, "last": last, "rows": rows,
            "sums": sums, "columns": columns, "heads": q.shape[1], "length": q.shape[2],
            "threshold": node.attributes.get("threshold", 0), "scale": node.attributes.get("scale", 1.0),
            "bias_b": 0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
            "bias_s": 0 if bias is None else bias.stride(2), "CAUSAL": bool(node.attributes["causal"] or spans),
            "MASK": mask, "DROPOUT": bool(parts), "WIDTH": q.shape[3], "LOG2E": _LOG2E}


def _tiles(kernel: str) -> dict[str, int]:
    rows, columns, warps, stages = TILES[kernel]
    return {"M": rows, "N": columns, "num_warps": warps, "num_stages": stages}


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {name + place: tensor.stride(dim) for name, tensor in tensors.items() for dim, place in enumerate("bhs")}


def _ready(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def forward(node: Node, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, parts: tuple,
            spans: tuple = ()) -> tuple[Tensor, Tensor]:
    """(out [B, H, S, K], log2 of the sum of exponentials [B, H, S]); q is scaled already, K a power of two from 16.

    Args:
        node: its attributes say whether attention is causal, and threshold and scale of the dropout.
        bias: [B or 1, 1, S, S]; None where attention is causal or `spans` are given.
        parts: rows, sums and columns of the hash; () for no dropout.
        spans: documents, first and last (`fused`, "DocumentSpans"); () where documents are not told apart by them.
    """
    q, k, v = _ready(q, k, v)
    batch, heads, length, width = q.shape
    # Rows of all heads beside each other, as the projection behind reads them.
    out = torch.empty(batch, length, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    tiles = _tiles("forward")
    _forward_kernel[(triton.cdiv(length, tiles["M"]), batch * heads)](
        q=q, k=k, v=v, out=out, lse=lse, **_strides(q=q, k=k, v=v, o=out), **_shared(node, q, bias, spans, parts),
        **tiles)
    return out, lse


def backward(node: Node, dout: Tensor, found: tuple, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
             parts: tuple, spans: tuple = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v, from what `forward` found."""
    out, lse = found
    dout, q, k, v = _ready(dout, q, k, v)
    batch, heads, length, width = q.shape
    delta = (dout.float() * out.float()).sum(-1).contiguous()
    dq, dk, dv = (torch.empty(batch, length, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
                  for _ in range(3))
    shared = {"dout": dout, "q": q, "k": k, "v": v, "lse": lse, "delta": delta,
              **_strides(g=dout, q=q, k=k, v=v, o=dq), **_shared(node, q, bias, spans, parts)}
    by_rows, by_columns = _tiles("rows"), _tiles("columns")
    _backward_rows_kernel[(triton.cdiv(length, by_rows["M"]), batch * heads)](dq=dq, **shared, **by_rows)
    _backward_columns_kernel[(triton.cdiv(length, by_columns["N"]), batch * heads)](dk=dk, dv=dv, **shared,
                                                                                   **by_columns)
    return dq, dk, dv
