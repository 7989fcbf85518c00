"""Ascend's FlashAttentionScore and its gradient in torch: on GPUs in half precision by the kernels of
`dropout_attention`, elsewhere written out, sequence by sequence.

Two layouts are in use: TND, documents one after the other, [T, H, K], each causal; and BNSD, [B, H, S, K], with a mask
[B, 1, S, S] (1 = hidden) and perhaps the mask of dropout as bits. The results are the largest scores and the sums of
their exponentials, eight copies of each, one that nobody reads, and the mixed values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from parallel.torch_runtime.graph import Node

_BNSD, _TND = 1, 4
_KERNEL_WIDTHS = (16, 32, 64, 128)
_LOG2E = math.log2(math.e)


def forward(node: Node, q: Tensor, k: Tensor, v: Tensor, shift: None, bits: Tensor | None, padding: None,
            mask: Tensor | None, prefix: None, ends: Any, other: Any, heads: int, keep: float, scale: float, *rest: Any
            ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rule of FlashAttentionScore.

    Raises:
        ValueError: a layout that no model uses.
    """
    ends = _ends(ends, q, rest)
    if ends is not None and _has_kernel(q):
        out, logs = _kernels().forward(_causal(node), *_rows(q * scale, k, v), None, (), _spans(ends, q))
        logs = logs[0].t()[..., None] / _LOG2E  # the sum's logarithm: with it the largest score counts as 0
        return logs.expand(*q.shape[:-1], 8), torch.ones_like(logs).expand(*q.shape[:-1], 8), q.new_zeros(1), \
            out[0].transpose(0, 1)
    kept, out = _kept(bits, keep), torch.empty_like(v)
    wide = torch.promote_types(q.dtype, torch.float32)
    largest, total = (q.new_empty((*q.shape[:-1], 8), dtype=wide) for _ in range(2))
    for rows, hidden in _sequences(q, mask, ends):
        queries, keys, values = (_heads_first(x[rows]) for x in (q, k, v))
        scores = _scores(queries, keys, hidden, scale, wide)
        top = scores.amax(-1, keepdim=True)
        p = torch.exp(scores - top)
        sums = p.sum(-1, keepdim=True)
        out[rows] = _heads_first(((p / sums * kept).to(v.dtype)) @ values)
        largest[rows], total[rows] = _heads_first(top.expand(*top.shape[:-1], 8)), _heads_first(
            sums.expand(*sums.shape[:-1], 8))
    return largest, total, q.new_zeros(1), out


def backward(node: Node, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, shift: None, bits: Tensor | None,
             padding: None, mask: Tensor | None, largest: Tensor, total: Tensor, unused: Any, out: Tensor, prefix: None,
             ends: Any, other: Any, heads: int, keep: float, scale: float, *rest: Any) -> tuple:
    """The rule of FlashAttentionScoreGrad: gradients by queries, keys and values, and one that nobody reads."""
    ends = _ends(ends, q, rest)
    if ends is not None and _has_kernel(q):
        logs = ((largest[..., 0] + torch.log(total[..., 0])) * _LOG2E).t()[None].contiguous()
        dq, dk, dv = _kernels().backward(_causal(node), *_rows(gradient), (*_rows(out), logs), *_rows(q * scale, k, v),
                                         None, (), _spans(ends, q))
        return (dq[0] * scale).transpose(0, 1), dk[0].transpose(0, 1), dv[0].transpose(0, 1), q.new_zeros(1)
    kept, wide = _kept(bits, keep), torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, hidden in _sequences(q, mask, ends):
        queries, keys, values, dy, y, top, sums = (_heads_first(x[rows]) for x in (q, k, v, gradient, out, largest,
                                                                                  total))
        p = torch.exp(_scores(queries, keys, hidden, scale, wide) - top[..., :1]) / sums[..., :1]
        by_p = (dy @ values.transpose(-1, -2)).to(wide) * kept
        delta = (dy.to(wide) * y.to(wide)).sum(-1, keepdim=True)
        ds = (p * (by_p - delta) * scale).to(q.dtype)
        dv[rows] = _heads_first((p * kept).to(dy.dtype).transpose(-1, -2) @ dy)
        dq[rows], dk[rows] = _heads_first(ds @ keys), _heads_first(ds.transpose(-1, -2) @ queries)
    return dq, dk, dv, q.new_zeros(1)


def _ends(ends: Any, q: Tensor, rest: tuple) -> Tensor | None:
    """Where the documents end, int64 [M]; None in the layout BNSD."""
    layout, sparse = (int(item) for item in rest[-2:])
    if (layout, sparse) == (_BNSD, 0) and ends is None:
        return None
    if layout != _TND or sparse not in (2, 3) or ends is None:
        raise ValueError(f"no rule for FlashAttentionScore with layout {layout}, sparse mode {sparse}")
    return torch.as_tensor(ends, dtype=torch.int64, device=q.device)


def _sequences(q: Tensor, mask: Tensor | None, ends: Tensor | None) -> list[tuple[Any, Tensor | None]]:
    """(index of its rows, which pairs of positions are hidden) of every sequence."""
    if ends is None:
        return [((Ellipsis,), None if mask is None else mask.bool())]
    listed = ends.tolist()
    if listed[-1] != len(q):
        raise ValueError(f"documents of {listed[-1]} rows, of which there are {len(q)}")
    return [(slice(start, end), torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1))
            for start, end in zip((0, *listed[:-1]), listed, strict=True) if end > start]


def _scores(queries: Tensor, keys: Tensor, hidden: Tensor | None, scale: float, wide: torch.dtype) -> Tensor:
    scores = (queries @ keys.transpose(-1, -2)).to(wide) * scale
    return scores if hidden is None else scores.masked_fill(hidden, -math.inf)


def _heads_first(x: Tensor) -> Tensor:
    """[s, H, K] of one sequence as [H, s, K]; [B, H, S, K] as it is. Its own inverse."""
    return x.transpose(0, 1) if x.dim() == 3 else x


def _kept(bits: Tensor | None, keep: float) -> Any:
    """What the probabilities are multiplied by: 0 or 1 / keep (a float32), the first column in the lowest bit."""
    if bits is None:
        return 1.0
    grown = (torch.ones(()) / torch.tensor(keep, dtype=torch.float32)).item()
    places = torch.arange(8, device=bits.device)
    return ((bits[..., None].int() >> places) & 1).flatten(-2) * grown


def _has_kernel(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] in _KERNEL_WIDTHS


def _kernels() -> Any:
    from parallel.torch_runtime.attention import dropout_attention

    return dropout_attention


def _causal(node: Node) -> Node:
    return Node("FusedAttention", [], [], {"causal": True, "dropout": False}, node.scope)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """[T, H, K] as one sample [1, H, T, K]."""
    return [x.transpose(0, 1)[None] for x in tensors]


def _spans(ends: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row the number of its document, the first and the last row of it: int32 [1, T] each."""
    numbers = torch.searchsorted(ends, torch.arange(len(q), device=q.device), right=True)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    return tuple(x.int()[None] for x in (numbers, starts[numbers], ends[numbers] - 1))
