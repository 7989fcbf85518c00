"""One rank of an exported inference program: its shards of the weights and of the cache, and the graphs over them."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint.sharded import Extent
from parallel.common.errors import UserError
from parallel.torch_runtime.execute import DTYPES, Binder, Bound
from parallel.torch_runtime.fusion.fused import fused_rules
from parallel.torch_runtime.fusion.passes import optimized
from parallel.torch_runtime.fusion.served import EIGHT_ROWS, choose_tiles, serving_rules
from parallel.torch_runtime.fusion.serving_pass import for_serving
from parallel.torch_runtime.fusion.weights import narrowed
from parallel.torch_runtime.graph import Graph
from parallel.torch_runtime.groups import Communicator
from parallel.torch_runtime.inference import lanes
from parallel.torch_runtime.inference.member import Member
from parallel.torch_runtime.inference.weights import Weights
from parallel.torch_runtime.program import CACHE, Program

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

ReadPart = Callable[[str, Extent | None], np.ndarray | Tensor]


class InferenceRank:
    """The graphs of one rank with weights and cache.

    Args:
        program: of inference.
        member: this process.
        read: part of a parameter by name, as a checkpoint has it; read one at a time, so that no more than this rank's
            shards and one tensor are in memory.
        slots: of the cache.
        captured: whether graphs are captured as CUDA graphs.
        eight: whether a parameter's products take int8 weights where they have few rows; None = none do.
        group: inputs of one scale of int8 weights (128); None = one scale for an output.
        fused: whether patterns are fused; None = on GPUs.
        compiled: whether what lies between fused nodes is compiled by Inductor; not with int8 weights.
        beside: names of inputs; where a graph has them, what depends on them alone runs beside the rest (`lanes`).

    Raises:
        UserError: the program is none of inference, a parameter is missing or of another shape, or shards part the
            groups of int8 weights.
    """

    def __init__(self, program: Program, member: Member, read: ReadPart, slots: int, captured: bool, *,
                 eight: Callable[[str], bool] | None = None, group: int | None = None,
                 fused: bool | None = None, compiled: bool = False, beside: Collection[str] = ()) -> None:
        self.program, self.member, self.device = program, member, member.device
        self.beside = beside
        self.own = program.ranks[member.number]
        self.graphs = {kind: program.graph(member.number, kind) for kind in program.inference_kinds}
        if not self.graphs:
            raise UserError("the program is none of inference", where=program.folder,
                            hint="export it with --graphs and the names of such graphs")
        self.last = program.parallel["op"] * (program.parallel["pipeline"]["stages"] - 1)
        self.slots, self.captured = slots, captured and self.device.type == "cuda"
        fused = self.device.type == "cuda" if fused is None else fused
        self.compiled = compiled and eight is None
        self.graphs = prepared(self.graphs, fused=fused, eight=eight, compiled=self.compiled)
        self.weights = Weights(self.graphs.values(), self.device, group)
        self.state = self._state(read)
        self.bound: dict[str, Any] = {}

    def shape(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs of a kind of graph, by their names in the program."""
        return self.program.shapes(kind)

    def run(self, kind: str, inputs: Sequence[np.ndarray]) -> Tensor | None:
        """The graph's result (logits [M, V] float32, say) on the device of the group's first rank; None elsewhere."""
        with torch.no_grad():
            bound = self._bound(kind)
            given = [torch.from_numpy(array) for array in inputs]
            if not self.captured:  # a captured graph copies them to its own
                given = [item.to(self.device, non_blocking=True) for item in given]
            result = bound.run(given)
        if self.last and self.member.number in (0, self.last):
            return self._handed_over(kind, result)
        return result if self.member.leads else None

    def release(self) -> None:
        """Gives captured graphs up: NCCL keeps a communicator as long as one refers to it."""
        self.bound.clear()
        gc.collect()

    def _handed_over(self, kind: str, result: Any) -> Tensor | None:
        """The last stage's logits, given to the group's first rank."""
        base = self.member.base
        if self.member.number:
            dist.send(result.contiguous(), base)
            return None
        found = torch.empty(self.program.result_shape(self.last, kind), device=self.device)
        dist.recv(found, base + self.last)
        return found

    def _state(self, read: ReadPart) -> dict[str, Tensor]:
        for name, shape in self.weights.shapes.items():
            if name.startswith(CACHE):
                dtype = DTYPES[self.weights.types[name]]
                self.weights.state[name] = torch.zeros((self.slots, *shape[1:]), dtype=dtype, device=self.device)
                continue
            self.weights.put(name, *self.part(name, read))
        self.weights.settle()
        return self.weights.state

    def part(self, name: str, read: ReadPart) -> tuple[Tensor, Tensor | None]:
        """This rank's part of a parameter, and what its int8 weights are scaled by if that is more than the part:
        what `Weights.put` takes.

        Raises:
            UserError: it is missing or of another shape, or shards part the groups of int8 weights.
        """
        value, shape = tensor_of(read(name, self.own.extents.get(name))), self.weights.shapes[name]
        if tuple(value.shape) != shape:
            raise UserError(f"'{name}' has shape {list(value.shape)} in the checkpoint and {list(shape)} in the "
                            "program", where=self.program.folder,
                            hint="export the program with the checkpoint's model settings")
        return value, self._largest(name, read)

    def _largest(self, name: str, read: ReadPart) -> Tensor | None:
        """What int8 weights are scaled by where other ranks have some of their inputs, so that all ranks have the scale
        of one device; read for this rank's outputs with all inputs."""
        extent, dim = self.own.extents.get(name), self.weights.inputs_of_eight(name)
        if extent is None or dim is None:
            return None
        (begin, end), size, group = extent[dim], self.program.by_name[name].shape[dim], self.weights.group
        if end - begin == size:
            return None
        if group is not None and size > group:
            if begin % group or (end % group and end != size):
                raise UserError(f"a shard of '{name}' has inputs {begin} to {end}, int8 weights a scale for {group}",
                                where="parallel.op", value=self.program.parallel["op"],
                                hint=f"take an op whose shards of {size} inputs are multiples of {group}")
            return None
        return self.weights.largest(name, tensor_of(read(name, (*extent[:dim], (0, size), *extent[dim + 1:]))))

    def _bound(self, kind: str) -> Bound:
        if kind not in self.bound:
            if kind not in self.graphs:
                raise UserError(f"the program holds no {kind} graph", where=self.program.folder,
                                hint=f"it holds {', '.join(self.graphs)}; export it with --graphs")
            graph = self.graphs[kind]
            graph.groups = [tuple(rank + self.member.base for rank in members) for members in graph.groups]
            beside = [place for place, name in enumerate(self.shape(kind)) if name in self.beside]
            bound = binding(graph, self.weights, self.device, self.compiled, self.member.communicator, beside)
            if self.captured:
                from parallel.torch_runtime.captured import Captured

                bound = Captured(bound, self.device)
            self.bound[kind] = bound
        return self.bound[kind]


def prepared(graphs: dict[str, Graph], *, fused: bool, eight: Callable[[str], bool] | None = None,
             compiled: bool = False) -> dict[str, Graph]:
    """Graphs of inference with their patterns fused; see `InferenceRank`."""
    if compiled:
        narrow = narrowed(list(graphs.values()))
        return {kind: optimized(graph, early=False) for kind, graph in zip(graphs, narrow, strict=True)}
    if not fused and eight is None:
        return graphs
    return {kind: for_serving(graph, fused=fused, eight=lambda name, rows: (
        eight is not None and rows <= EIGHT_ROWS and eight(name))) for kind, graph in graphs.items()}


def binding(graph: Graph, weights: Weights, device: torch.device, compiled: bool,
            communicator: Communicator | None = None, beside: Collection[int] = ()) -> Bound:
    """A `prepared` graph ready to run with settled weights; `beside` are places of inputs, and what depends on them
    alone runs beside the rest."""
    kind, lane = Binder, lanes.beside(graph, beside) if beside else set()
    if lane:
        graph = lanes.in_front(graph, lane)
    if compiled:
        from parallel.torch_runtime.fusion.regions import RegionBinder

        kind = partial(RegionBinder, lane=lane)
    bound = kind(graph, weights.state, device, communicator=communicator,
                 rules=fused_rules(device) | serving_rules(device, weights)).bind()
    if lane:
        bound = lanes.Lanes(bound, lane, device)
    if device.type == "cuda":
        choose_tiles(graph, weights, device)
    return bound


def tensor_of(array: np.ndarray | Tensor) -> Tensor:
    """A checkpoint's array as a tensor; two bytes that NumPy has no type for are bfloat16."""
    if isinstance(array, Tensor):
        return array
    array = np.ascontiguousarray(array)
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def cache_bytes_per_slot(program: Program, number: int) -> int:
    """Bytes of keys and values of one token on a rank of the program."""
    graph = program.graph(number, program.inference_kinds[0])
    return sum(math.prod(kind.shape[1:]) * _BYTES[kind.dtype] for name, kind in graph.parameters
               if name.startswith(CACHE))


def weight_bytes(program: Program, number: int) -> int:
    """Bytes of the weights of a rank of the program."""
    graph = program.graph(number, program.inference_kinds[0])
    return sum(math.prod(kind.shape) * _BYTES[kind.dtype] for name, kind in graph.parameters
               if not name.startswith(CACHE))


def free_bytes(device: torch.device) -> int | None:
    """Memory that is left for this process; of the CPU's its share among the processes here."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
