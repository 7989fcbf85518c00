"""Two lanes of a graph on a GPU: what depends on some inputs alone runs on a stream of its own, beside the rest.

A request of a separated ranker is a user of one row and its candidates. The user's layers are small kernels that read
large weights, one after the other; each layer of the candidates waits for what the user's layer gives it, and for no
more. In a captured graph both lanes become branches. Nothing of the rest is read by what runs beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.torch_runtime.execute import Bound, Step, read_by
from parallel.torch_runtime.graph import COLLECTIVES, Graph


def beside(graph: Graph, inputs: Collection[int]) -> set[int]:
    """Numbers of the nodes that depend on some of these inputs and on no other, with what is made of parameters alone
    for them; none in a graph whose ranks talk, whose order is that of all ranks.

    Args:
        graph: with its nodes in order.
        inputs: places among the graph's inputs.
    """
    if any(node.op in COLLECTIVES for node in graph.nodes):
        return set()
    own: dict[int, bool | None] = {number: number in inputs for number in range(len(graph.inputs))}
    for node in graph.nodes:
        found = {own.get(number) for number in read_by(node)} - {None}
        own[node.number] = None if not found else found == {True}
    wanted = {node.number for node in graph.nodes if own[node.number]}
    for node in reversed(graph.nodes):
        if node.number in wanted:
            wanted |= {number for number in read_by(node) if number >= graph.first_node and own[number] is None}
    return wanted


def in_front(graph: Graph, lane: set[int]) -> Graph:
    """The graph with the nodes of a lane before all others: first what the first of the others needs."""
    nodes, done = {node.number: node for node in graph.nodes}, {}
    rest = [node for node in graph.nodes if node.number not in lane]
    for node in [*rest, *graph.nodes]:
        wanted = [node.number] if node.number in lane else list(node.inputs)
        while wanted:
            number = wanted[-1]
            missing = [] if number in done or number not in lane else [
                item for item in nodes[number].inputs if item in lane and item not in done]
            wanted += missing
            if not missing:
                wanted.pop()
                if number in lane:
                    done[number] = nodes[number]
    return dataclasses.replace(graph, nodes=[*done.values(), *rest])


class Lanes(Bound):
    """A `Bound` whose steps for a lane run on a second stream; on CPUs one after the other.

    Args:
        bound: of a graph with the lane's nodes in front.
        lane: numbers of its nodes.
        device: where it runs.
    """

    def __init__(self, bound: Bound, lane: set[int], device: torch.device) -> None:
        super().__init__(**{item.name: getattr(bound, item.name) for item in dataclasses.fields(bound)})
        # Ahead of the rest, which waits for it, where both have kernels to run.
        self.device, self.stream = device, torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.beside = [step for step in bound.steps if _made(step)[0] in lane]
        self.rest = [step for step in bound.steps if _made(step)[0] not in lane]
        maker = {number: place for place, step in enumerate(self.beside) for number in _made(step)}
        lasts = [max((maker[number] for number in read_by(step.node) if number in maker), default=-1)
                 for step in self.rest]
        near = 0 if any(step.node.op == "Region" for step in self.rest) else _NEAR
        self.waits = [None if last is None else lasts[last] for last in _together(lasts, near)]
        """For each step of the rest the last step of the lane that it has to wait for, if none before it has."""
        self.told = {place for place in self.waits if place is not None}
        self.kept = set(maker)

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """One step: the graph's result."""
        if self.stream is None:
            return super().run(inputs)
        values = list(self.values)
        values[:len(inputs)] = inputs
        main, events = torch.cuda.current_stream(self.device), {}
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream), _lane():
            for place, step in enumerate(self.beside):
                _execute(step, values, step.frees)
                if place in self.told:
                    events[place] = torch.cuda.Event()
                    events[place].record(self.stream)
        for step, last in zip(self.rest, self.waits, strict=True):
            if last is not None:
                main.wait_event(events[last])
            # What the lane made is in use until both have ended: its memory is the second stream's.
            _execute(step, values, [number for number in step.frees if number not in self.kept])
        main.wait_stream(self.stream)
        return values[self.graph.result]


def _together(lasts: Sequence[int], near: int) -> list[int | None]:
    """Who waits for what, given the last place of a lane that each reads (-1 = none): for each the place in `lasts` of
    what it waits for, or None. What is made at most `near` places later is waited for at once."""
    found: list[int | None] = [None] * len(lasts)
    held = -1  # who waits
    for place, last in enumerate(lasts):
        done = -1 if held < 0 else lasts[found[held]]
        if last <= done:
            continue
        if held >= 0 and last <= lasts[held] + near:
            found[held] = place
        else:
            held, found[place] = place, place
    return found


def _made(step: Step) -> tuple[int, ...]:
    return step.more or (step.position,)


def _execute(step: Step, values: list, frees: Sequence[int]) -> None:
    result = step.function(values)
    if step.more is None:
        values[step.position] = result
    else:
        for position, item in zip(step.more, result, strict=True):
            values[position] = item
    for position in frees:
        values[position] = None


@contextlib.contextmanager
def _lane() -> Iterator[None]:
    """Kernels that count what has ended do so apart from those of the rest."""
    from parallel.torch_runtime.fusion import product_kernels

    with product_kernels.lane(1):
        yield


def cuts(graph: Graph, lane: set[int], pulled: Callable[[Any], bool]) -> tuple[set[int], set[int]]:
    """Where compiled regions end, so that a lane's results are there early and are waited for late.

    Args:
        graph: with the lane's nodes in front.
        lane: numbers of its nodes.
        pulled: whether a node is computed again where it is read.

    Returns:
        nodes of the lane behind which a region ends; nodes of the rest before which one does.
    """
    nodes, roots = {node.number: node for node in graph.nodes}, {}

    def origins(number: int) -> set[int]:
        """Values that are kept, behind one that is perhaps computed again."""
        if number not in roots:
            node = nodes.get(number)
            again = node is not None and pulled(node)
            roots[number] = {item for read in read_by(node) for item in origins(read)} if again else {number}
        return roots[number]

    kept = [node for node in graph.nodes if not pulled(node)]
    place = {node.number: number for number, node in enumerate(kept)}
    rest = [node for node in kept if node.number not in lane]
    lasts = [max((place[item] for number in read_by(node) for item in origins(number) & lane), default=-1)
             for node in rest]
    waits = {rest[own].number: kept[lasts[last]].number for own, last in enumerate(_together(lasts, _NEAR))
             if last is not None}
    return set(waits.values()), {*waits, rest[0].number}


_NEAR = 3
"""Nodes of a lane whose results are waited for together: a branch more, or a region, costs more than it hides."""
