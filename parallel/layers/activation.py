"""Activation functions by name, each with its layout. Shapes: N tokens, F feed-forward width."""

from __future__ import annotations

import math
from typing import Literal

import mindspore
from mindspore import Tensor, ops

from parallel.layers.parameter import needs_one_type
from parallel.sharding.layout import Layer, Operand, OpSharding

Gelu = Literal["tanh", "fast", "erf"]


class GELU(Layer):
    """Gaussian error linear unit.

    Args:
        kind: "tanh", the approximation of the released PanGu-alpha weights; "fast", x sigmoid(1.702 x), of later code;
            "erf", the exact function of the Hugging Face port.
        wide: named axes that shard the input's dims.

    On the CPU the tanh form is written as x sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x^3), which is the same function
    (1 + tanh z = 2 sigmoid 2z) in fewer and faster kernels than `ops.GeLU` has there; elsewhere `ops.GeLU` is used.
    """

    def __init__(self, kind: Gelu = "tanh", wide: Operand = ("tokens", "width")) -> None:
        super().__init__()
        self.kind, self.wide = kind, wide
        self.written_out = kind == "fast" or (kind == "tanh" and mindspore.get_context("device_target") == "CPU")
        self.fused = ops.GeLU()
        self.square, self.scale, self.shift = ops.Mul(), ops.Mul(), ops.Add()
        self.argument, self.gate, self.sigmoid = ops.Mul(), ops.Mul(), ops.Sigmoid()
        self.divide, self.erf, self.one_more, self.half = ops.Mul(), ops.Erf(), ops.Add(), ops.Mul()
        self.linear = 2.0 * math.sqrt(2.0 / math.pi)
        self.cubic = self.linear * 0.044715
        self.casts = needs_one_type()

    def construct(self, x_NF: Tensor) -> Tensor:
        if self.kind == "erf":
            cdf_NF = self.one_more(self.erf(self.divide(x_NF, self.like(x_NF, math.sqrt(0.5)))), 1.0)
            return self.half(self.gate(x_NF, cdf_NF), self.like(x_NF, 0.5))
        if not self.written_out:
            return self.fused(x_NF)
        if self.kind == "fast":
            return self.gate(x_NF, self.sigmoid(self.scale(x_NF, self.like(x_NF, 1.702))))
        slope_NF = self.shift(self.scale(self.square(x_NF, x_NF), self.cubic), self.linear)
        return self.gate(x_NF, self.sigmoid(self.argument(x_NF, slope_NF)))

    def like(self, x_NF: Tensor, factor: float) -> Tensor | float:
        """The factor as this device multiplies it."""
        return ops.cast(factor, x_NF.dtype) if self.casts else factor

    def sharding(self) -> list[OpSharding]:
        wide = self.wide
        both = [self.square, self.argument, self.gate]
        one = [self.scale, self.shift, self.divide, self.one_more, self.half]
        single = [self.fused, self.sigmoid, self.erf]
        return ([OpSharding(primitive, (wide, wide)) for primitive in both]
                + [OpSharding(primitive, (wide, ())) for primitive in one]
                + [OpSharding(primitive, (wide,)) for primitive in single])
