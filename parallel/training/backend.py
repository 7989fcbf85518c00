"""What the trainer needs of a backend: one process among those that train a network together.

A backend owns the network, its optimizer and the device. The loop, the data, the logs, validation and checkpoints are
the same code for all of them and see NumPy arrays and Python numbers only, so nothing here imports a framework.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np

from parallel.checkpoint.tensors import NamedTensor
from parallel.checkpoint.writing import Holder

Batch = tuple[np.ndarray, ...]
"""One array per input of the network (`parallel.task.Input`), this process's rows of the global batch first dim."""


class Outputs(TypedDict):
    """Results of a step; the same on every rank."""

    loss: float
    """Mean over the global batch."""
    global_norm: float
    """Of the unscaled gradients of the mean loss, before clipping."""
    finite: bool
    """Whether all gradients of all ranks are; a step that is not changes no parameter, moment or `step`."""
    loss_scale: float
    """With which the step was made."""
    learning_rate: float
    """With which the step was made."""


@runtime_checkable
class Backend(Protocol):
    """One process of a run.

    Attributes:
        name: "mindspore" or "torch".
        rank, ranks: this process among all of them, numbered as MindSpore does: stage slowest, then data, then op.
        share: (number, of how many): which consecutive part of the rows of every global batch this process is fed.
            Processes that differ in stage or op only have the same.
        numbered: whether a training batch ends in the numbers of its samples (a network with dropout); they are not
            given to `loss` and `scores`.
        holder: which slices this process holds; None where every process holds everything.
        inputs: (name, shape, element type) of a training batch that the step was compiled for, this process's rows. May
            be absent: then the first batch decides.
        reads: False where no graph of this process looks at a batch (a stage between others): it is fed zeros, and its
            share of the data is never read. May be absent: it reads.
    """

    name: str
    rank: int
    ranks: int
    share: tuple[int, int]
    numbered: bool
    holder: Holder | None

    def step(self, batch: Batch) -> Outputs:
        """Forward, backward, update. All ranks call it for the same global batch.

        Raises:
            UserError: out of device memory; names the key to change.
        """
        ...

    def loss(self, batch: Batch) -> tuple[float, float]:
        """(loss x weight, weight) of this batch, dropout off, nothing updated. All ranks call it. One rank gives a
        row, of its own rows or of all; the others give (0, 0), so that `exchange` adds up the batch."""
        ...

    def scores(self, batch: Batch) -> np.ndarray | None:
        """Predictions of a ranker, float32 [rows, tasks] probabilities, dropout off; `batch` is without labels. All
        ranks call it. Each row is given by one rank; the others give None, as in `loss`."""
        ...

    def parameters(self) -> Sequence[NamedTensor]:
        """Of the network, those that this process holds, without counters."""
        ...

    def states(self) -> Sequence[NamedTensor]:
        """Moments of the optimizer that this process holds."""
        ...

    def counters(self) -> Sequence[NamedTensor]:
        """Scalars of the step that a checkpoint keeps: step, iteration, loss_scale, loss_scale_clean_steps."""
        ...

    def exchange(self, values: list[float]) -> list[float]:
        """Adds lists of equal length over all ranks; float32 values that only one rank gives come back exactly."""
        ...

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        ...

    def peak_tflops(self, precision: str) -> float | None:
        """Speed of a large matrix product in the type of `train.precision` on one device, measured; None = unknown."""
        ...

    def close(self) -> None:
        """Leaves the other processes. Called once, also after a failure."""
        ...


class SlicedBackend(Backend, Protocol):
    """A backend that can tell what its parameters started from (all but MindSpore's of a whole network)."""

    def whole_start(self, name: str) -> np.ndarray:
        """Start value of a parameter of the network before it is sharded."""
        ...


@runtime_checkable
class SinkingBackend(Protocol):
    """A backend that can run stretches of steps by itself (MindSpore's data sink on Ascend)."""

    def stretches(self, source: Any, first: int, steps: int, size: int) -> Iterator[tuple[int, Outputs]]:
        """(size, outputs of the last step) for every stretch of `size` of the `steps` steps from number `first` on."""
        ...
