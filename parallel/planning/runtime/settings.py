"""The block `runtime` of a cluster file: how long the kernels of a runtime that runs node by node take."""

from __future__ import annotations

import math
from collections import Counter

from pydantic import Field

from parallel.common.settings import Settings
from parallel.planning.runtime.kernels import Kernel

_ALIGNED = 8  # elements of 16 bytes in half precision



class ProductSettings(Settings):
    """Matrix products in half precision."""

    tflops: float = Field(700.0, gt=0)
    """10^12 FLOP/s of large ones."""
    units: int = Field(132, ge=1)
    """Multiprocessors: as many tiles are computed at once."""
    tile: tuple[int, int] = (128, 256)
    """Rows and columns of the result that one computes."""
    ramp: float = Field(0.0, ge=0)
    """Length of a sum at which half the speed is reached."""
    cache_mb: float = Field(40.0, gt=0)
    """MB of a first operand that is still in the second-level cache."""
    cold: float = Field(1.0, ge=1)
    """By how much a product takes longer whose first operand is not: more from memory, and a clock that power holds
    down."""
    ragged_tflops: float = Field(60.0, gt=0)
    """The same where a side is no multiple of eight elements."""
    float32_tflops: float = Field(50.0, gt=0)
    """The same of float32."""
    bandwidth_gb: float = Field(4000.0, gt=0)
    """GB/s at which operands and results are read and written where that takes longer."""


class PassSettings(Settings):
    """A kind of pass over memory."""

    bandwidth_gb: float = Field(4000.0, gt=0)
    """GB/s of large ones, read and written."""
    us: float = Field(2.0, ge=0)
    """Microseconds of one that moves nothing, with the gap before it."""
    row_ns: float = Field(0.0, ge=0)
    """Nanoseconds of a row, where it is looked up or added to."""


class AttentionSettings(Settings):
    """A fused causal attention; FLOPs are counted over all pairs of positions."""

    forward_us: float = Field(10.0, ge=0)
    backward_us: float = Field(20.0, ge=0)
    """Microseconds of one with nothing to attend to."""

    forward_tflops: float = Field(400.0, gt=0)
    backward_tflops: float = Field(400.0, gt=0)
    half_width: float = Field(0.0, ge=0)
    """Width of a head at which half the speed is reached."""


class UpdateSettings(Settings):
    """What the update of a parameter element moves."""

    bytes: float = Field(24.0, gt=0)
    """Read and written, but for the gradient where it is widened in passing."""
    kernels: float = Field(1.0, gt=0)
    """Kernels of a parameter."""
    held: float = Field(0.0, ge=0)
    """Bytes that all elements hold at once beside their gradients."""
    wide: bool = False
    """Whether it reads gradients in float32 only; else it widens them in passing."""


class RuntimeSettings(Settings):
    """A runtime that starts a kernel for every node."""

    attention: list[str] = Field(default_factory=lambda: ["attention.core"])
    """Cells (ends of their paths) that compute attention, each a kernel."""
    loss: list[str] = Field(default_factory=lambda: ["cross_entropy"])
    """Cells that compute cross entropy over many columns: a largest, sums, and one gradient."""
    lists: list[str] = Field(default_factory=lambda: ["poolings"])
    """Cells whose parts attend to a list of rows each (target attention)."""
    kernel_us: float = Field(3.0, ge=0)
    """Microseconds of a product beside its arithmetic, with the gap before it."""
    passes: dict[str, PassSettings] = Field(default_factory=dict)
    """Passes over memory by what they do (`parallel.planning.runtime.kernels`); else those of "pass"."""
    products: ProductSettings = ProductSettings()
    """Of products."""
    fused_attention: AttentionSettings = AttentionSettings()
    """Of attention."""
    workspace_mb: float = Field(0.0, ge=0)
    """MB that the libraries of products hold for themselves."""
    update: dict[str, UpdateSettings] = Field(default_factory=dict)
    """By optimizer."""

    def update_of(self, optimizer: str) -> UpdateSettings:
        """What the update of an optimizer takes; the defaults where nothing is said."""
        return self.update.get(optimizer) or UpdateSettings()

    def seconds_of(self, kernels: Counter) -> float:
        """Of kernels one behind the other."""
        return sum(times * self.kernel_seconds(kernel) for kernel, times in kernels.items())

    def late_seconds(self, kernels: Counter) -> float:
        """Of those that wait until a stage has sent what its neighbour is waiting for: gradients of weights."""
        return self.seconds_of(Counter({kernel: times for kernel, times in kernels.items() if kernel.kind == "weight"}))

    def kernel_seconds(self, kernel: Kernel) -> float:
        """Of one kernel with the gap before it."""
        if kernel.kind in ("product", "weight"):
            return self.kernel_us * 1e-6 + self.product_seconds(*kernel.shape)
        if kernel.kind in ("attention", "attention_grad"):
            return self._attention_seconds(kernel)
        own = self.pass_of(kernel.kind)
        rows = kernel.shape[0] if kernel.shape else 0
        return own.us * 1e-6 + kernel.moved / (own.bandwidth_gb * 1e9) + rows * own.row_ns * 1e-9

    def pass_of(self, kind: str) -> PassSettings:
        """Of a kind of pass."""
        return self.passes.get(kind) or self.passes.get("pass") or PassSettings()

    def moving(self, kind: str, moved: float, kernels: float) -> float:
        """Seconds of some passes of a kind that move so many bytes together."""
        own = self.pass_of(kind)
        return moved / (own.bandwidth_gb * 1e9) + kernels * own.us * 1e-6

    def product_seconds(self, dtype: str, batch: int, rows: int, columns: int, inner: int) -> float:
        """Of one product: its tiles in waves over the multiprocessors, or its bytes."""
        own = self.products
        flops, width = 2.0 * batch * rows * columns * inner, 4 if dtype == "float32" else 2
        moved = width * batch * (rows * inner + inner * columns + rows * columns) / (own.bandwidth_gb * 1e9)
        if dtype == "float32":
            return max(flops / (own.float32_tflops * 1e12), moved)
        if any(size % _ALIGNED for size in (rows, columns, inner)):
            return max(flops / (own.ragged_tflops * 1e12), moved)
        tiles = batch * math.ceil(rows / own.tile[0]) * math.ceil(columns / own.tile[1])
        waves = math.ceil(tiles / own.units)
        computed = 2.0 * waves * own.units * own.tile[0] * own.tile[1] * (inner + own.ramp)
        cold = own.cold if width * batch * rows * inner > own.cache_mb * 1e6 else 1.0
        return max(cold * computed / (own.tflops * 1e12), moved)

    def _attention_seconds(self, kernel: Kernel) -> float:
        own, (heads, length, width) = self.fused_attention, kernel.shape
        back = kernel.kind == "attention_grad"
        flops = (10.0 if back else 4.0) * heads * length * length * width
        share = width / (width + own.half_width)
        begin = own.backward_us if back else own.forward_us
        return begin * 1e-6 + flops / ((own.backward_tflops if back else own.forward_tflops) * 1e12 * share)
