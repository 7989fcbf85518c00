"""Compiled regions: what is between fused attention, collectives and updates is traced and compiled by Inductor.

A network's layers give the same region again and again, which is compiled once. Views, casts to a wider type and GELUs
are computed again in every region that reads them, so that what is kept for the backward pass is the narrow tensor.
Collectives that begin at the end of the same region are joined into one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel.torch_runtime.execute import Binder, Bound, Step, aliases_of, hazards, read_by
from parallel.torch_runtime.fused import fused_rules
from parallel.torch_runtime.groups import Pending
from parallel.torch_runtime.program import COLLECTIVES, Graph, Kind, Node
from parallel.torch_runtime.rewrite import dependencies
from parallel.torch_runtime.rules import WRITES

# Inductor would add rows by atomics, in another order every time.
OPAQUE = ("FusedAttention", "FusedAttentionGrad", "UnsortedSegmentSum", "ScatterNd")
_PULLED = {"Load", "Depend", "StopGradient", "Reshape", "Transpose", "TransposeExt", "ExpandDims", "Squeeze", "Flatten",
           "MakeTuple", "MakeList", "GeLU"}
_ITEMS = ("Item", "TupleGetItem")
_SIZES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}
_LARGEST = 600
_JOINED = ("AllReduce", "AllGather", "ReduceScatter")
_compiled: dict[str, Callable] = {}


class RegionBinder(Binder):
    """`Binder` whose steps are compiled regions and, between them, single nodes.

    Args: see `Binder`; `compile` makes a callable of (function, example inputs), by default `inductor`.
    """

    def __init__(self, graph: Graph, *arguments: Any, compile: Callable | None = None, **keywords: Any) -> None:
        super().__init__(graph, *arguments, **keywords)
        self.compile = compile or inductor
        self.traced = {**self.rules, **fused_rules(self.device, traced=True)}
        self.by_number = {node.number: node for node in graph.nodes}
        self.kinds: dict[int, Kind | None] = {node.number: node.outputs[0] if len(node.outputs) == 1 else None
                                              for node in graph.nodes}
        self.kinds |= {number: kind for number, (_, kind) in enumerate([*graph.inputs, *graph.parameters])}

    def bind(self) -> Bound:
        """The bound graph."""
        self.aliases = aliases_of(self.graph)
        self.sharing, self.copied = hazards(self.graph, self.aliases)
        nodes = []
        for node in self.graph.nodes:
            if node.number in self.aliases:
                self.values[node.number] = self.values[self.aliases[node.number]]
            elif node.op != "UpdateState" and not self._fold(node):
                nodes.append(node)
        self.for_others = {number for node in nodes if node.op in COLLECTIVES or node.op in WRITES
                           for number in read_by(node)}
        plan = self._plan(_items_first(nodes))
        steps = self._steps(plan)
        unread = self._lifetimes(steps)
        return Bound(self.graph, steps, self.values, self.communicator, unread, len(self.copied))

    # -- which nodes make a region ----------------------------------------------------------------------------------

    def _pulled(self, node: Node) -> bool:
        """Whether a node is computed again where it is read."""
        if node.number in self.copied or any(root in self.copied for _, root in self.sharing.get(node.number, ())):
            return False
        if node.op == "Cast":
            if node.number in self.for_others:
                return False
            before, after = self.kinds.get(node.inputs[0]), node.outputs[0]
            return before is not None and _SIZES.get(after.dtype, 1) > _SIZES.get(before.dtype, 1)
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
        waits = dependencies(self.graph)
        plan: list[list[Node] | Node] = []
        region: list[Node] = []
        later: list[Node] = []
        behind: set[int] = set()  # what waits for something in `later`

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
                if len(region) >= _LARGEST:
                    close()
        close()
        return plan

    # -- from the plan to steps -------------------------------------------------------------------------------------

    def _steps(self, plan: list[list[Node] | Node]) -> list[Step]:
        drafts: list[tuple[list[Node], list[int]] | Node] = []
        needed: set[int] = set()
        for item in plan:
            if isinstance(item, Node):
                drafts += [*self._eagerly(item.inputs if item.op != "Depend" else item.inputs[:1], drafts), item]
                needed.update(read_by(item))
            else:
                nodes, outside = self._closed(item)
                drafts.append((nodes, outside))
                needed.update(outside)
        drafts += self._eagerly([self.graph.result], drafts)
        needed.add(self.graph.result)
        for item in drafts:
            if isinstance(item, Node):
                needed.update(read_by(item))
        steps: list[Step] = []
        apart: list[Step] = []  # what splits joined collectives, each to come before its first reader
        for group in _joined(drafts, self.graph, self.communicator is not None):
            if isinstance(group, Node):
                step = Step(group, self._function(group, self.aliases, group.number in self.copied), group.number)
            elif isinstance(group, list):
                step, split = self._together(group)
                apart.append(split)
            else:
                step = self._region(*group, needed)
            read = set(read_by(step.node))
            due = [split for split in apart if split.more and read.intersection(split.more)]
            if isinstance(group, list):
                due = [item for item in due if item is not split]
            apart = [item for item in apart if all(item is not other for other in due)]
            steps += [*due, step]
        return [*steps, *apart]

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

    def _together(self, nodes: list[Node]) -> tuple[Step, Step]:
        """Collectives of one kind and group as one, their tensors side by side: what begins it and what splits it."""
        communicator, first = self.communicator, nodes[0]
        members = tuple(self.graph.groups[first.attributes["group"]])
        sources, count = [node.inputs[0] for node in nodes], len(members)
        shared = {}

        def begin(values: list) -> Pending:
            tensors = [values[number] for number in sources]
            shapes = [tensor.shape for tensor in tensors]
            if first.op == "ReduceScatter":
                flat = torch.cat([tensor.reshape(count, -1) for tensor in tensors], 1)
            else:
                flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            shared["shapes"] = shapes
            return communicator.start(first, flat, members)

        lead = Step(Node("Together", sources, [], {}, first.scope, {}, first.number), begin, first.number)
        lead.node.op = first.op  # it is waited for like the collective that it is
        finish = _Parts(nodes, shared, count)
        spread = Step(Node("Spread", [first.number], [], {}, first.scope, {}, nodes[0].number), finish,
                      nodes[0].number, more=tuple(node.number for node in nodes))
        return lead, spread


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


class _Parts:
    """Splits what a joined collective gave."""

    def __init__(self, nodes: list[Node], shared: dict, count: int) -> None:
        self.nodes, self.shared, self.count, self.source = nodes, shared, count, nodes[0].number

    def __call__(self, values: list) -> list[Tensor]:
        flat, op, count = values[self.source], self.nodes[0].op, self.count
        shapes = self.shared["shapes"]
        if op == "AllReduce":
            return [part.reshape(shape) for part, shape in zip(flat.split([shape.numel() for shape in shapes]), shapes,
                                                               strict=True)]
        if op == "ReduceScatter":
            parts = flat.reshape(-1).split([shape.numel() // count for shape in shapes])
            return [part.reshape(shape[0] // count, *shape[1:]) for part, shape in zip(parts, shapes, strict=True)]
        parts = flat.reshape(count, -1).split([shape.numel() for shape in shapes], 1)
        return [part.reshape(count * shape[0], *shape[1:]) for part, shape in zip(parts, shapes, strict=True)]


def _joined(drafts: list, graph: Graph, several: bool) -> list:
    """Drafts with runs of single collectives of the same kind, group and type joined into lists."""
    made: list = []
    run: dict[tuple, list[Node]] = defaultdict(list)

    def close() -> None:
        for nodes in run.values():
            made.append(nodes if len(nodes) > 1 else nodes[0])
        run.clear()

    for item in drafts:
        if isinstance(item, Node) and item.op in _JOINED and several:
            group = tuple(graph.groups[item.attributes["group"]])
            shape = item.outputs[0].shape if item.outputs else ()
            if len(group) > 1 and (item.op == "AllReduce" or shape):
                run[item.op, group, item.attributes.get("op"), item.outputs[0].dtype].append(item)
                continue
        read = read_by(item) if isinstance(item, Node) else item[1]
        if isinstance(item, Node) and item.op in ("Load", "Depend", "Reshape", "Cast", "ExpandDims") and \
                not any(number in {node.number for nodes in run.values() for node in nodes} for number in read):
            made.append(item)
            continue
        close()
        made.append(item)
    close()
    return made


class _Region:
    """A region's function: compiled when it is first run, from the tensors that it is then given."""

    def __init__(self, binder: RegionBinder, nodes: list[Node], position: dict[int, int], outputs: list[int],
                 description: str) -> None:
        self.nodes, self.inputs, self.outputs, self.description = nodes, list(position), outputs, description
        self.rules, self.values, self.dtype = binder.traced, binder.values, binder.dtype
        self.known, self.compile, self.declared = binder.known, binder.compile, binder._declared
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
            key = self.description + str([(item.dtype, tuple(item.shape), item.stride(), item.device.type)
                                          for item in inputs])
            if key not in _compiled:
                _compiled[key] = self.compile(self.plain, inputs)
            self.ready = _compiled[key]
        return self.ready(*inputs)


def inductor(function: Callable, inputs: list[Tensor]) -> Callable:
    """A function of tensors compiled by Inductor for inputs like these."""
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        traced = make_fx(function, tracing_mode="fake")(*inputs)
        return compile_fx(traced, list(inputs))
