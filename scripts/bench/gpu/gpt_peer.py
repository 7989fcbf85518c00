"""The peer that PanGu-alpha's training is held against on a GPU: a GPT of the same sizes written by hand in torch.

Fused qkv, scaled-dot-product attention, float32 masters under bfloat16 autocast, gradient clipping, fused AdamW,
`torch.compile`. Nothing here knows MindSpore or this project. `Peer.step` takes ids and runs forward, backward and
update, so that a caller can take turns with another program on the same device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Sizes:
    """Of the model and its batch: L layers, D width, H heads, V vocabulary, S sequence, B records."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    vocabulary: int = 40000
    sequence: int = 1024
    batch: int = 16
    dropout: float = 0.0

    @property
    def flops(self) -> float:
        """Of a step, forward and backward: three times the products; causal attention is not halved."""
        layer = 2 * 12 * self.width**2 + 4 * self.sequence * self.width
        return 3.0 * self.batch * self.sequence * (self.layers * layer + 2 * self.width * self.vocabulary)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads, self.dropout = sizes.heads, sizes.dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mapping, self.projection = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BSD: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, width = x_BSD.shape
        parts = self.qkv(self.norm1(x_BSD)).view(batch, length, 3, self.heads, width // self.heads)
        query_BHSK, key_BHSK, value_BHSK = parts.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.dropout if self.training else 0.0
        mixed_BHSK = F.scaled_dot_product_attention(query_BHSK, key_BHSK, value_BHSK, attn_mask=mask,
                                                    is_causal=mask is None, dropout_p=rate)
        mixed_BSD = mixed_BHSK.transpose(1, 2).reshape(batch, length, width)
        x_BSD = x_BSD + F.dropout(self.output(mixed_BSD), rate, self.training)
        inner = F.gelu(self.mapping(self.norm2(x_BSD)), approximate="tanh")
        return x_BSD + F.dropout(self.projection(inner), rate, self.training)


class GPT(nn.Module):
    """Mean loss of the next token; the head is tied to the word embedding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.word, self.position = (nn.Embedding(rows, sizes.width) for rows in (sizes.vocabulary, sizes.sequence))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, records_BR: Tensor, bias_B1SS: Tensor | None) -> Tensor:
        ids_BS, labels_BS = records_BR[:, :-1], records_BR[:, 1:]
        x_BSD = self.word(ids_BS) + self.position.weight[:ids_BS.shape[1]]
        x_BSD = F.dropout(x_BSD, self.sizes.dropout, self.training)
        for block in self.blocks:
            x_BSD = block(x_BSD, bias_B1SS)
        logits = F.linear(self.norm(x_BSD), self.word.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), labels_BS.flatten())


class Peer:
    """A training step.

    Args:
        sizes: of the model and its batch.
        mask: "causal" (flash attention) or "dense" (a bias [B, 1, S, S] that separates documents).
        compiled: whether `torch.compile` makes it.
        device: where.
    """

    def __init__(self, sizes: Sizes, mask: str = "causal", *, compiled: bool = True, device: str = "cuda") -> None:
        torch.manual_seed(1)
        self.sizes, self.mask, self.device = sizes, mask, torch.device(device)
        self.model = GPT(sizes).to(self.device).train()
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest}], lr=1e-4,
                                           betas=(0.9, 0.95), weight_decay=0.0, fused=self.device.type == "cuda")
        self.network = torch.compile(self.model) if compiled else self.model

    def step(self, records_BR: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        """One step on ids [B, S + 1]; returns the loss on the device."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.network(records_BR, self.bias(documents_BS))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def bias(self, documents_BS: Tensor | None) -> Tensor | None:
        """What is added to the scores, bfloat16 [B, 1, S, S]; None = causal alone."""
        if self.mask == "causal":
            return None
        length = documents_BS.shape[1]
        same = documents_BS[:, None, :, None] == documents_BS[:, None, None, :]
        visible = same & torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        return torch.zeros(visible.shape, dtype=torch.bfloat16, device=self.device).masked_fill(~visible, -10000.0)


def parameters(sizes: Sizes) -> int:
    """How many the model has."""
    with torch.device("meta"):
        return sum(math.prod(p.shape) for p in GPT(sizes).parameters())
