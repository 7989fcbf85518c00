"""Compiled regions: what is between fused attention, collectives and updates is traced and compiled by Inductor.

A network's layers give the same region again and again, which is compiled once. Where a layer's result is summed over
ranks, compiled kernels round to half precision wherever the graph does: there the bias is added to the sum, and the
sum to the residual stream; rounded but once, the many sums that lie half way between two numbers would all go the way
of a bias, however small, which the loss shows from the first update on. Views, casts to a wider type and GELUs are
computed again in every region that reads them, so that what is kept for the backward pass is the narrow tensor.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.torch_runtime.buckets import AWAITED
from parallel.torch_runtime.execute import Binder, Step, read_by
from parallel.torch_runtime.fusion.fused import fused_rules
from parallel.torch_runtime.fusion.rewrite import dependencies, only_for_the_update
from parallel.torch_runtime.graph import COLLECTIVES, WIDTHS, Graph, Kind, Node
from parallel.torch_runtime.inference.lanes import cuts
from parallel.torch_runtime.rules import WRITES

# Inductor would add rows by atomics, in another order every time.
OPAQUE = ("FusedAttention", "FusedAttentionGrad", "FusedTargetAttention", "FusedTargetAttentionGrad",
          "UnsortedSegmentSum", "ScatterNd", "SumsOfSquares")
_PULLED = {"Load", "Depend", "StopGradient", "Reshape", "Transpose", "TransposeExt", "ExpandDims", "Squeeze", "Flatten",
           "MakeTuple", "MakeList", "GeLU"}
_ITEMS = ("Item", "TupleGetItem")
_LARGEST = 600
_compiled: dict[str, Callable] = {}


class RegionBinder(Binder):
    """`Binder` whose steps are compiled regions and, between them, single nodes.

    Args: see `Binder`; `compile` makes a callable of (function, example inputs), by default `inductor`; `lane` are
        numbers of nodes that run beside the others (`inference.lanes`).
    """

    def __init__(self, graph: Graph, *arguments: Any, compile: Callable | None = None,
                 lane: Collection[int] = (), **keywords: Any) -> None:
        super().__init__(graph, *arguments, **keywords)
        self.lane = set(lane)
        self.rounds = any(node.marks.get(AWAITED) and node.outputs[0].dtype in ("bfloat16", "float16")
                          for node in graph.nodes)
        self.compile = compile or partial(inductor, rounds=self.rounds)
        self.traced = {**self.rules, **fused_rules(self.device, traced=True)}
        self.kinds: dict[int, Kind | None] = {node.number: node.outputs[0] if len(node.outputs) == 1 else None
                                              for node in graph.nodes}
        self.kinds |= {number: kind for number, (_, kind) in enumerate([*graph.inputs, *graph.parameters])}

    # -- which nodes make a region ----------------------------------------------------------------------------------

    def _pulled(self, node: Node) -> bool:
        """Whether a node is computed again where it is read."""
        if node.number in self.copied or any(root in self.copied for _, root in self.sharing.get(node.number, ())):
            return False
        if node.op == "Cast":
            if node.number in self.for_others:
                return False
            before, after = self.kinds.get(node.inputs[0]), node.outputs[0]
            return before is not None and WIDTHS.get(after.dtype, 1) > WIDTHS.get(before.dtype, 1)
        return node.op in _PULLED

    def _single(self, node: Node) -> bool:
        """Whether a node is a step of its own."""
        if node.op in _ITEMS:
            maker = self.by_number.get(node.inputs[0])
            return maker is None or self._single(maker)
        return (node.op in OPAQUE or node.number in self.copied
                or any(root in self.copied for _, root in self.sharing.get(node.number, ())))

    def _plan(self, nodes: list[Node]) -> list[list[Node] | Node]:
        """Regions (lists) and single nodes, in order; nodes that are pulled are in none."""
        waits = dependencies(self.graph, control=False)
        late = only_for_the_update(self.graph, waits)
        plan: list[list[Node] | Node] = []
        region: list[Node] = []
        later: list[Node] = []
        behind: set[int] = set()  # what waits for something in `later`
        ending, beginning = cuts(self.graph, self.lane, self._pulled) if self.lane else ((), ())

        def close() -> None:
            if region:
                plan.append(list(region))
            plan.extend(later)
            region.clear()
            later.clear()
            behind.clear()

        for node in nodes:
            blocked = any(item in behind for item in waits[node.number])
            if self._pulled(node):
                if blocked:
                    behind.add(node.number)
                continue
            if node.number in beginning:
                close()
            if node.op in COLLECTIVES and node.number not in late:
                # Its result is waited for: it begins at once, and what does not need it goes on.
                close()
                plan.append(node)
                continue
            if node.op in COLLECTIVES or node.op in WRITES:
                # Behind the region, in this order, whatever they wait for: no node of the region does.
                later.append(node)
                behind.add(node.number)
                continue
            if blocked or self._single(node):
                close()
            if self._single(node):
                plan.append(node)
            else:
                region.append(node)
                if len(region) >= _LARGEST or node.number in ending:
                    close()
        close()
        return plan

    # -- from the plan to steps -------------------------------------------------------------------------------------

    def _steps(self, nodes: list[Node]) -> list[Step]:
        self.for_others = {number for node in nodes if node.op in COLLECTIVES or node.op in WRITES
                           for number in read_by(node)}
        drafts: list[tuple[list[Node], list[int]] | Node] = []
        for item in self._plan(_items_first(nodes)):
            if isinstance(item, Node):
                drafts += [*self._eagerly(item.inputs if item.op != "Depend" else item.inputs[:1], drafts), item]
            else:
                drafts.append(self._closed(item))
        drafts += self._eagerly([self.graph.result], drafts)
        needed = {self.graph.result, *(number for item in drafts for number in _reads(item))}
        steps: list[Step] = []
        for item in self._bucketed(drafts, _reads):
            if isinstance(item, Node):
                steps.append(self._step(item))
            else:
                steps.append(self._together(item) if isinstance(item, list) else self._region(*item, needed))
        return steps

    def _closed(self, own: list[Node]) -> tuple[list[Node], list[int]]:
        """A region's nodes with those that it pulls, in order, and the values that come from outside."""
        made: dict[int, Node] = {}
        outside: dict[int, None] = {}
        members = {node.number for node in own}

        def take(number: int) -> None:
            if number in made or number in outside:
                return
            if number in self.known:
                if isinstance(self.values[number], Tensor):
                    outside[number] = None
                return
            node = self.by_number.get(number)
            if node is not None and number not in self.aliases and (number in members or self._pulled(node)):
                for item in read_by(node):
                    take(item)
                made[number] = node
            else:
                outside[number] = None

        for node in own:
            take(node.number)
        return list(made.values()), list(outside)

    def _eagerly(self, numbers: list[int], drafts: list) -> list[Node]:
        """Pulled nodes that a single node reads, as single nodes before it."""
        done = {item.number for item in drafts if isinstance(item, Node)}
        found: dict[int, Node] = {}

        def take(number: int) -> None:
            node = self.by_number.get(number)
            if node is None or number in self.known or number in self.aliases or number in done or number in found:
                return
            if self._pulled(node):
                for item in read_by(node):
                    take(item)
                found[number] = node

        for number in numbers:
            take(number)
        return list(found.values())

    def _region(self, nodes: list[Node], outside: list[int], needed: set[int]) -> Step:
        outputs = [node.number for node in nodes if node.number in needed and not self._pulled(node)]
        position = {number: index for index, number in enumerate(outside)}
        description = self._description(nodes, outside, outputs)
        region = _Region(self, nodes, position, outputs, description)
        joined = Node("Region", list(outside), [], {}, nodes[0].scope if nodes else "", {},
                      outputs[0] if outputs else nodes[-1].number)
        return Step(joined, region, joined.number, more=tuple(outputs))

    def _description(self, nodes: list[Node], outside: list[int], outputs: list[int]) -> str:
        """What a region computes, the same for equal ones."""
        local = {number: f"i{index}" for index, number in enumerate(outside)}
        lines = []
        for index, node in enumerate(nodes):
            read = [local.get(number) or repr(self.values[number]) for number in read_by(node)]
            local[node.number] = f"n{index}"
            lines.append([node.op, read, [(kind.shape, kind.dtype) for kind in node.outputs], node.attributes])
        return json.dumps([lines, [local[number] for number in outputs]], default=str)


def _reads(item: tuple[list[Node], list[int]] | Node) -> list[int]:
    """Numbers of the values that a region or a single node reads."""
    return read_by(item) if isinstance(item, Node) else item[1]


def _items_first(nodes: list[Node]) -> list[Node]:
    """The nodes with every element of a tuple right behind what makes the tuple."""
    makers = {node.number: node for node in nodes}
    items = defaultdict(list)
    for node in nodes:
        if node.op in _ITEMS and node.inputs[0] in makers:
            items[node.inputs[0]].append(node)
    moved = {node.number for listed in items.values() for node in listed}
    found: list[Node] = []

    def take(node: Node) -> None:
        found.append(node)
        for item in items.get(node.number, ()):
            take(item)

    for node in nodes:
        if node.number not in moved:
            take(node)
    return found


class _Region:
    """A region's function: compiled when it is first run, from the tensors that it is then given."""

    def __init__(self, binder: RegionBinder, nodes: list[Node], position: dict[int, int], outputs: list[int],
                 description: str) -> None:
        self.nodes, self.inputs, self.outputs, self.description = nodes, list(position), outputs, description
        self.rules, self.values, self.dtype = binder.traced, binder.values, binder.dtype
        self.known, self.compile, self.declared = binder.known, binder.compile, binder._declared
        self.overwritten, self.rounds = binder.overwritten, binder.rounds
        self.apart: list[int] = []
        self.ready: Callable | None = None

    def plain(self, *inputs: Tensor) -> list[Tensor]:
        """The region node by node."""
        values: dict[int, Any] = dict(zip(self.inputs, inputs, strict=True))
        for node in self.nodes:
            read = [values[number] if number in values else self.values[number] for number in read_by(node)]
            values[node.number] = self.declared(node, self.rules[node.op](node, *read))
        return [values[number] for number in self.outputs]

    def __call__(self, values: list) -> list[Tensor]:
        inputs = [values[number] for number in self.inputs]
        if self.ready is None:
            key = str(self.rounds) + self.description + str([
                (item.dtype, tuple(item.shape), item.stride(), item.device.type) for item in inputs])
            if key not in _compiled:
                _compiled[key] = self.compile(self.plain, inputs)
            self.ready = _compiled[key]
            made = self.ready(*inputs)
            self.apart = self._shared(inputs, made)
        else:
            made = self.ready(*inputs)
        for place in self.apart:
            made[place] = made[place].clone()
        return made

    def _shared(self, inputs: list[Tensor], made: list[Tensor]) -> list[int]:
        """Results that are going to be overwritten and that the compiler found to be an input or another result."""
        pointers = [item.untyped_storage().data_ptr() for item in (*inputs, *made)]
        return [place for place, number in enumerate(self.outputs) if number in self.overwritten
                and pointers.count(pointers[len(inputs) + place]) > 1]


def inductor(function: Callable, inputs: list[Tensor], rounds: bool = False) -> Callable:
    """A function of tensors compiled by Inductor for inputs like these.

    Args:
        function, inputs: it and an example.
        rounds: round to half precision after every operation that gives it, as the function does.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad(), config.patch(emulate_precision_casts=rounds):
        traced = make_fx(function, tracing_mode="fake")(*inputs)
        return compile_fx(traced, list(inputs))
