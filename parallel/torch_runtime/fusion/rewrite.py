"""A graph under change: nodes looked up, replaced, added and put in order, for the passes."""

from __future__ import annotations

import bisect
import dataclasses
import heapq
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from parallel.torch_runtime.buckets import AWAITED
from parallel.torch_runtime.execute import aliases_of, read_by, written_by
from parallel.torch_runtime.graph import COLLECTIVES, Graph, Kind, Node
from parallel.torch_runtime.groups import JOINED
from parallel.torch_runtime.rules import VIEWS, WRITES


class Editor:
    """Nodes by number, with an index each in the order of the graph.

    Args:
        graph: it is not changed; `graph()` gives the new one.
    """

    def __init__(self, graph: Graph) -> None:
        self.original = graph
        # The states by which MindSpore orders readers and writers; `dependencies` orders them anew.
        states = {node.number for node in graph.nodes if node.op == "UpdateState"}
        self.nodes = {node.number: dataclasses.replace(node, inputs=[item for item in node.inputs
                                                                     if item not in states])
                      for node in graph.nodes if node.number not in states}
        self.position: dict[int, float] = {node.number: float(position) for position, node in enumerate(graph.nodes)}
        self.constants = list(graph.constants)
        self.result = graph.result
        self.next = 1 + max(self.nodes, default=graph.first_node)
        self._users: dict[int, dict[int, None]] = defaultdict(dict)
        for node in self.nodes.values():
            self._read(node.number, node.inputs)

    def users(self, number: int) -> list[Node]:
        """The nodes that read a value, in order."""
        return [self.nodes[item] for item in self._users.get(number, ())]

    def change(self, node: Node, op: str, inputs: list[int], attributes: dict[str, Any] | None = None) -> None:
        """Makes a node another one with the same result; attributes None = none."""
        for item in node.inputs:
            self._users[item].pop(node.number, None)
        self._read(node.number, inputs)
        node.op, node.inputs, node.attributes = op, list(inputs), attributes or {}

    def _read(self, number: int, inputs: list[int]) -> None:
        for item in inputs:
            self._users[item][number] = None

    def maker(self, number: int, *ops: str) -> Node | None:
        """The node that makes a value, if it is one of `ops` (any, where none is named)."""
        node = self.nodes.get(number)
        return node if node is not None and (not ops or node.op in ops) else None

    def through(self, number: int, *ops: str) -> int:
        """The value behind nodes of `ops` that pass their first input on."""
        node = self.nodes.get(number)
        while node is not None and node.op in ops:
            number = node.inputs[0]
            node = self.nodes.get(number)
        return number

    def kind(self, number: int) -> Kind | None:
        """Declared type of a value."""
        if number in self.nodes:
            return self.nodes[number].outputs[0] if len(self.nodes[number].outputs) == 1 else None
        graph = self.original
        if number < graph.first_parameter:
            return graph.inputs[number][1]
        return graph.parameters[number - graph.first_parameter][1] if graph.is_parameter(number) else None

    def constant(self, number: int) -> Any:
        """The constant with this number, None if the value is none."""
        return self.original.constant(number)

    def add(self, op: str, inputs: list[int], outputs: Iterable[Kind], like: Node, **attributes: Any) -> int:
        """Adds a node where `like` is; its number."""
        number, self.next = self.next, self.next + 1
        self.nodes[number] = Node(op, inputs, list(outputs), attributes, like.scope, dict(like.marks), number)
        self.position[number] = self.position[like.number]
        self._read(number, inputs)
        return number

    def item(self, number: int, index: int, kind: Kind, like: Node) -> int:
        """Element `index` of a node that gives a tuple; its number."""
        return self.add("Item", [number], [kind], like, index=index)

    def replace(self, old: int, new: int) -> None:
        """Everything that reads `old` reads `new`."""
        for node in self.users(old):
            self.change(node, node.op, [new if item == old else item for item in node.inputs], node.attributes)
        if self.result == old:
            self.result = new

    def drop(self, node: Node) -> None:
        """Takes a node away that nothing reads any more, though it writes a parameter."""
        for item in node.inputs:
            self._users[item].pop(node.number, None)
        del self.nodes[node.number]

    def graph(self, *, early: bool = False, free: frozenset[tuple[int, ...]] = frozenset()) -> Graph:
        """The changed graph without what nobody reads, in an order that keeps every dependency.

        Args:
            early: gradients of parameters, their collectives and all that only the update reads come as soon as they
                are ready, rather than where the graph has them.
            free: groups whose collectives may be put in another order, the same on all their ranks.
        """
        self._drop_unread()
        original = self.original
        nodes = ordered(dataclasses.replace(original, nodes=sorted(self.nodes.values(), key=self._key),
                                            result=self.result), early=early, free=free)
        if early:
            done = dataclasses.replace(original, nodes=nodes, result=self.result)
            for number in awaited(done, dependencies(done, free, control=False)):
                self.nodes[number].marks = {**self.nodes[number].marks, AWAITED: True}
        return dataclasses.replace(original, nodes=nodes, result=self.result)

    def _key(self, node: Node) -> tuple[float, int]:
        return self.position[node.number], node.number

    def _drop_unread(self) -> None:
        wanted, pending = set(), [self.result]
        pending += [node.number for node in self.nodes.values() if node.op in WRITES or node.op in COLLECTIVES]
        while pending:
            number = pending.pop()
            if number in wanted or number not in self.nodes:
                continue
            wanted.add(number)
            pending += self.nodes[number].inputs
        self.nodes = {number: node for number, node in self.nodes.items() if number in wanted}


_BACKWARD = ("LayerNormGrad", "FusedLayerNormGrad", "SoftmaxBackward", "FusedAttentionGrad", "FusedTargetAttentionGrad",
             "FusedSwishGrad", "GeLUGrad", "RmsNormGrad", "SiLUGrad", "ReluGrad", "SigmoidGrad", "TanhGrad",
             "SoftmaxGrad", "Receive", "Send")


def ordered(graph: Graph, *, early: bool = False, free: frozenset[tuple[int, ...]] = frozenset()) -> list[Node]:
    """The graph's nodes in an order that keeps what each waits for; see `Editor.graph`.

    What a node waits for: its inputs; of a parameter that it reads, the last writer in the given order; of one that it
    writes, all readers of what is overwritten; the collective of the same group before it, unless the group is free;
    the message before it in the same direction.
    """
    waits = dependencies(graph, free, control=not early)
    place = {node.number: float(number) for number, node in enumerate(graph.nodes)}
    nodes, done = {node.number: node for node in graph.nodes}, _by_key(waits, place, place)
    if early:
        # A fused node may stand behind what reads it.
        for number in reversed(done):
            for item in waits[number]:
                place[item] = min(place[item], place[number])
        graph = dataclasses.replace(graph, nodes=[nodes[number] for number in done])
        done = _by_key(waits, _early(graph, waits, place, free), place)
    return [nodes[number] for number in done]


def _by_key(waits: dict[int, set[int]], key: dict[int, float], place: dict[int, float]) -> list[int]:
    """Numbers of the nodes, each after what it waits for, those with a lower key first."""
    after: dict[int, list[int]] = defaultdict(list)
    missing = {}
    for number, found in waits.items():
        missing[number] = len(found)
        for item in found:
            after[item].append(number)
    ready = [(key[number], place[number], number) for number, count in missing.items() if not count]
    heapq.heapify(ready)
    done: list[int] = []
    while ready:
        number = heapq.heappop(ready)[2]
        done.append(number)
        for item in after[number]:
            missing[item] -= 1
            if not missing[item]:
                heapq.heappush(ready, (key[item], place[item], item))
    if len(done) != len(waits):
        raise RuntimeError("the changed graph waits for itself")
    return done


def _early(graph: Graph, waits: dict[int, set[int]], place: dict[int, float],
           free: frozenset[tuple[int, ...]]) -> dict[int, float]:
    """When each node is to come, in places of the given order.

    What only the update reads comes as soon as it is ready; but where the backward pass is about to wait for other
    ranks, behind the node that begins to talk to them (zero-bubble pipelines order gradients so, too: Qi et al. 2023,
    arXiv:2401.10241). Slices of weights are gathered before anything else. A free collective that the pass waits for
    begins as soon as what it sends is there: with interleaved parts of a batch the other part is computed meanwhile.
    """
    nodes, key = {node.number: node for node in graph.nodes}, dict(place)
    late, behind = only_for_the_update(graph, waits), set()
    sent = -1.0
    for node in graph.nodes:
        if node.op == "Send":
            sent = place[node.number]
        elif node.op == "Receive" and place[node.number] - sent <= _PATIENCE:
            key[node.number] = sent + 0.25  # its buffer is ready before the message comes
    for number in awaited(graph, waits):
        if tuple(graph.groups[nodes[number].attributes["group"]]) in free:
            ready = max((place[item] for item in waits[number]), default=place[number])
            key[number] = min(key[number], ready + 0.25)
    talks = sorted(key[node.number] for node in graph.nodes if node.number not in late and _talks(node, graph))
    for node in graph.nodes:
        # What reads such a collective's result comes at the end: the longer it waits the less it has to.
        if any(item in behind or (item in late and nodes[item].op in COLLECTIVES) for item in waits[node.number]):
            behind.add(node.number)
            key[node.number] = place[node.number] + len(place)
        elif node.number in late:
            ready = max((key[item] for item in waits[node.number]), default=key[node.number])
            next_talk = bisect.bisect_right(talks, ready)
            soon = next_talk < len(talks) and talks[next_talk] <= place[node.number] + _PATIENCE
            if soon and node.op not in COLLECTIVES:
                ready = max(ready, talks[next_talk] + 0.5)
            key[node.number] = ready
    for number in _gathers_of_weights(graph, waits):
        key[number] = place[number] - len(place)
    return key


_PATIENCE = 3000
"""Nodes that a gradient of parameters may be put off by, and a Receive be brought forward."""


def awaited(graph: Graph, waits: dict[int, set[int]]) -> set[int]:
    """Collectives whose results the forward or the backward pass waits for, but for gathers of weights.

    Args:
        graph: with its nodes in order.
        waits: `dependencies`.
    """
    others = only_for_the_update(graph, waits) | set(_gathers_of_weights(graph, waits))
    return {node.number for node in graph.nodes
            if node.op in JOINED and node.number not in others and _talks(node, graph)}


def _talks(node: Node, graph: Graph) -> bool:
    """Whether a node begins a collective or a message that other ranks, or this one, wait for."""
    return node.op in COLLECTIVES and len(set(graph.groups[node.attributes["group"]])) > 1


def _gathers_of_weights(graph: Graph, waits: dict[int, set[int]]) -> list[int]:
    """AllGathers that depend on nothing but parameters, with what they read."""
    bare: set[int] = set()
    for node in graph.nodes:
        inputs = [item for item in read_by(node) if graph.constant(item) is None]
        if inputs and all(graph.is_parameter(item) or item in bare for item in inputs) and waits[node.number] <= bare:
            bare.add(node.number)
    nodes, found = {node.number: node for node in graph.nodes}, set()
    pending = [number for number in bare if nodes[number].op == "AllGather"]
    while pending:
        number = pending.pop()
        if number not in found:
            found.add(number)
            pending += waits[number]
    return sorted(found)


def dependencies(graph: Graph, free: frozenset[tuple[int, ...]] = frozenset(), *,
                 control: bool = True) -> dict[int, set[int]]:
    """For every node the numbers of the nodes that have to come before it, for nodes in a valid order or one that only
    misplaces new ones.

    Args:
        graph: the nodes'.
        free: groups whose collectives may come in another order.
        control: whether a Depend waits for what it stands after, by which the partitioner tells an order. Without it a
            node waits for what it reads, and for readers and writers of the parameters that it touches.
    """
    aliases = aliases_of(graph)
    numbers = {node.number for node in graph.nodes}
    waits: dict[int, set[int]] = {
        node.number: {item for item in (node.inputs if control else read_by(node)) if item in numbers}
        for node in graph.nodes}
    shares: dict[int, set[int]] = {}  # value -> parameters whose memory it may share
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = defaultdict(list)
    before: dict[tuple, int] = {}
    for node in graph.nodes:
        writes = set(written_by(graph, node, aliases))
        touched = set()
        for number in read_by(node):
            source = aliases.get(number, number)
            touched |= {source} if graph.is_parameter(source) else shares.get(number, set())
        for parameter in touched:
            if parameter in writer and writer[parameter] != node.number:
                waits[node.number].add(writer[parameter])
            readers[parameter].append(node.number)
        for parameter in writes:
            waits[node.number] |= {item for item in readers[parameter] if item != node.number}
            if parameter in writer:
                waits[node.number].add(writer[parameter])
            writer[parameter], readers[parameter] = node.number, []
        if touched:
            shares[node.number] = touched if node.op in VIEWS else set()
        if node.op in COLLECTIVES:
            members = tuple(graph.groups[node.attributes["group"]])
            lane = (node.op in ("Send", "Receive"), members)
            if lane in before and (lane[0] or members not in free):
                waits[node.number].add(before[lane])
            before[lane] = node.number
    return waits


def only_for_the_update(graph: Graph, waits: dict[int, set[int]]) -> set[int]:
    """Nodes after the backward pass has begun that no later node of the backward pass reads."""
    needed: set[int] = set()
    started, behind = False, set()
    for node in graph.nodes:
        started = started or node.op in _BACKWARD
        if started:
            behind.add(node.number)
    pending = [node.number for node in graph.nodes if node.op in _BACKWARD]
    while pending:
        number = pending.pop()
        if number in needed:
            continue
        needed.add(number)
        pending += waits.get(number, ())
    return {number for number in behind if number not in needed}


def plain_items(editor: Editor) -> None:
    """TupleGetItem becomes Item, whose index is an attribute, right behind what gives the tuple: a tuple that waits for
    a reader in the backward pass would keep all its items until then."""
    for node in list(editor.nodes.values()):
        if node.op == "TupleGetItem":
            index = editor.constant(node.inputs[1])
            if isinstance(index, int):
                editor.change(node, "Item", node.inputs[:1], {"index": index})
                editor.position[node.number] = editor.position.get(node.inputs[0], editor.position[node.number])
