"""What the rankers' benches on GPUs share: start values and inputs made on the device, products counted in a graph, a
graph cut behind its lookups, and programs that take turns.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.torch_runtime.execute import DTYPES
from parallel.torch_runtime.graph import Graph, Kind, Node
from parallel.torch_runtime.inference.rank import binding, prepared
from parallel.torch_runtime.inference.weights import Weights
from parallel.torch_runtime.program import Program
from parallel.torch_runtime.step import TorchStep

DATA_SHEET_TFLOPS = 989.0
_PRODUCTS = ("MatMul", "BatchMatMul")


def drawn(program: Program, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Float32 start value of a parameter by its distribution, the same wherever it is asked for, by random numbers of
    the device."""
    held = program.by_name.get(name)
    distribution, scale = held.start if held is not None else ("zeros", 0.0)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    if distribution == "normal":
        return torch.randn(shape, generator=generator, device=device).mul_(scale)
    if distribution == "uniform":
        return torch.rand(shape, generator=generator, device=device).mul_(2.0 * scale).sub_(scale)
    return torch.full(shape, {"zeros": 0.0, "ones": 1.0}.get(distribution, scale), device=device)


class Served:
    """Graphs of inference as the torch runtime serves them, with weights drawn on the device.

    Args:
        program: the graphs are of.
        graphs: by name; they share their weights.
        mode: "exact", "cuda_graph" (fused) or "inductor" (compiled).
        device: where they run.
    """

    def __init__(self, program: Program, graphs: dict[str, Graph], mode: str, device: torch.device) -> None:
        self.device, self.compiled = device, mode == "inductor"
        self.graphs = prepared(graphs, fused=mode != "exact", compiled=self.compiled)
        self.weights = Weights(self.graphs.values(), device)
        for name, shape in self.weights.shapes.items():
            if self.weights.forms[name]:
                self.weights.put(name, drawn(program, name, shape, device))
            else:
                self.weights.state.setdefault(name, None)
        self.weights.settle()

    def function(self, name: str, beside: Sequence[int] = ()) -> Callable[[Sequence[Tensor]], Tensor]:
        """A graph as a function of its inputs; what depends on those at the places `beside` alone runs beside the
        rest."""
        return binding(self.graphs[name], self.weights, self.device, self.compiled, beside=beside).run


class DrawnStep(TorchStep):
    """A `TorchStep` that starts from values drawn on the device."""

    def _started(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        held = self.program.by_name.get(name)
        if held is None or held.start[0] == "fill" or not DTYPES[dtype].is_floating_point:
            return super()._started(name, shape, dtype)
        return drawn(self.program, name, shape, self.device).to(DTYPES[dtype])


def inputs_of(listed: Sequence[tuple], rows: dict[str, int], device: torch.device, seed: int = 0) -> list[Tensor]:
    """Random inputs: ids below `rows`, 0 and 1 for labels, zeros for an index, normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    found = []
    for name, shape, dtype in listed:
        if name == "index":
            found.append(torch.zeros(tuple(shape), dtype=torch.int32, device=device))
        elif dtype == "int32":
            found.append(torch.randint(0, rows[name], tuple(shape), generator=generator, device=device,
                                       dtype=torch.int32))
        elif name == "labels":
            found.append(torch.randint(0, 2, tuple(shape), generator=generator, device=device).float())
        else:
            found.append(torch.randn(tuple(shape), generator=generator, device=device))
    return found


def smallest_table(program: Program) -> int:
    """Rows of the smallest table: ids below it are rows of every one."""
    return min(tensor.shape[0] for tensor in program.tensors if tensor.kind == "parameter"
               and tensor.name.startswith("embedding.tables."))


# -- graphs -----------------------------------------------------------------------------------------------------------


def flops(graph: Graph, wanted: Callable[[Node], bool] = lambda node: True) -> float:
    """Two for each multiplication and addition of the graph's products."""
    kinds = {number: kind for number, (_, kind) in enumerate([*graph.inputs, *graph.parameters])}
    kinds |= {node.number: node.outputs[0] for node in graph.nodes if len(node.outputs) == 1}
    total = 0.0
    for node in graph.nodes:
        if node.op in _PRODUCTS and wanted(node):
            left = bool(graph.constant(node.inputs[2])) if len(node.inputs) > 2 else False
            inner = kinds[node.inputs[0]].shape[-2 if left else -1]
            size = 1
            for dim in node.outputs[0].shape:
                size *= dim
            total += 2.0 * size * inner
    return total


def dense_part(graph: Graph) -> Graph:
    """Tokenization, blocks and heads of a forward pass as a graph whose inputs are the groups' vectors."""
    nodes = {node.number: node for node in graph.nodes}
    dense: set[int] = set()
    for node in graph.nodes:
        own = any(graph.is_parameter(item) and not graph.parameters[item - graph.first_parameter][0].startswith(
            "embedding.") for item in node.inputs)
        if own or "/tokenize-" in node.scope or any(item in dense for item in node.inputs):
            dense.add(node.number)
    result = graph.result
    while nodes[result].op == "Depend":
        result = nodes[result].inputs[0]
    kept: dict[int, Node] = {}
    outside: dict[int, Kind] = {}
    kinds = {number: kind for number, (_, kind) in enumerate(graph.inputs)}

    def take(number: int) -> None:
        if number in kept or number in outside:
            return
        node = nodes.get(number)
        if node is None:
            if number in kinds:
                outside[number] = kinds[number]
        elif number in dense or node.op in ("Load", "MakeTuple"):
            for item in _read(node):
                take(item)
            kept[number] = node
        else:
            outside[number] = node.outputs[0]

    take(result)
    return _renumbered(graph, list(kept.values()), outside, result)


def _read(node: Node) -> list[int]:
    return node.inputs[:1] if node.op in ("Load", "Depend") else node.inputs


def _renumbered(graph: Graph, nodes: list[Node], outside: dict[int, Kind], result: int) -> Graph:
    inputs = [(f"groups_{place}", kind) for place, kind in enumerate(outside.values())]
    shift = len(inputs) - len(graph.inputs)
    numbers = {number: place for place, number in enumerate(outside)}
    numbers |= {number: number + shift for number in range(graph.first_parameter, graph.first_node)}
    first = graph.first_node + shift
    numbers |= {node.number: first + place for place, node in enumerate(nodes)}
    made = [dataclasses.replace(node, inputs=[numbers[item] for item in _read(node)], number=numbers[node.number])
            for node in nodes]
    return Graph(inputs, graph.parameters, graph.constants, made, numbers[result], graph.groups)


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises a `TimeoutError` in what takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not ready after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- turns ------------------------------------------------------------------------------------------------------------


def captured(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], Any]:
    """(a replay of the function's kernels, its result that the replay writes): by a CUDA graph; on a CPU as it is."""
    with torch.no_grad():
        if device.type != "cuda":
            return function, function()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function()
        graph.replay()
        torch.cuda.synchronize(device)

    def replay(kept: Any = (function, result)) -> None:
        """What the graph reads lives as long as this does."""
        graph.replay()

    return replay, result


def in_turns(entries: dict[str, Callable[[], Any]], device: torch.device, turns: int = 5,
             seconds: float = 0.15) -> dict[str, float]:
    """Median milliseconds of a call, the callables taking turns of about so many seconds."""
    calls, found = {}, {name: [] for name in entries}
    with torch.no_grad():
        for name, call in entries.items():
            calls[name] = max(2, min(300, int(seconds / max(1e-6, _seconds(call, 2, device)))))
        for _ in range(turns):
            for name, call in entries.items():
                found[name].append(1e3 * _seconds(call, calls[name], device))
    return {name: statistics.median(times) for name, times in found.items()}


def _seconds(call: Callable[[], Any], times: int, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def difference(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other| over all elements; not a number where one has such."""
    one, other = one.double(), other.double()
    return float((one - other).norm() / other.norm())
