"""MindSpore as a `parallel.training.backend.Backend`: an unsharded network on one device or under plain data
parallelism, or the slices of a sharded one."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from parallel.checkpoint.tensors import NamedTensor, ParameterTensor
from parallel.common.errors import UserError
from parallel.layers.parameter import start_value
from parallel.training.backend import Backend, Batch, Outputs, SlicedBackend
from parallel.training.data_source import DataSource
from parallel.training.device import DeviceSum, DeviceSwap
from parallel.training.one_stream import on_gpu
from parallel.training.operation.stall import waiting
from parallel.training.settings import COMPUTE_DTYPES
from parallel.training.sharded.run import ShardedRun
from parallel.training.step import TrainStep


class MeanLoss(nn.Cell):
    """(loss x weight, weight) of a batch, for validation; see `parallel.training.step` for what a network returns."""

    def __init__(self, network: nn.Cell, weighted: bool) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.weighted = network, weighted

    def construct(self, *batch: Tensor) -> tuple:
        """Two float32 scalars."""
        if self.weighted:
            loss, weight = self.network(*batch)
        else:
            loss, weight = self.network(*batch), Tensor(1.0, ms.float32)
        weight = ops.cast(weight, ms.float32)
        return ops.cast(loss, ms.float32) * weight, weight


class MindSporeBackend(Backend):
    """A `TrainStep` of an unsharded network.

    Args:
        step: the training step.
        scorer: for a ranker, the cell from a batch without labels to probabilities [rows, tasks].
        all_reduce: adds lists of floats over all processes; None = AllReduce on the device, if there are several.
    """

    name, holder = "mindspore", None

    def __init__(self, step: TrainStep, *, scorer: nn.Cell | None = None,
                 all_reduce: Callable[[list[float]], list[float]] | None = None) -> None:
        self.train_step, self.scorer = step, scorer
        self.rank, self.ranks, self.share, self.numbered = step.rank, step.ranks, step.share, step.numbered
        self.add = all_reduce or (DeviceSum(step.group) if step.ranks > 1 else None)
        self.mean_loss = MeanLoss(step.network, step.weighted)
        self.training = self.stepped = False

    def profiler(self, folder: Path) -> Callable[[], None]:
        """See `Backend`."""
        from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler

        if on_gpu():
            raise UserError("the profiler of MindSpore's CUDA backend is not supported", where="train.profile",
                            hint="leave it out, or take parallel.backend=torch")
        on_ascend = ms.get_context("device_target") == "Ascend"
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.NPU] if on_ascend else [])
        running = profile(activities=kinds, on_trace_ready=tensorboard_trace_handler(
            str(folder), worker_name=f"rank_{self.rank}"), start_profile=False)
        running.start()
        return running.stop

    @property
    def cell(self) -> Any:
        """What is called for a step."""
        return self.train_step

    def step(self, batch: Batch) -> Outputs:
        """See `Backend`."""
        self._mode(True)
        # The first call compiles, which takes as long as it takes.
        with waiting("a training step of MindSpore") if self.stepped and self.ranks > 1 else contextlib.nullcontext():
            outputs = _outputs(self.cell(*map(Tensor, batch)))
        self.stepped = True
        return outputs

    def stretches(self, source: DataSource, first: int, steps: int, size: int) -> Iterator[tuple[int, Outputs]]:
        """See `Backend` (Ascend only, never run by us).

        Raises:
            UserError: the device is another.
        """
        if ms.get_context("device_target") != "Ascend":
            raise UserError("data sink needs an Ascend device", where="train.data_sink", hint="set it to false")
        self._mode(True)
        sink = ms.data_sink(self.cell, source.mindspore_dataset(first, steps), sink_size=size)
        for _ in range(steps // size):
            yield size, _outputs(sink())

    def loss(self, batch: Batch) -> tuple[float, float]:
        """See `Backend`."""
        self._mode(False)
        total, weight = self.mean_loss(*map(Tensor, batch))
        return float(total.asnumpy()), float(weight.asnumpy())

    def scores(self, batch: Batch) -> np.ndarray | None:
        """See `Backend`."""
        self._mode(False)
        return self.scorer(*map(Tensor, batch)).asnumpy()

    def _mode(self, training: bool) -> None:
        if training == self.training:
            return
        self.training = training
        for cell in (self.cell, self.mean_loss, self.scorer):
            if cell is not None:
                cell.set_train(training)

    def parameters(self) -> Sequence[NamedTensor]:
        """See `Backend`."""
        counters = {counter.name for counter in self.train_step.counters()}
        return self._tensors(p for p in self.train_step.network.get_parameters() if p.name not in counters)

    def states(self) -> Sequence[NamedTensor]:
        """See `Backend`."""
        return self._tensors(self.train_step.optimizer.states())

    def counters(self) -> Sequence[NamedTensor]:
        """See `Backend`."""
        return self._tensors(self.train_step.counters())

    def _tensors(self, parameters: Any) -> list[NamedTensor]:
        return [ParameterTensor(parameter) for parameter in parameters]

    def exchange(self, values: list[float]) -> list[float]:
        """See `Backend`."""
        return self.add(values) if self.add is not None else values

    def barrier(self) -> None:
        """See `Backend`."""
        self.exchange([0.0])

    def peak_tflops(self, precision: str) -> float | None:
        """See `Backend`; measured on the CPU and on NVIDIA GPUs."""
        if on_gpu():
            return chained_matmul_tflops(getattr(ms, COMPUTE_DTYPES[precision]))
        return measured_matmul_tflops() if ms.get_context("device_target") == "CPU" else None

    def close(self) -> None:
        """Nothing to leave: MindSpore's processes part by themselves."""


class ShardedBackend(MindSporeBackend, SlicedBackend):
    """A network of which every process holds slices (Ascend, or NVIDIA GPUs as an experiment).

    Args:
        run: the compiled run.
    """

    def __init__(self, run: ShardedRun) -> None:
        super().__init__(run.step, scorer=run.scores, all_reduce=run.all_reduce)
        self.run, self.holder, self.mean_loss, self.reads = run, run.holder, run.loss, run.reads
        self.inputs = [(item.name, tensor.shape, item.dtype)
                       for item, tensor in zip(run.task.inputs, run.inputs, strict=True)]

    @property
    def cell(self) -> Any:
        """See `MindSporeBackend`."""
        return self.run.cell

    def step(self, batch: Batch) -> Outputs:
        """See `Backend`."""
        self.run.copies_are_old = True
        return super().step(batch)

    def stretches(self, source: DataSource, first: int, steps: int, size: int) -> Iterator[tuple[int, Outputs]]:
        """See `Backend`."""
        for stretch in super().stretches(source, first, steps, size):
            self.run.copies_are_old = True
            yield stretch

    def full_start(self, name: str) -> np.ndarray:
        """See `SlicedBackend`."""
        starts = {parameter.name: parameter.start for parameter in self.run.task.network.get_parameters()}
        return start_value(name, self.holder.shapes[name], starts[name], self.run.settings.seed)

    def swap(self, parts: np.ndarray) -> np.ndarray:
        """See `SlicedBackend`."""
        return DeviceSwap(self.run.processes)(parts)

    def loss(self, batch: Batch) -> tuple[float, float]:
        """See `Backend`."""
        self._mode(False)
        self.run.refresh_copies()
        loss, weight = self.mean_loss(*map(Tensor, batch)).asnumpy().tolist()
        return (loss * weight, weight) if self.run.reports_loss else (0.0, 0.0)

    def scores(self, batch: Batch) -> np.ndarray | None:
        """See `Backend`."""
        self._mode(False)
        self.run.refresh_copies()
        scores = self.scorer(*map(Tensor, batch)).asnumpy()
        own, parts = self.share
        if len(scores) > len(batch[0]):  # every process knows all rows
            scores = np.array_split(scores, parts)[own]
        config = self.run.config
        is_last = self.run.stage == config.pipeline.stages - 1
        return scores if is_last and self.rank % config.op == 0 else None


def _outputs(results: tuple) -> Outputs:
    names = ("loss", "global_norm", "finite", "loss_scale", "learning_rate")
    return {name: value.asnumpy().item() for name, value in zip(names, results, strict=True)}


def measured_matmul_tflops(size: int = 1536, repeats: int = 5) -> float:
    """Speed of a float32 size x size matrix product on this device, TFLOP/s: the best of `repeats` after a warm-up."""
    generator = np.random.default_rng(0)
    a, b = (Tensor(generator.standard_normal((size, size), np.float32)) for _ in range(2))
    best = math.inf
    for _ in range(repeats + 1):
        started = time.perf_counter()
        ops.matmul(a, b).asnumpy()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best / 1e12


class _Chain(nn.Cell):
    """The product of `count` equal square matrices, one after the other."""

    def __init__(self, matrix: Tensor, count: int) -> None:
        super().__init__()
        self.matrix, self.count, self.matmul = Parameter(matrix, requires_grad=False), count, ops.MatMul()

    def construct(self) -> Tensor:
        product = self.matrix
        for _ in range(self.count):
            product = self.matmul(product, self.matrix)
        return product[0, 0]


def chained_matmul_tflops(dtype: ms.Type, size: int = 4096, lengths: tuple[int, int] = (8, 40)) -> float:
    """Speed of a size x size matrix product on a GPU, TFLOP/s: by how much a graph of `lengths[1]` products takes
    longer than one of `lengths[0]`, so that neither launch nor copies count; the best of three each."""
    generator = np.random.default_rng(0)
    matrix = Tensor((generator.standard_normal((size, size), np.float32) / math.sqrt(size)), dtype)
    seconds = []
    for length in lengths:
        chain, best = _Chain(matrix, length), math.inf
        for _ in range(4):  # the first compiles
            started = time.perf_counter()
            chain().asnumpy()
            best = min(best, time.perf_counter() - started)
        seconds.append(best)
    return 2.0 * size**3 * (lengths[1] - lengths[0]) / max(seconds[1] - seconds[0], 1e-9) / 1e12
