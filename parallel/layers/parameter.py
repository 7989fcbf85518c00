"""Parameters whose first value depends on their name and the seed alone, not on when or where they are built."""

from __future__ import annotations

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore import dtype as mstype
from mindspore.common.initializer import Initializer, initializer

from parallel.common.start_value import draw, start_value


class Start(Initializer):
    """Start value of a parameter: kind `normal`, `truncated_normal` (at two sigma), `uniform`, `zeros`,
    `ones` or `fill` (all `scale`).

    Args:
        kind: the distribution.
        scale: sigma of the normal kinds, half-width of the uniform one.
    """

    def __init__(self, kind: str, scale: float = 1.0) -> None:
        super().__init__(kind=kind, scale=scale)
        self.kind, self.scale = kind, scale

    def _initialize(self, arr: np.ndarray) -> None:
        # MindSpore's own path, taken only for sliced parameters on a cluster: the slice's seed is MindSpore's.
        draw(arr, self.kind, self.scale, np.random.default_rng(self.seed))


def parameter(shape: tuple[int, ...], kind: str, scale: float = 1.0, *, dtype: mstype = mstype.float32,
              shard_optimizer: bool = True) -> Parameter:
    """A parameter of `shape` that `initialize` will fill.

    Args:
        shape: its full shape, before any sharding.
        kind: see `Start`.
        scale: see `Start`.
        dtype: element type.
        shard_optimizer: false keeps it (and its states) unsharded under optimizer parallelism: layer norms and biases
            added after an AllReduce, whose traffic would cost more than they save (PanGu-alpha code).
    """
    made = Parameter(initializer(Start(kind, scale), shape, dtype), parallel_optimizer=shard_optimizer)
    made.start = (kind, scale)
    made.sliced = not shape  # MindSpore fails when it gives a single number the shape of its slice
    return made


def initialize(network: nn.Cell, seed: int) -> None:
    """Gives every parameter of `network` its start value for `seed`, by its name."""
    for name, item in network.parameters_and_names():
        if hasattr(item, "start"):
            item.set_data(Tensor(start_value(name, item.shape, item.start, seed), item.dtype))


def needs_one_type() -> bool:
    """Whether operands must be cast to one type here: MindSpore's CUDA backend has no product of a float16 tensor and a
    Python number, and no concatenation of float16 and float32, which other devices take."""
    return mindspore.get_context("device_target") == "GPU"
