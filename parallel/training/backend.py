"""What the trainer needs of a backend: one process among those that train a network together.

A backend owns the network, its optimizer and the device. The loop, the data, the logs, validation and checkpoints are
the same code for all of them and see NumPy arrays and Python numbers only, so nothing here imports a framework.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from parallel.checkpoint.tensors import NamedTensor
from parallel.checkpoint.writing import Holder
from parallel.common.errors import UserError
from parallel.training.data_source import DataSource

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


class Backend(ABC):
    """One process of a run.

    Attributes:
        name: "mindspore" or "torch".
        rank, ranks: this process among all of them, numbered as MindSpore does: stage slowest, then data, then op.
        share: (number, of how many): which consecutive part of the rows of every global batch this process is fed.
            Processes that differ in stage or op only have the same.
        numbered: whether a training batch ends in the numbers of its samples (a network with dropout); they are not
            given to `loss` and `scores`.
        holder: which slices this process holds; None where every process holds everything.
        inputs: (name, shape, element type) of a training batch that the step was compiled for, this process's rows;
            None = the first batch decides.
        reads: False where no graph of this process looks at a batch (a stage between others): it is fed zeros, made
            after `inputs`, and its share of the data is never read.
    """

    name: str
    rank: int
    ranks: int
    share: tuple[int, int]
    numbered: bool
    holder: Holder | None
    inputs: Sequence[tuple[str, tuple[int, ...], str]] | None = None
    reads: bool = True

    @abstractmethod
    def step(self, batch: Batch) -> Outputs:
        """Forward, backward, update. All ranks call it for the same global batch.

        Raises:
            UserError: out of device memory; names the key to change.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[float, float]:
        """(loss x weight, weight) of this batch, dropout off, nothing updated. All ranks call it. One rank gives a
        row, of its own rows or of all; the others give (0, 0), so that `exchange` adds up the batch."""

    @abstractmethod
    def scores(self, batch: Batch) -> np.ndarray | None:
        """Predictions of a ranker, float32 [rows, tasks] probabilities, dropout off; `batch` is without labels. All
        ranks call it. Each row is given by one rank; the others give None, as in `loss`."""

    @abstractmethod
    def parameters(self) -> Sequence[NamedTensor]:
        """Of the network, those that this process holds, without counters."""

    @abstractmethod
    def states(self) -> Sequence[NamedTensor]:
        """Moments of the optimizer that this process holds."""

    @abstractmethod
    def counters(self) -> Sequence[NamedTensor]:
        """Scalars of the step that a checkpoint keeps: step, iteration, loss_scale, loss_scale_clean_steps."""

    @abstractmethod
    def exchange(self, values: list[float]) -> list[float]:
        """Adds lists of equal length over all ranks; float32 values that only one rank gives come back exactly."""

    @abstractmethod
    def barrier(self) -> None:
        """Returns when all ranks have called it."""

    @abstractmethod
    def peak_tflops(self, precision: str) -> float | None:
        """Speed of a large matrix product in the type of `train.precision` on one device, measured; None = unknown."""

    def data_sheet_tflops(self, precision: str) -> float | None:
        """What the maker of the device states for dense products in the type of `train.precision`; None = unknown."""
        return None

    @abstractmethod
    def profiler(self, folder: Path) -> Callable[[], None]:
        """Begins to profile this process into `folder`; the function ends it."""

    @abstractmethod
    def close(self) -> None:
        """Leaves the other processes. Called once, also after a failure."""

    def stretches(self, source: DataSource, first: int, steps: int, size: int) -> Iterator[tuple[int, Outputs]]:
        """Runs stretches of steps by itself: (size, outputs of the last step) for every stretch of `size` of the
        `steps` steps from number `first` on.

        Raises:
            UserError: it cannot; only MindSpore's data sink on Ascend can.
        """
        raise UserError("data sink needs MindSpore on an Ascend device", where="train.data_sink",
                        hint="set it to false")


class SlicedBackend(Backend):
    """A backend that can tell what its parameters started from (all but MindSpore's of an unsharded network)."""

    @abstractmethod
    def swap(self, parts: np.ndarray) -> np.ndarray:
        """AlltoAll over all ranks: row r of `parts`, uint8 [ranks, n], goes to rank r, and row r of the result comes
        from rank r. All ranks call it with the same n."""

    @abstractmethod
    def full_start(self, name: str) -> np.ndarray:
        """Start value of a parameter of the network before it is sharded."""
