"""What the fused nodes of graphs that serve compute (`serving_pass`): in plain torch on any device, by Triton's kernels
(`product_kernels`, `attention.slot_attention`) on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor

from parallel.torch_runtime.graph import Graph, Node

if TYPE_CHECKING:
    from parallel.torch_runtime.inference.weights import Weights

GROUP = 128
EIGHT_ROWS = 32
"""Rows up to which products take int8 weights: with more they are no longer bound by reading weights."""
FLOAT_ROWS = 1
"""Rows up to which products of floating weights [O, K] run in the project's own kernel."""


def serving_rules(device: torch.device, weights: Weights) -> dict[str, Callable]:
    """Rules of the fused nodes on a device.

    Args:
        device: where they run.
        weights: of the products, by the names that the nodes have.
    """
    kernels = device.type == "cuda"
    product = _product_by_kernel if kernels else _product
    return {"NormedRows": _normed_by_kernel if kernels else _normed,
            "SlotAttention": _slot_attention_by_kernel if kernels else _slot_attention,
            "Product": lambda node, x, *extra: _split(node, product(node, weights.of(node), x, *extra))}


def _split(node: Node, y: Tensor) -> Tensor | tuple[Tensor, ...]:
    count = len(node.attributes["weights"])
    return y if count == 1 else y.split(y.shape[-1] // count, -1)


# -- products ---------------------------------------------------------------------------------------------------------


def widened(w: Tensor, scale: Tensor) -> Tensor:
    """float32 [T, O, K] of int8 weights [T, O, K] with scales [T, G, O]."""
    scale = scale.transpose(1, 2)
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(GROUP, -1)[..., :w.shape[-1]]
    return w.float() * scale


def _product(node: Node, kept: tuple, x: Tensor, extra: Tensor | None = None) -> Tensor:
    w, scale, bias = kept
    if scale is not None:
        y = (x.reshape(w.shape[0], -1, w.shape[2]).float() @ widened(w, scale).transpose(1, 2))
        y = y if bias is None else y + bias[:, None].float()
        y = y.reshape(*x.shape[:-1], w.shape[1])
    elif w.dim() == 2:
        y = nnf.linear(x, w, None if bias is None else bias[0]) if node.attributes["turned"] else x @ w
        y = y + bias[0] if bias is not None and not node.attributes["turned"] else y
    else:
        y = torch.bmm(x, w) if bias is None else torch.baddbmm(bias[:, None], x, w)
    if node.attributes["gelu"]:
        y = nnf.gelu(y, approximate="tanh")
    return (y if extra is None else y + extra).to(x.dtype)


def _product_by_kernel(node: Node, kept: tuple, x: Tensor, extra: Tensor | None = None) -> Tensor:
    w, scale, bias = kept
    if not _fits(node, kept, x.shape[-2], x.dtype):
        return _product(node, kept, x, extra)
    from parallel.torch_runtime.fusion import product_kernels

    w = w if w.dim() == 3 else w[None]
    rows = x.reshape(w.shape[0], -1, w.shape[2])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    if scale is None and product_kernels.CHOSEN.get(product_kernels.key_of(rows, w), True) is None:
        return _product(node, kept, x, extra)
    if extra is not None:
        extra = extra.contiguous().view(w.shape[0], -1, w.shape[1])
    y = product_kernels.product(rows, w, scale, bias, extra, node.attributes["gelu"])
    return y.view(*x.shape[:-1], w.shape[1])


def _fits(node: Node, kept: tuple, rows: int, dtype: torch.dtype) -> bool:
    """Whether a product may run in the project's own kernel."""
    w, scale, _ = kept
    return scale is not None or (node.attributes["turned"] and rows <= FLOAT_ROWS and w.dtype == dtype)


def choose_tiles(graph: Graph, weights: Weights, device: torch.device) -> None:
    """Finds the fastest tiles for a graph's products, by the clock."""
    from parallel.torch_runtime.fusion import tiles

    for node in graph.nodes:
        if node.op != "Product":
            continue
        kept, rows = weights.of(node), node.attributes["rows"]
        dtype = getattr(torch, node.attributes["dtype"])
        if _fits(node, kept, rows, dtype):
            w = kept[0] if kept[0].dim() == 3 else kept[0][None]
            tiles.choose(torch.randn(w.shape[0], rows, w.shape[2], device=device).to(dtype), w, kept[1])


# -- layer norm, attention --------------------------------------------------------------------------------------------


def _normed(node: Node, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    y = nnf.layer_norm(x.float(), x.shape[-1:], gamma.float(), beta.float(), node.attributes["epsilon"])
    return y.to(getattr(torch, node.outputs[0].dtype))


def _normed_by_kernel(node: Node, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    from parallel.torch_runtime.fusion import product_kernels

    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    y = product_kernels.normed(flat, gamma, beta, node.attributes["epsilon"], getattr(torch, node.outputs[0].dtype))
    return y.view(x.shape)


def _slot_attention(node: Node, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, write: Tensor,
                    read: Tensor, visible: Tensor) -> Tensor:
    heads, width = keys.shape[1:]
    for table, new in ((keys, k), (values, v)):
        table.index_copy_(0, write.reshape(-1).long(), new.reshape(-1, heads, width))
    groups, slots = read.shape
    of_slots = [table.index_select(0, read.reshape(-1).long()).reshape(groups, slots, heads, width).transpose(1, 2)
                for table in (keys, values)]
    query = (q.float() * node.attributes["scale"]).reshape(groups, heads, 1, width)
    scores = query @ of_slots[0].float().transpose(-1, -2)  # [G, H, 1, C]
    hidden = visible.reshape(groups, 1, 1, slots) == 0
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1).nan_to_num(0.0)
    return (weights @ of_slots[1].float()).reshape(groups, heads * width).to(q.dtype)


def _slot_attention_by_kernel(node: Node, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, write: Tensor,
                              read: Tensor, visible: Tensor) -> Tensor:
    from parallel.torch_runtime.attention import slot_attention

    visible = visible.reshape(read.shape)
    return slot_attention.attend(keys, values, q, k, v, write.reshape(-1), read, visible, node.attributes["scale"])


