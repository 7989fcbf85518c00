"""Bytes that a program's step really holds and moves: its graph run on torch's meta device, every tensor accounted."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.torch_runtime.execute import DTYPES, Binder
from parallel.torch_runtime.fusion.fused import fused_rules
from parallel.torch_runtime.fusion.passes import optimized
from parallel.torch_runtime.groups import Pending
from parallel.torch_runtime.program import Program

_META = torch.device("meta")
_BLOCK = 512  # what CUDA's allocator rounds to


class Ledger(TorchDispatchMode):
    """Notes every storage from its first result to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.now = self.most = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known[key] = -(-storage.nbytes() // _BLOCK) * _BLOCK
            self.now += self.known[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.now -= self.known.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor):
                self.add(item)
        return result


class Partners:
    """Other ranks that bring what they are asked for."""

    def start(self, node: Any, value: Any, members: tuple, own: bool = False) -> Pending:
        count = len(members)
        if node.op == "Receive":
            return Pending(None, torch.empty(node.outputs[0].shape, dtype=value, device=_META))
        if node.op == "Send":
            self.sent.append(value)
            return Pending(None, value)
        if count == 1:
            return Pending(None, value)
        if node.op == "AllGather":
            return Pending(None, value.new_empty((value.shape[0] * count, *value.shape[1:])), value)
        if node.op == "ReduceScatter":
            return Pending(None, value.new_empty((value.shape[0] // count, *value.shape[1:])), value)
        return Pending(None, value if own else value.clone())

    def __init__(self) -> None:
        self.sent: list = []

    def start_together(self, nodes: Any, values: Any, members: tuple, own: Any) -> list[Pending]:
        return [self.start(*each, members, alone) for each, alone in zip(zip(nodes, values, strict=True), own,
                                                                         strict=True)]

    def wait_for_sends(self) -> None:
        self.sent.clear()


def _rules() -> dict[str, Any]:
    """Those of a GPU, as far as memory goes."""
    def attention(node: Any, q: Any, *_: Any) -> tuple:
        return torch.empty_like(q), torch.empty((*q.shape[:-1], 1), dtype=torch.float32, device=_META)

    def attention_gradient(node: Any, dout: Any, forward: Any, q: Any, k: Any, v: Any, *_: Any) -> tuple:
        return tuple(map(torch.empty_like, (q, k, v)))

    def sums(node: Any, logits: Any, *_: Any) -> tuple:
        return tuple(torch.empty(logits.shape[0], device=_META) for _ in range(2))

    def sums_gradient(node: Any, logits: Any, *_: Any) -> Any:
        return torch.empty(logits.shape, dtype=DTYPES[node.outputs[0].dtype], device=_META)

    def norm(node: Any, *_: Any) -> Any:
        return torch.empty(node.outputs[0].shape, device=_META)

    def nothing(node: Any, *_: Any) -> None:
        return None

    return {**fused_rules(_META), "FusedAttention": attention, "FusedAttentionGrad": attention_gradient,
            "RowSums": sums, "RowSumsGrad": sums_gradient, "SumsOfSquares": norm, "FusedAdam": nothing,
            "FusedAdagrad": nothing}


def most_held(folder: Path, rank: int = 0) -> int:
    """Bytes at the fullest moment of a step of a rank of the program in `folder`, parameters and all."""
    program = Program(folder)
    graph = optimized(program.graph(rank, "step"), causal=True, free=program.free_groups)
    ledger, parts = Ledger(), int(program.parallel["data"])
    state = {name: torch.empty(kind.shape, dtype=DTYPES[kind.dtype], device=_META) for name, kind in graph.parameters}
    partners = Partners() if program.world > 1 else None
    with torch.no_grad():
        bound = Binder(graph, state, _META, communicator=partners, rules=_rules(),
                       joins=program.free_groups if partners else None).bind()
        inputs = [torch.empty((shape[0] // parts, *shape[1:]), dtype=DTYPES[dtype], device=_META)
                  for _, shape, dtype in program.inputs]
        for item in (*bound.values, *inputs):
            if isinstance(item, torch.Tensor):
                ledger.add(item)
        with ledger:
            bound.run(inputs)
    gc.collect()
    return ledger.most
