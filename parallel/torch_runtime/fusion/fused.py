"""What fused nodes compute: by torch's own fused operators on CPUs and GPUs, by Triton kernels where torch has none,
and in a plain form that a compiler fuses better itself ("traced").

Sources of the kernels behind them: FlashAttention (Dao 2023) and cuDNN's attention, both through torch; the rest in
`kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.torch_runtime.fusion import swiglu, target_attention
from parallel.torch_runtime.graph import Node

_aten = torch.ops.aten


def fused_rules(device: torch.device, traced: bool = False) -> dict[str, Callable]:
    """Rules of the fused nodes on a device.

    Args:
        device: where they run.
        traced: the graph is going to be compiled as a whole: parts that Inductor fuses are left in plain torch.
    """
    rules = dict(_PLAIN)
    if device.type == "cuda" and not traced:
        from parallel.torch_runtime.fusion import kernels

        rules |= {"RowSums": kernels.row_sums, "RowSumsGrad": kernels.row_sums_grad, "FusedAdam": _adam_cuda,
                  "FusedAdagrad": _adagrad_cuda, "FusedSwish": kernels.swish, "FusedSwishGrad": kernels.swish_grad,
                  "SumOfSquares": _sum_of_squares_cuda}
        if torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm_backward", "CUDA"):  # torch 2.9 on
            rules |= {"RmsNorm": _rms_norm_cuda, "RmsNormGrad": _rms_norm_grad_cuda}
    return rules


# -- attention --------------------------------------------------------------------------------------------------------


def _parts(node: Node, rest: Sequence[Any]) -> tuple[Tensor | None, tuple, tuple]:
    """Bias (None where the mask is causal, or told by documents), spans of documents, and what dropout reads."""
    dropout = tuple(rest[-3:]) if node.attributes["dropout"] else ()
    if node.attributes.get("documents"):
        return None, tuple(rest[:3]), dropout
    return None if node.attributes["causal"] else rest[0], (), dropout


def _bias_of(spans: tuple, dtype: torch.dtype) -> Tensor:
    """The mask of documents written out, [B, 1, S, S]."""
    documents = spans[0]
    visible = (documents[:, :, None] == documents[:, None, :]).tril()
    return torch.where(visible, 0.0, -10000.0).to(dtype)[:, None]


def _own_kernel(q: Tensor, spans: tuple, dropout: tuple) -> bool:
    """Whether attention runs in the kernels of `dropout_attention`."""
    return q.is_cuda and bool(spans or dropout)


def _attention(node: Node, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple:
    """(out, what the gradient needs...) of softmax(q k^T + bias) v; q is scaled already."""
    bias, spans, dropout = _parts(node, rest)
    if _own_kernel(q, spans, dropout):
        from parallel.torch_runtime.attention import dropout_attention

        return dropout_attention.forward(node, q, k, v, bias, dropout, spans)
    if spans:
        bias = _bias_of(spans, q.dtype)
    if dropout:
        return _attention_with_dropout(node, q, k, v, bias, dropout)
    causal = node.attributes["causal"]
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, causal, False, scale=1.0)
    if q.is_cuda:
        if bias is not None:
            bias = bias.expand(q.shape[0], q.shape[1], -1, -1)
        return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=1.0)
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=1.0)


def _attention_grad(node: Node, dout: Tensor, forward: tuple, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple:
    """Gradients by q, k and v."""
    bias, spans, dropout = _parts(node, rest)
    if _own_kernel(q, spans, dropout):
        from parallel.torch_runtime.attention import dropout_attention

        return dropout_attention.backward(node, dout, forward, q, k, v, bias, dropout, spans)
    if spans:
        bias = _bias_of(spans, q.dtype)
    if dropout:
        return _attention_with_dropout_grad(node, dout, forward, q, k, v, bias, dropout)
    causal, out, lse = node.attributes["causal"], forward[0], forward[1]
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        _, _, cum_q, cum_k, max_q, max_k, seed, offset, *_ = forward
        return _aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, 0.0, causal, scale=1.0)
    if q.is_cuda:
        if bias is not None:
            bias = bias.expand(q.shape[0], q.shape[1], -1, -1)
        found = _aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, bias, out, lse, forward[2], forward[3], 0.0, [True, True, True, False], causal, scale=1.0)
        return found[:3]
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=1.0)


def _document_spans(node: Node, documents: Tensor) -> tuple:
    """(documents, first, last), int32 [B, S]: numbers of the documents, the first and the last place with the same
    number, whatever the order of the numbers."""
    same = (documents[:, :, None] == documents[:, None, :]).byte()
    last = documents.shape[1] - 1 - same.flip(-1).argmax(-1)
    return documents.int(), same.argmax(-1).int(), last.int()


def kept_mask(rows: Tensor, sums: Tensor, columns: Tensor, threshold: int) -> Tensor:
    """The project's dropout: an element is kept where the hash rows x columns + sums (int32, wrapping) is not below the
    threshold (`parallel.layers.dropout`)."""
    return rows * columns + sums >= threshold


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).float()
    if bias is None:
        size = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1), -10000.0)
    else:
        scores = scores + bias.float()
    return torch.softmax(scores, -1)


def _attention_with_dropout(node: Node, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, parts: tuple) -> tuple:
    p = _probabilities(q, k, bias)
    mask = kept_mask(*parts, node.attributes["threshold"]) * node.attributes["scale"]
    return (p.to(q.dtype) * mask.to(q.dtype)) @ v, p


def _attention_with_dropout_grad(node: Node, dout: Tensor, forward: tuple, q: Tensor, k: Tensor, v: Tensor,
                                 bias: Tensor | None, parts: tuple) -> tuple:
    p = forward[1]
    mask = (kept_mask(*parts, node.attributes["threshold"]) * node.attributes["scale"]).to(q.dtype)
    dv = (p.to(q.dtype) * mask).transpose(-1, -2) @ dout
    dp = ((dout @ v.transpose(-1, -2)) * mask).float()
    ds = (p * (dp - (dp * p).sum(-1, keepdim=True))).to(q.dtype)
    return ds @ k, ds.transpose(-1, -2) @ q, dv


# -- cross entropy ----------------------------------------------------------------------------------------------------


def _hit(logits: Tensor, labels: Tensor) -> Tensor:
    return labels.reshape(-1, 1) == torch.arange(logits.shape[-1], device=logits.device, dtype=labels.dtype)


def _row_sums(node: Node, logits: Tensor, largest: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum exp(x - largest), x[label] - largest or 0 where the label is none of the columns), float32 [N]."""
    x = logits.float() - largest
    return x.exp().sum(-1), torch.where(_hit(logits, labels), x, 0.0).sum(-1)


def _row_sums_grad(node: Node, logits: Tensor, largest: Tensor, labels: Tensor, by_total: Tensor,
                   by_chosen: Tensor) -> Tensor:
    """exp(x - largest) by_total + by_chosen in the label's column, [N, V]."""
    x = logits.float() - largest
    found = x.exp() * by_total.reshape(-1, 1) + torch.where(_hit(logits, labels), by_chosen.reshape(-1, 1), 0.0)
    return found.to(getattr(torch, node.outputs[0].dtype))


# -- the rest ---------------------------------------------------------------------------------------------------------


def _layer_norm(node: Node, x: Tensor, gamma: Tensor, beta: Tensor) -> tuple:
    return torch.native_layer_norm(x, [x.shape[-1]], gamma, beta, node.attributes["epsilon"])


def _layer_norm_grad(node: Node, x: Tensor, gradient: Tensor, inverse: Tensor, mean: Tensor, gamma: Tensor) -> tuple:
    # The bias' values do not matter, its type and shape do.
    return _aten.native_layer_norm_backward(gradient.contiguous(), x, [x.shape[-1]], mean, inverse, gamma, gamma,
                                            [True, True, True])


def _rms_norm_cuda(node: Node, x: Tensor, gamma: Tensor, epsilon: float) -> tuple:
    return _aten._fused_rms_norm(x, [x.shape[-1]], gamma, epsilon)


def _rms_norm_grad_cuda(node: Node, gradient: Tensor, x: Tensor, inverse: Tensor, gamma: Tensor) -> tuple:
    return _aten._fused_rms_norm_backward(gradient.contiguous(), x, [x.shape[-1]], inverse, gamma, [True, True])


def _sum_of_squares(node: Node, x: Tensor) -> Tensor:
    return (x * x).sum()


def _sum_of_squares_cuda(node: Node, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x)
    return norm * norm


def _sums_of_squares(node: Node, *tensors: Tensor) -> Tensor:
    """sum_i weight_i |tensor_i|^2 in float32, in the shape that the node declares."""
    total: Tensor | None = None
    sorts: dict[tuple, list[Tensor]] = {}
    for tensor, weight in zip(tensors, node.attributes["weights"], strict=True):
        sorts.setdefault((weight, tensor.dtype), []).append(tensor)
    for (weight, dtype), listed in sorts.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        norms = torch.stack(torch._foreach_norm(listed, 2.0, dtype=wide))
        part = (norms * norms).sum() * weight
        total = part if total is None else total + part
    return total.reshape(node.outputs[0].shape)


def _scalars(node: Node, *values: Any) -> Tensor:
    device = next(value.device for value in values if isinstance(value, Tensor))
    if len(values) == node.outputs[0].shape[0] - 2:
        values = (*values, 1.0, 0.0)
    return torch.stack([value.reshape(()).float() if isinstance(value, Tensor)
                        else torch.full((), float(value), device=device) for value in values])


def _adam(node: Node, p: Tensor, m: Tensor, v: Tensor, scalars: Tensor, gradient: Tensor, *_: Any) -> None:
    rate, beta1, beta2, epsilon, decay, factor, skipped = scalars.unbind()
    gradient = torch.where(skipped > 0, 0.0, gradient.float() * factor)
    new_m = beta1 * m + (1.0 - beta1) * gradient
    new_v = beta2 * v + (1.0 - beta2) * gradient * gradient
    p.copy_(p - rate * (new_m / (new_v.sqrt() + epsilon) + decay * p))
    m.copy_(new_m)
    v.copy_(new_v)


def _adagrad(node: Node, p: Tensor, a: Tensor, scalars: Tensor, gradient: Tensor) -> None:
    rate, epsilon, factor, skipped = scalars.unbind()
    gradient = torch.where(skipped > 0, 0.0, gradient.to(p.dtype) * factor)
    total = a + gradient * gradient
    p.copy_(p - rate * gradient / (total.sqrt() + epsilon))
    a.copy_(total)


def _adagrad_cuda(node: Node, p: Tensor, a: Tensor, scalars: Tensor, gradient: Tensor) -> None:
    from parallel.torch_runtime.fusion import kernels

    fits = p.is_contiguous() and a.is_contiguous() and p.dtype == a.dtype == torch.float32
    (kernels.adagrad if fits else _adagrad)(node, p, a, scalars, gradient)


def _adam_cuda(node: Node, p: Tensor, m: Tensor, v: Tensor, scalars: Tensor, gradient: Tensor, *_: Any) -> None:
    from parallel.torch_runtime.fusion import kernels

    fits = p.is_contiguous() and p.dtype == m.dtype == v.dtype == torch.float32
    (kernels.adam if fits else _adam)(node, p, m, v, scalars, gradient)


def _linear(node: Node, x: Tensor, w: Tensor, left: Any, right: Any, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x.t() if left else x, w.t() if right else w)


_PLAIN: dict[str, Callable] = {
    "Item": lambda node, items: items[node.attributes["index"]], "FusedAttention": _attention,
    "FusedAttentionGrad": _attention_grad, "RowSums": _row_sums, "RowSumsGrad": _row_sums_grad,
    "FusedLayerNorm": _layer_norm, "FusedLayerNormGrad": _layer_norm_grad, "SumOfSquares": _sum_of_squares,
    "AdamScalars": _scalars,
    "AdagradScalars": _scalars, "FusedAdagrad": _adagrad, "FusedAdam": _adam, "Linear": _linear,
    "DocumentSpans": _document_spans,
    "SumsOfSquares": _sums_of_squares, **target_attention.RULES, **swiglu.RULES,
}  # fmt: skip
