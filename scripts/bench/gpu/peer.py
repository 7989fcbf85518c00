"""The peer of the GPU benchmarks: a GPT of a program's sizes, written by hand in plain torch and compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf


class PeerLayer(nn.Module):
    """A pre-norm decoder layer with one matmul for q, k and v."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nnf.scaled_dot_product_attention(q, k, v, mask, self.dropout, is_causal=mask is None)
        x = x + nnf.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)), self.dropout)
        return x + nnf.dropout(self.down(nnf.gelu(self.up(self.norm2(x)), approximate="tanh")), self.dropout)


class Peer(nn.Module):
    """A GPT with a tied head, of a program's sizes."""

    def __init__(self, model: dict, dropout: float) -> None:
        super().__init__()
        width, self.dropout = model["hidden_size"], dropout
        self.words = nn.Embedding(model["vocabulary_size"], width)
        self.places = nn.Embedding(model["sequence_length"], width)
        self.layers = nn.ModuleList(PeerLayer(width, model["heads"], dropout) for _ in range(model["layers"]))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, records: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        x = nnf.dropout(self.words(records[:, :-1]) + self.places(places), self.dropout)
        for layer in self.layers:
            x = layer(x, mask)
        logits = nnf.linear(self.norm(x), self.words.weight)
        return nnf.cross_entropy(logits.flatten(0, 1).float(), records[:, 1:].flatten())


class PeerStep:
    """Compiled forward and backward in bf16 autocast over float32 weights, clipped, fused AdamW."""

    def __init__(self, program: Any, device: torch.device, causal: bool, compiled: bool = True) -> None:
        settings = program.settings
        torch.manual_seed(0)
        self.net = Peer(settings["model"], float(settings["model"]["dropout"])).to(device)
        self.loss = torch.compile(self.net) if compiled else self.net
        options = settings["train"]["optimizer"]
        self.optimizer = torch.optim.AdamW(self.net.parameters(), options["learning_rate"], tuple(options["betas"]),
                                           options["epsilon"], options["weight_decay"], fused=True)
        self.device, self.causal = device, causal

    def __call__(self, batch: list[np.ndarray]) -> Tensor:
        records, places, documents = (torch.from_numpy(item).to(self.device).long() for item in batch[:3])
        mask = None
        if not self.causal:
            visible = (documents[:, :, None] == documents[:, None, :]).tril()
            mask = torch.where(visible, 0.0, -10000.0).to(torch.bfloat16)[:, None]
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss(records, places, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
