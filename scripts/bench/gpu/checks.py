"""The kernels of the fused nodes on a GPU: how far they are from their plain forms, and how long attention takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel.torch_runtime.fusion import fused
from parallel.torch_runtime.graph import Kind, Node


def check(device: torch.device) -> dict[str, float]:
    """Largest relative difference of every fused node of its own kernel from its plain form."""
    own, plain, found = fused.fused_rules(device), fused._PLAIN, {}
    torch.manual_seed(0)

    def told(name: str, got, wanted) -> None:
        pairs = zip(got, wanted, strict=True) if isinstance(got, (tuple, list)) else [(got, wanted)]
        found[name] = max(float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-20))
                          for a, b in pairs)

    rows, columns = (512, 40000) if device.type == "cuda" else (16, 300)
    logits = torch.randn(rows, columns, device=device).bfloat16()
    labels = torch.randint(-2, columns + 2, (rows,), device=device, dtype=torch.int32)
    largest = logits.float().amax(-1, keepdim=True)
    told("row_sums", own["RowSums"](None, logits, largest, labels), plain["RowSums"](None, logits, largest, labels))
    spread = [torch.randn(rows, device=device) for _ in range(2)]
    node = Node("RowSumsGrad", [], [Kind((rows, columns), "bfloat16")])
    told("row_sums_grad", own["RowSumsGrad"](node, logits, largest, labels, *spread),
         plain["RowSumsGrad"](node, logits, largest, labels, *spread))
    p, m, v, g = (torch.rand(1000, 37, device=device) for _ in range(4))
    scalars = torch.tensor([1e-3, 0.9, 0.95, 1e-8, 0.1, 0.5, 0.0], device=device)
    ours, theirs = ([item.clone() for item in (p, m, v)] for _ in range(2))
    own["FusedAdam"](None, *ours, scalars, g)
    plain["FusedAdam"](None, *theirs, scalars, g)
    told("adam", ours, theirs)
    told("sum_of_squares", own["SumOfSquares"](None, g), plain["SumOfSquares"](None, g))
    for dropout in (False, True):
        for mask in MASKS:
            found |= check_attention(device, own, dropout, mask)
    return found


MASKS = ("bias", "causal", "documents")


def attention_case(device: torch.device, size: tuple, mask: str, dropout: bool, documents: Tensor) -> tuple:
    """(node, inputs of a fused attention, bias, mask of the kept probabilities); q is scaled."""
    q, k, v = (torch.randn(size, device=device).bfloat16() for _ in range(3))
    visible = (documents[:, :, None] == documents[:, None, :]).tril()
    bias = torch.where(visible, 0.0, -10000.0)[:, None]
    extra, attributes = [], {"causal": mask == "causal", "dropout": dropout, "documents": mask == "documents"}
    kept = torch.ones((), device=device)
    if dropout:
        keys = [torch.randint(-2**31, 2**31 - 1, (size[0], 1, size[2], 1), device=device).int() for _ in range(2)]
        columns = torch.randint(-2**31, 2**31 - 1, (1, size[1], 1, size[2]), device=device).int()
        attributes |= {"threshold": int(-(2**31) + 0.1 * 2**32), "scale": 1 / 0.9}
        extra = [*keys, columns]
        kept = (keys, columns, attributes["threshold"], attributes["scale"])
    told = {"bias": [bias.bfloat16()], "causal": [], "documents": fused._document_spans(None, documents)}[mask]
    return Node("FusedAttention", [], [], attributes), [q / 8, k, v, *told, *extra], bias, kept


def check_attention(device: torch.device, own: dict, dropout: bool, mask: str) -> dict[str, float]:
    """Attention and its gradients against the written-out form in float32."""
    size = (2, 4, 256, 64)
    documents = torch.arange(size[2], device=device)[None].expand(size[0], -1) // (size[2] if mask == "causal" else 100)
    node, inputs, bias, kept = attention_case(device, size, mask, dropout, documents)
    if dropout:
        kept = fused.kept_mask(*kept[0], kept[1], kept[2]) * kept[3]
    dout = torch.randn(size, device=device).bfloat16()
    forward = own["FusedAttention"](node, *inputs)
    gradients = own["FusedAttentionGrad"](node, dout, forward, *inputs)
    leaves = [item.float().requires_grad_() for item in inputs[:3]]
    wanted = (torch.softmax(leaves[0] @ leaves[1].transpose(-1, -2) + bias, -1) * kept) @ leaves[2]
    wanted.backward(dout.float())
    far = [float((a.float() - b).abs().max() / b.abs().max())
           for a, b in zip([forward[0], *gradients], [wanted.detach(), *(item.grad for item in leaves)], strict=True)]
    return {f"attention_{mask}{'_dropout' if dropout else ''}": max(far)}


def time_attention(device: torch.device, tiles: dict[str, list[tuple]]) -> dict[str, Any]:
    """Milliseconds of attention, (forward, backward), at the size of a layer (batch 16, two documents a sample), by
    kind of mask; and with every tile of `tiles` (kernel: [(rows, columns, warps, stages)]), the best of which stay set.
    """
    from parallel.torch_runtime.attention import dropout_attention

    own, size, found = fused.fused_rules(device), (16, 16, 1024, 64), {}
    documents = torch.arange(size[2], device=device)[None].expand(size[0], -1) // 512
    dout = torch.randn(size, device=device).bfloat16()

    def timed(mask: str, dropout: bool) -> list[float]:
        node, inputs, *_ = attention_case(device, size, mask, dropout, documents)
        forward = own["FusedAttention"](node, *inputs)
        return [round(_milliseconds(own["FusedAttention"], node, *inputs), 3),
                round(_milliseconds(own["FusedAttentionGrad"], node, dout, forward, *inputs), 3)]

    for kernel, choices in tiles.items():
        times = {}
        for choice in choices:
            dropout_attention.TILES[kernel] = choice
            try:
                times[choice] = timed("documents", True)
            except Exception as error:  # a tile that does not fit into shared memory
                found[f"{kernel} {choice}"] = str(error).splitlines()[0][:60]
        place = 0 if kernel == "forward" else 1
        dropout_attention.TILES[kernel] = min(times, key=lambda choice, times=times, place=place: times[choice][place])
        found |= {f"{kernel} {choice}": pair[place] for choice, pair in times.items()}
    found["best"] = {kernel: list(choice) for kernel, choice in dropout_attention.TILES.items()}
    for mask, dropout in (("bias", False), ("causal", False), ("documents", False), ("bias", True), ("causal", True),
                          ("documents", True)):
        found[f"{mask}{' dropout' if dropout else ''}"] = timed(mask, dropout)
    return found


def _milliseconds(call: Callable, *arguments: Any) -> float:
    times = []
    for number in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(*arguments)
        end.record()
        torch.cuda.synchronize()
        if number > 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)
