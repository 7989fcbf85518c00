"""Which layers of a ranker get int8 weights (see parallel/layers/int8.py): per-token networks, experts, projections.

Routers, heads and what works on embeddings stay in float32: they are small, and a router's choice is not smooth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindspore import Parameter, Tensor, nn

from parallel.layers import int8
from parallel.layers.int8 import QuantizedGroupedLinear, QuantizedNetwork, fused_swiglu
from parallel.layers.int8_numbers import count_groups
from recsys.passes.weights import LEFT
from recsys.ug_sep.split_swiglu import SplitSwiGLU


class QuantizedSplitSwiGLU(QuantizedNetwork):
    """`recsys.ug_sep.split_swiglu.SplitSwiGLU` with int8 weights; what U gives is added in the kernel."""

    def __init__(self, network: SplitSwiGLU, group: int | None) -> None:
        super().__init__()
        self.gate_user, self.up_user, self.gate_group, self.up_group, self.down = (
            QuantizedGroupedLinear(linear, count_groups(linear.inputs, group)) for linear in (
                network.gate_user, network.up_user, network.gate_group, network.up_group, network.down))
        self.add1, self.add2, self.swish, self.take = network.add1, network.add2, network.swish, network.take
        self.fused = None

    def fuse(self) -> None:
        self.fused = fused_swiglu("added_swiglu", self.gate_group, self.down)

    def user(self, u_TRI: Tensor) -> tuple:
        """U's part of both first products, [T, R, F] each."""
        return self.gate_user(u_TRI), self.up_user(u_TRI)

    def candidate(self, gate_TRF: Tensor, up_TRF: Tensor, g_TNI: Tensor, index_N: Tensor | None) -> Tensor:
        """[T, N, outputs]."""
        gate_TNF, up_TNF = self.take(gate_TRF, index_N), self.take(up_TRF, index_N)
        if self.fused is not None:
            gate, up, down = self.gate_group.product, self.up_group.product, self.down.product
            return self.fused(g_TNI, gate.weight, gate.scale, up.weight, up.scale, down.weight, down.scale, gate_TNF,
                              up_TNF)
        gate_TNF = self.add1(self.gate_group(g_TNI), gate_TNF)
        return self.down(self.swish(gate_TNF, self.add2(self.up_group(g_TNI), up_TNF)))


def _replacement(cell: nn.Cell, group: int | None) -> nn.Cell | None:
    return QuantizedSplitSwiGLU(cell, group) if isinstance(cell, SplitSwiGLU) else int8.replacement(cell, group)


def swap(model: nn.Cell, group: int | None = None) -> dict[str, Parameter]:
    """`int8.swap` for a ranker."""
    return int8.swap(model, group, _replacement, LEFT)


def quantize_model(model: nn.Cell, group: int | None = None) -> dict[str, float]:
    """Quantizes a network with values in place; it then computes with int8. Returns each weight's relative error.

    Args:
        model: a ranker.
        group: inputs of one scale (128); None = one scale for an output channel.

    Raises:
        UserError: nothing to quantize, or a weight that is not finite.
    """
    return int8.quantize_model(model, swap(model, group))


def load(path: str | Path, model: nn.Cell) -> dict[str, Any]:
    """`int8.load` for a ranker."""
    return int8.load(path, model, swap)
