"""A step captured as a CUDA graph: one launch for all its kernels.

The first steps run as they are (they warm libraries up and are steps like any other); then one is captured, which
computes nothing, and from there on replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.torch_runtime.execute import Bound

_WARM_UP = 2


class Captured:
    """`Bound` behind a CUDA graph, with the same `run`.

    Args:
        bound: what is captured; its inputs keep their shapes.
        device: a GPU.
    """

    def __init__(self, bound: Bound, device: torch.device) -> None:
        self.bound, self.device, self.graph = bound, device, bound.graph
        self.steps = 0
        self.recorded: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.result: Any = None

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """One step; inputs that are not on the device are copied there."""
        if self.recorded is None:
            inputs = [item.to(self.device) for item in inputs]
            if self.steps < _WARM_UP:
                self.steps += 1
                return self._beside(inputs)
            self._capture(inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.recorded.replay()
        return self.result

    def _beside(self, inputs: Sequence[Tensor]) -> Any:
        """A step on a side stream, as capturing asks of what comes before it."""
        stream, main = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            result = self.bound.run(inputs)
        main.wait_stream(stream)
        torch.cuda.synchronize(self.device)
        return result

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        self.inputs = [item.clone() for item in inputs]
        self.recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.recorded, capture_error_mode="thread_local"):
            self.result = self.bound.run(self.inputs)
