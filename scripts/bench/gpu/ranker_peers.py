"""RankMixer and TokenMixer-Large hand-written in torch: batched matmuls over tokens, `torch.compile`, the same weights.

Shapes: B batch, T tokens, D width, L list length, W embedding width, K tasks. Sources: arXiv 2507.15551, 2602.06563,
1706.06978.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

Weights = dict[str, Tensor]


def attention(query: Tensor, rows: Tensor, present: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Target attention as its paper writes it: pooled float32 [B, W]."""
    query_BLW = query[:, None].expand_as(rows)
    pairs = torch.cat([query_BLW, rows, query_BLW - rows, query_BLW * rows], -1).to(w1.dtype)
    weight = nnf.linear(nnf.silu(nnf.linear(pairs, w1, b1)), w2, b2).float()
    return (rows * (weight * present)).sum(1)


def heads(weights: Weights, hidden: Tensor, prefix: str, tasks: int) -> Tensor:
    """Logits [B, K] in float32."""
    hidden, logits = hidden.float(), []
    for task in range(tasks):
        x, layer = hidden, 0
        while (name := f"{prefix}.towers.{task}.linears.{layer}.weight") in weights:
            x = nnf.linear(nnf.relu(x) if layer else x, weights[name], weights[name[:-6] + "bias"])
            layer += 1
        logits.append(x)
    return torch.cat(logits, 1)


def mixed(x: Tensor, heads: int) -> Tensor:
    """[H, B, T D / H] from [T, B, D]."""
    tokens, batch, width = x.shape
    return x.reshape(tokens, batch, heads, width // heads).permute(2, 1, 0, 3).reshape(heads, batch, -1)


def rankmixer_dense(weights: Weights, slices: Tensor, layers: int, tasks: int) -> Tensor:
    """Probabilities [B, K] from the concatenated groups [B, E]."""
    projection = weights["tokenize.projection.weight"]
    tokens, width = projection.shape[:2]
    slices = nnf.pad(slices, (0, tokens * width - slices.shape[1]))
    x = slices.reshape(-1, tokens, width).transpose(0, 1).to(projection.dtype)
    x = torch.bmm(x, projection) + weights["tokenize.projection.bias"]

    def norm(y: Tensor, name: str) -> Tensor:
        gamma, beta = weights[f"{name}.gamma"], weights[f"{name}.beta"]
        return nnf.layer_norm(y.float(), gamma.shape, gamma, beta, 1e-5).to(y.dtype)

    for layer in range(layers):
        own = f"layers.{layer}"
        s = norm(mixed(x, tokens) + x, f"{own}.norm1")
        h = torch.bmm(s, weights[f"{own}.network.mapping.weight"]) + weights[f"{own}.network.mapping.bias"]
        y = torch.bmm(nnf.gelu(h, approximate="tanh"), weights[f"{own}.network.projection.weight"])
        x = norm(y + weights[f"{own}.network.projection.bias"] + s, f"{own}.norm2")
    return torch.sigmoid(heads(weights, x.mean(0), "head", tasks))


class Lookups:
    """Groups' vectors of a ranker of the presets' features.

    Args:
        features: of the settings, one entry for a repeated feature.
        missing: of every list the row that stands for padding.
        attend: `attention`, or a compiled form of it.
    """

    def __init__(self, features: list[dict[str, Any]], missing: list[int], attend: Callable) -> None:
        self.features, self.missing, self.attend = features, missing, attend

    def __call__(self, weights: Weights, ids: Tensor) -> list[Tensor]:
        narrow, wide = weights["embedding.tables.0.table"], weights["embedding.tables.1.table"]
        place, lists, singles, query = 0, 0, {}, None
        ids = ids.long()
        for feature in self.features:
            count = feature.get("repeat") or 1
            group = feature.get("group") or feature["side"]
            if feature.get("type") == "sequence":
                for _ in range(count):
                    own = ids[:, place:place + feature["length"]]
                    present = (own != self.missing[lists]).float()[..., None]
                    name = f"embedding.poolings.{lists}"
                    parts = [weights[f"{name}.{part}"] for part in ("first.weight", "first.bias", "second.weight",
                                                                    "second.bias")]
                    singles.setdefault(group, []).append(self.attend(query, nnf.embedding(own, wide), present, *parts))
                    place, lists = place + feature["length"], lists + 1
                continue
            table = wide if feature.get("width") else narrow
            rows = nnf.embedding(ids[:, place:place + count], table).flatten(1)
            query = rows if feature.get("width") else query
            singles.setdefault(group, []).append(rows)
            place += count
        return [torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in singles.values()]


def tokenmixer_loss(weights: Weights, groups: list[Tensor], labels: Tensor, model: dict[str, Any]) -> Tensor:
    """Mean binary cross entropy of TokenMixer-Large (pre-norm figure) with its auxiliary heads, from the groups'
    vectors; weights of the blocks in the type of the products."""
    width, layers, tasks = model["width"], model["layers"], labels.shape[1]
    dtype = weights["layers.0.first.gate.weight"].dtype

    def linear(x: Tensor, name: str) -> Tensor:
        return nnf.linear(x.to(dtype), weights[f"{name}.weight"], weights[f"{name}.bias"])

    tokens = [linear(torch.cat(groups, 1), "tokenize.global_network.linears.0")]
    for number, group in enumerate(groups):
        tokens += linear(group, f"tokenize.networks.{number}.linears.0").split(width, 1)
    x = torch.stack(tokens)
    count = x.shape[0]

    def norm(y: Tensor, name: str) -> Tensor:
        y = y.float()
        return (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6) * weights[name]).to(dtype)

    def swiglu(y: Tensor, name: str) -> Tensor:
        gate, up = torch.bmm(y, weights[f"{name}.gate.weight"]), torch.bmm(y, weights[f"{name}.up.weight"])
        return torch.bmm(nnf.silu(gate) * up, weights[f"{name}.down.weight"])

    inputs, logits, gap, auxiliary = [], [], model["inter_residual"], 0
    for layer in range(layers):
        inputs.append(x)
        own = f"layers.{layer}"
        x = x + mixed(swiglu(mixed(norm(x, f"{own}.norm1.gamma"), count), f"{own}.first"), count)
        x = x + swiglu(norm(x, f"{own}.norm2.gamma"), f"{own}.second")
        if layer in range(gap, layers - 1, gap):
            x = x + inputs[layer - gap + 1]
        if layer in range(gap - 1, layers - 1, gap):
            logits.append(heads(weights, x.mean(0), f"auxiliary.{auxiliary}", tasks))
            auxiliary += 1
    final = heads(weights, norm(x, "norm.gamma").mean(0), "head", tasks)
    loss = nnf.binary_cross_entropy_with_logits(final, labels, reduction="none").sum(1).mean()
    for other in logits:
        own = nnf.binary_cross_entropy_with_logits(other, labels, reduction="none").sum(1).mean()
        loss = loss + model["auxiliary_weight"] * own
    return loss
