"""The training step of one rank of a program: what the trainer needs of a backend (`parallel.training.backend`)."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel.checkpoint.writing import Holder
from parallel.common.errors import UserError
from parallel.common.start_value import NOT_KEPT
from parallel.torch_runtime.execute import DTYPES, Binder, Bound
from parallel.torch_runtime.fusion.attention_pass import documents_input
from parallel.torch_runtime.fusion.fused import fused_rules
from parallel.torch_runtime.fusion.passes import optimized
from parallel.torch_runtime.graph import Graph
from parallel.torch_runtime.groups import Communicator, join, leave
from parallel.torch_runtime.program import Program, start_of
from parallel.torch_runtime.program import Tensor as Held
from parallel.training.backend import SlicedBackend
from parallel.training.data_source import SAMPLE_NUMBERS
from parallel.training.operation.stall import waiting

MODES = ("exact", "eager", "cuda_graph", "inductor")
_SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
                torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
_DATA_SHEETS = {"H200": 989.0, "H100 80GB HBM3": 989.0, "H100 PCIe": 756.0, "A100": 312.0}
"""TFLOP/s in float16 and bfloat16 by a part of the name that the driver gives a GPU (NVIDIA's data sheets)."""


class TorchTensor:
    """A parameter, moment or counter on the device, as a `parallel.checkpoint.tensors.NamedTensor`."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.dtype, self.shape = _SAFETENSORS[tensor.dtype], tuple(tensor.shape)

    def read(self) -> np.ndarray:
        """A copy of the values (bfloat16 as its 16 bits)."""
        found = self.tensor.detach().to("cpu", copy=True)
        if found.dtype == torch.bfloat16:
            return found.view(torch.int16).numpy().view(np.uint16)
        return found.numpy()

    def assign(self, value: np.ndarray) -> None:
        """Puts values of the same type and shape in place."""
        value = torch.from_numpy(np.array(value, order="C"))
        if self.tensor.dtype == torch.bfloat16 and not value.is_floating_point():
            value = value.view(torch.int16).view(torch.bfloat16) if value.dtype == torch.int16 else \
                torch.from_numpy(value.numpy().view(np.int16)).view(torch.bfloat16)
        self.tensor.copy_(value.reshape(self.tensor.shape))


class TorchStep(SlicedBackend):
    """One rank of an exported program on one device, ready to step from its start values.

    Args:
        program: opened.
        rank: which; there is one process for each of `program.world`.
        device: "cpu", "cuda" (takes LOCAL_RANK) or "cuda:N"; None = a GPU where there is one.
        mode: "exact", op by op in the graph's order; "eager", with fused nodes (`passes`); "cuda_graph", the same
            captured once; "inductor", what lies between fused nodes compiled, and captured on a GPU (`regions`);
            "auto", see `parallel.execution`.
        floating: "declared", or "float64" for all floating types (exact mode only).
        address: HOST:PORT where the processes meet; None = MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: the layout has another number of processes, or they do not find each other.
    """

    name = "torch"

    def __init__(self, program: Program, rank: int = 0, *, device: str | None = None, mode: str = "auto",
                 floating: str = "declared", address: str | None = None) -> None:
        self.program, self.rank, self.ranks = program, rank, program.world
        if not 0 <= rank < program.world:
            raise UserError(f"the layout is one of {program.world} processes", where="rank", value=rank)
        self.device = device_of(device)
        if mode == "auto":
            mode = "exact" if self.device.type == "cpu" else "cuda_graph"
        if mode not in MODES:
            raise UserError("no such mode", where="mode", value=mode, hint=f"known: {', '.join(MODES)}")
        if floating != "declared" and mode != "exact":
            raise UserError("only the exact mode computes in float64", where="mode", value=mode)
        self.mode, self.floating = mode, floating
        if mode == "cuda_graph" and self.device.type != "cuda":
            raise UserError("CUDA graphs need a GPU", where="mode", value=mode, hint="set it to eager")
        self.own = program.ranks[rank]
        layout = program.parallel
        self.share = (self.own.data, int(layout["data"]))
        self.is_last = self.own.stage == layout["pipeline"]["stages"] - 1
        self.numbered = any(name == SAMPLE_NUMBERS for name, *_ in program.inputs)
        if self.device.type == "cuda":
            check_messages(program, rank)
        join(rank, self.ranks, self.device, address=address)
        self.graphs = {kind: program.graph(rank, kind) for kind in self.own.graphs}
        self.inputs = [(name, (shape[0] // self.share[1], *shape[1:]), dtype) for name, shape, dtype in program.inputs]
        self.reads = any(self.inputs[number][0] != SAMPLE_NUMBERS for graph in self.graphs.values()
                         for number in graph.used_inputs())
        self.communicator = None
        if self.ranks > 1:
            self.communicator = Communicator(rank, self.ranks, self.device, *program.groups)
        try:
            self.state = self._start()
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, program, rank) from None
        self.bound: dict[tuple[str, bool], Bound] = {}
        self.documents: dict[str, int | None] = {}
        self.copies_are_old = True

    # -- what the trainer asks --------------------------------------------------------------------------------------

    def step(self, batch: Sequence[np.ndarray]) -> dict[str, Any]:
        """Forward, backward, update; `batch` is this rank's rows. See `Backend.step`."""
        results = self.run("step", batch)
        self.copies_are_old = True
        names = ("loss", "global_norm", "finite", "loss_scale", "learning_rate")
        # One transfer for all five.
        values = torch.stack([torch.as_tensor(item, device=self.device).reshape(()).to(torch.float64)
                            for item in results])
        if self.device.type == "cuda":
            with waiting("the end of a step"):
                values = values.tolist()
        else:
            values = values.tolist()
        return {**dict(zip(names, values, strict=True)), "finite": bool(values[2])}

    def loss(self, batch: Sequence[np.ndarray]) -> tuple[float, float]:
        """(loss x weight, weight) of the global batch on one rank, (0, 0) on the others. See `Backend.loss`."""
        self._refresh_copies()
        result = self.run("loss", batch)
        if not self.is_last or self.own.data or self.own.op:
            return 0.0, 0.0
        mean, weight = (float(item) for item in result.tolist())
        return mean * weight, weight

    def scores(self, batch: Sequence[np.ndarray]) -> np.ndarray | None:
        """Probabilities [rows, tasks] of this rank's rows; None where another rank has them. See `Backend.scores`."""
        self._refresh_copies()
        result = self.run("scores", batch)
        if not self.is_last or self.own.op:
            return None
        return result.float().cpu().numpy()

    def _refresh_copies(self) -> None:
        """Gives stages that borrow a parameter its values of now. A step sends them along; the graphs without gradients
        do not, and read what the borrower keeps."""
        if self.copies_are_old and self.communicator is not None:
            for name, owner, borrower in self.program.borrowed:
                if self.rank in (owner, borrower):
                    self.communicator.give(self.state[name], owner, borrower)
        self.copies_are_old = False

    def run(self, kind: str, batch: Sequence[np.ndarray]) -> Any:
        """The result of a kind of graph on this rank's rows of a batch."""
        try:
            with torch.no_grad():
                bound = self._bound(kind, batch)
                return bound.run([self.fed(item, array) for item, array in
                                  zip(bound.graph.inputs, batch, strict=True)])
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, self.program, self.rank) from None

    def fed(self, item: tuple[str, Any], array: np.ndarray) -> Tensor:
        """A batch's array on the device in the type of the graph's input."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        dtype = DTYPES.get(item[1].dtype, tensor.dtype)
        if self.floating != "declared" and dtype.is_floating_point:
            dtype = DTYPES[self.floating]
        return tensor.to(self.device, dtype, non_blocking=True)

    def parameters(self) -> list[TorchTensor]:
        """Of the network, those that this rank holds."""
        return self._of("parameter")

    def full_start(self, name: str) -> np.ndarray:
        """Start value of a parameter before it is sharded."""
        return start_of(self.program.by_name[name], None, self.program.seed)

    def states(self) -> list[TorchTensor]:
        """Moments that this rank holds."""
        return self._of("state")

    def counters(self) -> list[TorchTensor]:
        """step, iteration, loss_scale, loss_scale_clean_steps."""
        return self._of("counter")

    @cached_property
    def holder(self) -> Holder | None:
        """Which slices this rank holds; None where every rank holds everything."""
        tensors = [tensor for tensor in self.program.tensors if tensor.kind == "parameter"]
        if self.ranks == 1:
            return None
        extents = {tensor.name: self.own.extents[tensor.name] for tensor in tensors if self._holds(tensor)}
        return Holder(self.rank, self.ranks, extents, {tensor.name: tensor.shape for tensor in tensors}, self.barrier,
                      lambda: self.program.holders(extents))

    def exchange(self, values: list[float]) -> list[float]:
        """Adds lists of equal length over all ranks."""
        return self.communicator.add(values) if self.communicator is not None else list(values)

    def swap(self, parts: np.ndarray) -> np.ndarray:
        """See `SlicedBackend`."""
        return self.communicator.swap(parts) if self.communicator is not None else parts

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        if self.communicator is not None:
            self.communicator.barrier()

    def peak_tflops(self, precision: str) -> float | None:
        """Measured speed of a large matrix product in the type of `precision` on this device."""
        return measured_tflops(self.device, {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision,
                                                                                               torch.float32))

    def data_sheet_tflops(self, precision: str) -> float | None:
        """See `Backend`; of some NVIDIA GPUs, without sparsity."""
        if self.device.type != "cuda" or precision not in ("fp16", "bf16"):
            return None
        return next((tflops for name, tflops in _DATA_SHEETS.items()
                     if name in torch.cuda.get_device_name(self.device)), None)

    def profiler(self, folder: Path) -> Callable[[], None]:
        """Begins to profile; the function ends it and writes `folder/rank_<r>.json`, a trace for chrome://tracing."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        running = profile(activities=kinds)
        running.start()

        def stop() -> None:
            running.stop()
            running.export_chrome_trace(str(folder / f"rank_{self.rank}.json"))

        return stop

    def close(self) -> None:
        """Leaves the other processes."""
        # NCCL gives a communicator up only when no captured graph refers to it any more.
        self.bound.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        leave()

    # -- how it is made -----------------------------------------------------------------------------------------------

    def _of(self, kind: str) -> list[TorchTensor]:
        return [TorchTensor(tensor.name, self.state[tensor.name]) for tensor in self.program.tensors
                if tensor.kind == kind and tensor.name in self.state and self._holds(tensor)]

    def _holds(self, tensor: Held) -> bool:
        """Whether this rank keeps a tensor; a copy of another stage's is none."""
        owner = tensor.name.partition(".")[2] if tensor.kind == "state" else tensor.name
        if owner in self.own.copies or tensor.name in self.own.copies:
            return False
        # A single rank has no extents: everything is held in full.
        return tensor.kind == "counter" or self.ranks == 1 or tensor.name in self.own.extents

    def _start(self) -> dict[str, Tensor]:
        """Everything that the rank's graphs hold, at its start."""
        state: dict[str, Tensor] = {}
        for graph in self.graphs.values():
            for name, kind in graph.parameters:
                if name not in state:
                    state[name] = self._started(name, kind.shape, kind.dtype)
        for tensor in self.program.tensors:
            if tensor.kind == "counter" and tensor.name not in state:
                state[tensor.name] = self._started(tensor.name, (), tensor.dtype)
        return state

    def _started(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        wanted = DTYPES[dtype]
        if wanted.is_floating_point and self.floating != "declared":
            wanted = DTYPES[self.floating]
        if name.startswith(NOT_KEPT):
            return torch.zeros(shape, dtype=wanted, device=self.device)
        held = self.program.by_name.get(name)
        if held is None:
            raise UserError("a parameter of the graph is none of the run's", where=f"rank {self.rank}", value=name)
        if held.start[0] == "fill":
            return torch.full(shape, held.start[1], dtype=wanted, device=self.device)
        value = start_of(held, self.own.extents.get(name), self.program.seed)
        return torch.from_numpy(value.reshape(shape)).to(self.device, wanted)

    def _bound(self, kind: str, batch: Sequence[np.ndarray]) -> Bound:
        """The graph of a kind ready to run; where attention is fused there are two, one for batches without documents
        to tell apart, whose mask is causal."""
        if kind not in self.graphs:
            raise UserError(f"the program holds no {kind} graph", where=self.program.folder)
        causal = False
        if self.mode != "exact":
            place = self.documents.get(kind)
            if place is None and kind not in self.documents:
                place = self.documents[kind] = documents_input(self.graphs[kind])
            causal = place is not None and bool((batch[place] == batch[place][:, :1]).all())
        if (kind, causal) not in self.bound:
            self.bound[kind, causal] = self._bind(self.graphs[kind], causal)
        return self.bound[kind, causal]

    def _bind(self, graph: Graph, causal: bool) -> Bound:
        if self.mode == "exact":
            return Binder(graph, self.state, self.device, floating=self.floating,
                          communicator=self.communicator).bind()
        free = self.program.free_groups
        graph = optimized(graph, causal=causal, free=free)
        kind = Binder
        if self.mode == "inductor":
            from parallel.torch_runtime.fusion.regions import RegionBinder

            kind = RegionBinder
        bound = kind(graph, self.state, self.device, communicator=self.communicator, rules=fused_rules(self.device),
                     joins=free).bind()
        if self.mode != "eager" and self.device.type == "cuda":
            from parallel.torch_runtime.captured import Captured

            return Captured(bound, self.device)
        return bound


def check_messages(program: Program, rank: int) -> None:
    """Refuses a program whose stages do not take messages in the order in which they are sent: NCCL knows no tags.

    Raises:
        UserError: the first message of this rank that would be taken for another.
    """
    for kind in program.ranks[rank].graphs:
        for pair, (sent, taken) in messages(program, rank, kind).items():
            if sent != taken:
                number = next((place for place, (one, other) in enumerate(zip(sent, taken, strict=False))
                               if one != other), min(len(sent), len(taken)))
                raise UserError(
                    f"message {number} from rank {pair[0]} to rank {pair[1]} would be taken for another: NCCL pairs "
                    "messages by their order", where=f"{program.folder}, {kind} graph",
                    value=f"tags {sent[number:number + 3]} sent, {taken[number:number + 3]} taken",
                    hint="export the program again, or run it on CPUs (--device cpu)")


def messages(program: Program, rank: int, kind: str = "step") -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """For each direction in which a rank sends or receives, (sender, receiver): the tags in the order in which they are
    sent, and in which they are taken."""
    own = {tuple(pair) for pair in program.groups[1] if rank in pair and pair[0] != pair[1]}
    tags: dict[tuple, tuple[list[int], list[int]]] = {pair: ([], []) for pair in sorted(own)}
    for number in sorted({item for pair in own for item in pair}):
        graph = program.graph(number, kind)
        for node in graph.nodes:
            if node.op in ("Send", "Receive"):
                pair = graph.groups[node.attributes["group"]]
                if pair in tags:
                    tags[pair][node.op == "Receive"].append(int(node.attributes["tag"]))
    return tags


def out_of_memory(error: Exception, program: Program, rank: int) -> UserError:
    """One line for a device whose memory is too small: what the run needs by the estimate that was made at the export,
    and the key that lowers it at the least cost of time."""
    message, needs = str(error).splitlines()[0].partition(" If reserved")[0], program.tree.get("needs") or {}
    key, hint = "train.global_batch_size", "lower it"
    if needs:
        largest = sorted(((size, kind) for kind, size in needs["kinds"].items() if kind != "total"), reverse=True)[:2]
        message += (f" The estimate for this layout is {needs['bytes'] / 1e9:.1f} GB ("
                 + ", ".join(f"{kind} {size / 1e9:.1f}" for size, kind in largest) + ").")
        changes = [f"{name}={value} {size / 1e9:.1f} GB" for name, value, size in needs["changes"]]
        if changes:
            key = needs["changes"][0][0]
            hint = f"by the estimate a device needs with {', with '.join(changes)}; export again with one"
    return UserError(f"out of device memory on rank {rank}: {message}", where=key, hint=hint)


def device_of(name: str | None) -> torch.device:
    """The device of this process: "cpu", "cuda" (takes LOCAL_RANK) or "cuda:N"; None = a GPU where there is one.

    Raises:
        UserError: no GPU that torch can use.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % max(1, torch.cuda.device_count())}"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("no GPU that torch can use", where="device", value=name, hint="set it to cpu")
        torch.cuda.set_device(device)
    return device


def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product on random numbers: the peak that an MFU is taken of."""
    size, times = (8192, 10) if device.type == "cuda" else (1024, 4)
    if device.type == "cpu":
        dtype = torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(times):
        a @ b
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 2.0 * size**3 * times / (time.perf_counter() - begin) / 1e12
